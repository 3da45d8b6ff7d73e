"""The settings of the adaptive iterative (round-robin) search, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swincompress_pl.arguments import choice, integer, names, number, numbers, optional, require, text
from swincompress_pl.pruning.space import SpaceConfig, check_criterion, checked_tolerance
from swincompress_pl.pruning.structure.patterns import parse_granularity


@dataclass(frozen=True, kw_only=True)
class AdaptivePruningConfig(SpaceConfig):
    """What the search prunes, how far and in which steps.

    tolerance: accuracy that may be lost against the baseline, in points, above 0 and at most 100.
    first_tolerance: the tolerance to begin with, doubled up to `tolerance` whenever every target is locked; None for
        `tolerance` from the start. A wide tolerance lets the first targets spend it on steps that others would give
        cheaper; beginning narrow takes what is cheap everywhere first, for more rounds.
    granularity: "structured" (units of the network's groups), "weight" (single weights), n of m like "2:4", "block"
        (blocks of block_shape = rows, columns), or "filter" (input channels, for each filter its own).
    step: part of a target's original units that a first step removes; halved at each rejection until it is below
        min_step, then the target is locked. Steps are rounded to whole heads, to multiples of round_to elsewhere.
    max_sparsity: part of a target's original units that may go, above 0 and below 1.
    round_to: kept widths (not heads) are multiples of it, so that kernels stay fast. Structured only.
    order: "fixed" is the network's own, "size" the target with most weights first, "sensitivity" the one that costs
        least accuracy first, measured once before the first round.
    ranking: "local" narrows one target after the other (round-robin); "global" takes the lowest scores of all together.
    overshoot: "rollback" undoes a step beyond the tolerance; "keep" keeps it and locks the target, as the paper seems
        to.
    shrink: "round" slices at the end of every round, "end" masks until the search is over. Structured only.
    kinds: the kinds of groups to prune: "heads", "mlp", "head_dim", "embed", of spiking networks also "conv", "qk",
        "v". layers: patterns (fnmatch) of the names to prune, None for all. criterion: a name in `pruning.CRITERIA`
        or a function (see `pruning.Criterion`).
    target: a second stopping rule: the part of the cost (target_of: "macs", "parameters" or "bytes") to remove, between
        0 and 1. max_rounds, time_budget_s: the search ends after so many rounds, or so many seconds of searching.
    Raises ValueError, naming the field, for anything else and for fields that contradict each other.
    """

    tolerance: float = 1.0
    first_tolerance: float | None = None
    step: float = 0.05
    min_step: float = 0.0125
    order: Literal["fixed", "size", "sensitivity"] = "fixed"
    overshoot: Literal["rollback", "keep"] = "rollback"
    target: float | None = None
    max_rounds: int | None = None
    time_budget_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        check_criterion(self.criterion)
        self._check_together()

    def _checked(self) -> dict[str, Any]:
        """The fields, each in its type."""
        tolerance = checked_tolerance(self.tolerance, stacklevel=5)
        step = number("step", self.step, _part, "a part of the units, above 0 and at most 1, e.g. 0.05")
        first = f"None, or above 0 and at most tolerance={tolerance}"
        part = "None, or above 0 and below 1, e.g. 0.3"
        return {
            "tolerance": tolerance,
            "first_tolerance": optional(
                number, "first_tolerance", self.first_tolerance, lambda points: 0 < points <= tolerance, first
            ),
            "granularity": text("granularity", self.granularity, "a name, e.g. 'structured', 'weight' or '2:4'"),
            "block_shape": _block_shape(self.block_shape),
            "step": step,
            "min_step": number("min_step", self.min_step, lambda x: 0 < x <= step, f"above 0 and at most step={step}"),
            "max_sparsity": number("max_sparsity", self.max_sparsity, _inside, "above 0 and below 1, e.g. 0.9"),
            "round_to": integer("round_to", self.round_to, least=1, wanted="an integer of 1 or more"),
            **{name: choice(name, getattr(self, name), choices) for name, choices in _CHOICES.items()},
            "kinds": names("kinds", self.kinds, "one or more kinds, e.g. ('heads', 'mlp')"),
            "layers": optional(names, "layers", self.layers, "None, or one or more patterns"),
            "target": optional(number, "target", self.target, _inside, part),
            "max_rounds": optional(integer, "max_rounds", self.max_rounds, least=1, wanted="None, or 1 or more"),
            "time_budget_s": optional(
                number, "time_budget_s", self.time_budget_s, lambda seconds: seconds > 0, "None, or seconds above 0"
            ),
        }

    def _check_together(self) -> None:
        if self.granularity == "structured":
            inside = sorted({"embed", "head_dim", "qk"} & set(self.kinds))
            require(
                "shrink",
                self.shrink,
                self.shrink == "round" or not inside,
                f"'round' for the kind {', '.join(inside)}: a mask of the readers' weights does not take them out",
            )
            return
        pattern = parse_granularity(self.granularity, block_shape=self.block_shape)  # refuses an unknown one
        require("shrink", self.shrink, self.shrink == "round", "'round': masks of weights are never sliced")
        of_macs = self.target is not None and self.target_of == "macs"
        require(
            "target_of",
            self.target_of,
            not of_macs,
            f"'parameters' or 'bytes': granularity={self.granularity!r} leaves the MACs of a dense kernel",
        )
        by_slot = self.ranking == "global" and (":" in self.granularity or self.granularity == "filter")
        require("ranking", self.ranking, not by_slot, f"'local': {pattern} is a rule for each layer")


def _inside(part: float) -> bool:
    return 0 < part < 1


def _part(part: float) -> bool:
    return 0 < part <= 1


def _block_shape(given: Any) -> tuple[int, ...]:
    wanted = "rows and columns of a block, two integers of 1 or more, e.g. (8, 8)"
    shape = numbers("block_shape", given, lambda size: size >= 1 and size == int(size), wanted)
    require("block_shape", given, len(shape) == 2, wanted)
    return tuple(int(size) for size in shape)


_CHOICES = {
    "order": ("fixed", "size", "sensitivity"),
    "ranking": ("local", "global"),
    "overshoot": ("rollback", "keep"),
    "shrink": ("round", "end"),
    "target_of": ("macs", "parameters", "bytes"),
}
