"""The settings of PrimeSVT, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn

from swincompress_pl.pruning.adaptive.config import RoundRobinConfig
from swincompress_pl.pruning.criteria import CRITERIA, Criterion
from swincompress_pl.registry import adapter_for

WHOLE_UNITS = ("heads", "embed")  # kinds that a default leaves alone: they overlap the others, or reach everywhere


@dataclass(frozen=True, kw_only=True)
class PrimeSVTConfig:
    """What PrimeSVT (arXiv 2606.03428) prunes, under which constraints, and in which steps.

    max_accuracy_drop: in points against the network before, above 0 and at most 100.
    min_memory_saving: part of all parameters that has to go, 0 to below 1.
    mode: "group" removes units of the network's groups physically; "paper" makes the weakest input channels of every
        filter zero, for each filter its own (Alg. 2), so shapes stay and the saving is a count of zeros.
    policy: "allocated": each block's rate from what it costs alone at each of `rates`, all layers being the target set;
        "prioritized" (the paper): a uniform rate, then raises from there by `order`. order, target_sets, theta,
        increments, frozen and benefit_resolution_points are settings of "prioritized" only.
    blocks: "layer" has a rate for each layer, "block" (the paper) one for all layers of a block.
    order: in which blocks are raised: "robustness" (Alg. 3), the most robust first and by more, or "size", the largest
        first and all by the largest increment.
    prefer: what is applied where no candidate meets both constraints: the largest saving within "accuracy", or the best
        accuracy within "memory".
    target_sets: parts of the layers, the largest first, that Alg. 1 chooses from. rates: parts of a layer's units that
        it tries on each, uniformly.
    theta: width of a band of robustness (Alg. 4), in percent saved a point lost. increments: of the rate, for the best
        band, the next, ...; the last for all others. A refused one is followed by the next smaller.
    frozen: what becomes of the blocks whose increment is 0.0: "last" raises them, banded among themselves, when no
        other gains; "never" leaves them at the initial rate (the paper), which ends the search early wherever one
        block costs nothing and so leaves all others in the last band.
    min_block_share: a block with a smaller part of an average block's parameters stays at the initial rate: raising it
        costs accuracy and evaluations for next to nothing. 0 (the paper) raises all.
    max_rate: no layer goes beyond it, above 0 and below 1.
    round_to: kept widths (not heads) are multiples of it. kinds: of groups, only in mode "group"; None for all that
        the network has but "heads" and "embed". layers: patterns (fnmatch) of the names to prune, None for all.
    criterion: a name in `pruning.CRITERIA` or a function; "magnitude" is the paper's L2 norm.
    batchnorm: "keep" the running statistics, or "reestimate" them for every candidate: corrected by what pruning
        changes of them on calibration images.
    benefit_resolution_points, robustness_resolution_points: standard errors to which accuracies are estimated that
        are averaged over the rates of a set (Alg. 1) and that tell the blocks apart (Alg. 3); None for the latter is
        0.2 points, for the curves of "allocated" a fifteenth of max_accuracy_drop where that is more.
    Raises ValueError, naming the field, for anything else and for fields that contradict each other.
    """

    max_accuracy_drop: float = 3.0
    min_memory_saving: float = 0.25
    mode: Literal["group", "paper"] = "group"
    policy: Literal["allocated", "prioritized"] = "allocated"
    order: Literal["robustness", "size"] = "robustness"
    prefer: Literal["accuracy", "memory"] = "accuracy"
    target_sets: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
    rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    theta: float = 1.0
    increments: tuple[float, ...] = (0.08, 0.04, 0.02, 0.01, 0.0)
    frozen: Literal["last", "never"] = "last"
    blocks: Literal["layer", "block"] = "layer"
    min_block_share: float = 0.2
    max_rate: float = 0.9
    round_to: int = 8
    kinds: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    criterion: str | Criterion = "magnitude"
    batchnorm: Literal["keep", "reestimate"] = "keep"
    benefit_resolution_points: float = 1.0
    robustness_resolution_points: float | None = None

    def __post_init__(self) -> None:
        for name in ("kinds", "layers"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else value and tuple(value))
        for name in ("target_sets", "rates", "increments"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in _CHOICES.items():
            _require(name, getattr(self, name), getattr(self, name) in choices, f"one of {', '.join(choices)}")
        drop, saving = self.max_accuracy_drop, self.min_memory_saving
        _require("max_accuracy_drop", drop, 0 < drop <= 100, "in points, above 0 and at most 100, e.g. 3.0")
        _require("min_memory_saving", saving, 0 <= saving < 1, "a part, 0 to below 1, e.g. 0.25")
        _require("max_rate", self.max_rate, 0 < self.max_rate < 1, "above 0 and below 1, e.g. 0.9")
        share = self.min_block_share
        _require("min_block_share", share, 0 <= share < 1, "a part of an average block, 0 to below 1, e.g. 0.2")
        _require("theta", self.theta, 0 < self.theta < math.inf, "above 0, e.g. 1.0")
        benefit, robustness = self.benefit_resolution_points, self.robustness_resolution_points
        _require("benefit_resolution_points", benefit, benefit > 0, "above 0, e.g. 1.0")
        allowed = robustness is None or robustness > 0
        _require("robustness_resolution_points", robustness, allowed, "above 0, e.g. 0.2, or None")
        rounded = isinstance(self.round_to, int) and not isinstance(self.round_to, bool) and self.round_to >= 1
        _require("round_to", self.round_to, rounded, "an integer of 1 or more")
        self._check_lists()
        known = callable(self.criterion) or self.criterion in CRITERIA
        _require("criterion", self.criterion, known, f"one of {', '.join(CRITERIA)}, or a function")
        self._check_together()

    def _check_lists(self) -> None:
        parts = all(0 < part <= 1 for part in self.target_sets)
        _require("target_sets", self.target_sets, bool(self.target_sets) and parts, "parts, above 0 and at most 1")
        within = all(0 < rate <= self.max_rate for rate in self.rates)
        _require("rates", self.rates, bool(self.rates) and within, f"above 0 and at most max_rate={self.max_rate}")
        falling = list(self.increments) == sorted(set(self.increments), reverse=True)
        _require(
            "increments",
            self.increments,
            bool(self.increments) and falling and self.increments[-1] >= 0 and 0 < self.increments[0] < 1,
            "falling, below 1 and at least 0, e.g. (0.08, 0.04, 0.02, 0.01, 0.0)",
        )

    def _check_together(self) -> None:
        if self.min_memory_saving >= self.max_rate:
            raise ValueError(
                f"min_memory_saving={self.min_memory_saving} contradicts max_rate={self.max_rate}: not even all layers "
                "at that rate save as much; raise max_rate, or ask for less"
            )
        if self.policy == "allocated":
            self._refuse_what_only_prioritized_reads()
        if self.mode == "paper" and self.kinds is not None:
            raise ValueError(f"kinds={self.kinds}: mode='paper' prunes filters, not groups; choose with layers=")

    def _refuse_what_only_prioritized_reads(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in _OF_PRIORITIZED:
            value = getattr(self, name)
            if value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} is a setting of policy='prioritized' (Alg. 1, 3, 4 of the paper), and "
                    "policy='allocated'; give policy='prioritized' too, or leave it out"
                )

    def robustness_resolution(self) -> float:
        """`robustness_resolution_points`, or its default. Only the order of the steps depends on the curves, so what
        does not count against all that may be lost is not resolved."""
        if self.robustness_resolution_points is not None:
            return self.robustness_resolution_points
        return max(0.2, self.max_accuracy_drop / 15) if self.policy == "allocated" else 0.2

    def granularity(self, network: nn.Module) -> RoundRobinConfig:
        """What a removal is, in the words of the other search: for `granularity_for`, `Ledger` and the like."""
        common: dict[str, Any] = {"layers": self.layers, "criterion": self.criterion, "max_sparsity": self.max_rate}
        if self.mode == "paper":
            return RoundRobinConfig(granularity="filter", target_of="parameters", **common)
        kinds: Sequence[str] | None = self.kinds
        if kinds is None:
            found = dict.fromkeys(group.kind for group in adapter_for(network).groups(network))
            kinds = [kind for kind in found if kind not in WHOLE_UNITS]
        return RoundRobinConfig(granularity="structured", kinds=tuple(kinds), round_to=self.round_to, **common)

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types; a function is its name."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if callable(self.criterion):
            plain["criterion"] = getattr(self.criterion, "__qualname__", repr(self.criterion))
        return plain


_OF_PRIORITIZED = ("order", "target_sets", "theta", "increments", "frozen", "benefit_resolution_points")
_CHOICES = {
    "mode": ("group", "paper"),
    "policy": ("allocated", "prioritized"),
    "order": ("robustness", "size"),
    "prefer": ("accuracy", "memory"),
    "blocks": ("layer", "block"),
    "frozen": ("last", "never"),
    "batchnorm": ("keep", "reestimate"),
}


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: it has to be {wanted}")
