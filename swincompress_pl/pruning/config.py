"""The settings of the round-robin search, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .scores import CRITERIA, Criterion


@dataclass(frozen=True, kw_only=True)
class RoundRobinConfig:
    """How far and in which steps the search prunes.

    tolerance: accuracy that may be lost against the baseline, in points, above 0 and at most 100.
    step: part of a group's original units that a first step removes; halved at each rejection until it is below
        min_step, then the group is locked. Steps are rounded to whole heads, to multiples of round_to elsewhere.
    max_sparsity: part of a group's original units that may go, above 0 and below 1.
    round_to: kept widths (not heads) are multiples of it, so that kernels stay fast.
    order: "fixed" is the network's own, "size" the group with most parameters first.
    overshoot: "rollback" undoes a step beyond the tolerance; "keep" keeps it and locks the group, as the paper seems
    to.
    kinds: the kinds of groups to prune. criterion: a name in `pruning.CRITERIA` or a function (network, group) ->
    (units,).
    target: a second stopping rule: the part of the cost (target_of: "macs" or "parameters") to remove, between 0 and 1.
    max_rounds: the search ends after so many rounds. Raises ValueError, naming the field, for anything else.
    """

    tolerance: float = 1.0
    step: float = 0.05
    min_step: float = 0.0125
    max_sparsity: float = 0.9
    round_to: int = 8
    order: Literal["fixed", "size"] = "fixed"
    overshoot: Literal["rollback", "keep"] = "rollback"
    kinds: tuple[str, ...] = ("heads", "mlp")
    criterion: str | Criterion = "magnitude"
    target: float | None = None
    target_of: Literal["macs", "parameters"] = "macs"
    max_rounds: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        _require("tolerance", self.tolerance, 0 < self.tolerance <= 100, "in points, above 0 and at most 100, e.g. 1.0")
        _require("step", self.step, 0 < self.step <= 1, "a part of the units, above 0 and at most 1, e.g. 0.05")
        _require("min_step", self.min_step, 0 < self.min_step <= self.step, f"above 0 and at most step={self.step}")
        _require("max_sparsity", self.max_sparsity, 0 < self.max_sparsity < 1, "above 0 and below 1, e.g. 0.9")
        _require(
            "round_to", self.round_to, isinstance(self.round_to, int) and self.round_to >= 1, "an integer of 1 or more"
        )
        _require("order", self.order, self.order in ("fixed", "size"), "'fixed' or 'size'")
        _require("overshoot", self.overshoot, self.overshoot in ("rollback", "keep"), "'rollback' or 'keep'")
        _require("kinds", self.kinds, bool(self.kinds), "one or more kinds, e.g. ('heads', 'mlp')")
        known = callable(self.criterion) or self.criterion in CRITERIA
        _require(
            "criterion",
            self.criterion,
            known,
            f"one of {', '.join(CRITERIA)}, or a function (network, group) -> (units,)",
        )
        _require(
            "target", self.target, self.target is None or 0 < self.target < 1, "None, or above 0 and below 1, e.g. 0.3"
        )
        _require("target_of", self.target_of, self.target_of in ("macs", "parameters"), "'macs' or 'parameters'")
        rounds = self.max_rounds
        _require(
            "max_rounds", rounds, rounds is None or (isinstance(rounds, int) and rounds >= 1), "None, or 1 or more"
        )


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: it has to be {wanted}")
