"""The settings of the adaptive iterative (round-robin) search, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swincompress_pl.pruning.space import SpaceConfig, as_names, check_criterion, check_tolerance, is_count, require
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
        object.__setattr__(self, "kinds", as_names(self.kinds))
        object.__setattr__(self, "layers", None if self.layers is None else as_names(self.layers))
        object.__setattr__(self, "block_shape", tuple(self.block_shape))
        check_tolerance(self.tolerance)
        first = self.first_tolerance
        require(
            "first_tolerance",
            first,
            first is None or 0 < first <= self.tolerance,
            f"None, or above 0 and at most tolerance={self.tolerance}",
        )
        require("step", self.step, 0 < self.step <= 1, "a part of the units, above 0 and at most 1, e.g. 0.05")
        require("min_step", self.min_step, 0 < self.min_step <= self.step, f"above 0 and at most step={self.step}")
        require("max_sparsity", self.max_sparsity, 0 < self.max_sparsity < 1, "above 0 and below 1, e.g. 0.9")
        require("round_to", self.round_to, is_count(self.round_to), "an integer of 1 or more")
        for name, choices in _CHOICES.items():
            require(name, getattr(self, name), getattr(self, name) in choices, f"one of {', '.join(choices)}")
        require("kinds", self.kinds, bool(self.kinds), "one or more kinds, e.g. ('heads', 'mlp')")
        require("layers", self.layers, self.layers is None or bool(self.layers), "None, or one or more patterns")
        check_criterion(self.criterion)
        target, rounds, budget = self.target, self.max_rounds, self.time_budget_s
        require("target", target, target is None or 0 < target < 1, "None, or above 0 and below 1, e.g. 0.3")
        require("max_rounds", rounds, rounds is None or is_count(rounds), "None, or 1 or more")
        require("time_budget_s", budget, budget is None or budget > 0, "None, or seconds above 0")
        self._check_together()

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


_CHOICES = {
    "order": ("fixed", "size", "sensitivity"),
    "ranking": ("local", "global"),
    "overshoot": ("rollback", "keep"),
    "shrink": ("round", "end"),
    "target_of": ("macs", "parameters", "bytes"),
}
