"""The settings of the adaptive iterative (round-robin) search, checked when they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swincompress_pl.arguments import choice, integer, names, number, numbers, optional, require, text
from swincompress_pl.pruning.compensation.compensator import METHODS
from swincompress_pl.pruning.evaluation.audit import checked_audit
from swincompress_pl.pruning.space import SpaceConfig, check_criterion, checked_tolerance
from swincompress_pl.pruning.structure.patterns import parse_granularity


@dataclass(frozen=True, kw_only=True)
class AdaptivePruningConfig(SpaceConfig):
    """What the search prunes, how far and in which steps.

    Attributes:
        tolerance: Accuracy that may be lost against the baseline, in points, above 0 and at most 100.
        audit: Part of the hold-out that decides nothing until the end of a round, 0 to below 1. If the round lost more
            than the tolerance on it, the latest steps are given back until it did not (with overshoot="keep" the loss
            is only noted). 0 for none.
        first_tolerance: Tolerance to begin with, above 0 and at most `tolerance`. It is doubled up to `tolerance`
            whenever every target is locked. A narrow one takes what is cheap everywhere first, and needs more rounds.
            None begins with `tolerance`.
        granularity: "structured" (units of the network's groups), "weight" (single weights), n of m such as "2:4",
            "block", or "filter" (input channels, chosen for each filter alone).
        block_shape: (outputs, inputs) of a block, each 1 or more; only for "block".
        step: Part of a target's original units that the first step removes, above 0 and at most 1. Each rejection
            halves it. Steps are rounded to whole units, or to multiples of `round_to` where that applies.
        min_step: A target is locked once its step is smaller than this. Above 0 and at most `step`.
        max_sparsity: Part of a target's original units that may go, above 0 and below 1.
        round_to: Kept widths, except the number of heads, are multiples of it, so that kernels stay fast; 1 or more.
            In spiking attention ("qk", "v"), those of all heads together are. Only for "structured".
        order: "fixed" takes the targets in the order of the network, and "size" those with most weights first.
            "sensitivity" takes those first that cost least accuracy, measured once before the first round. A global
            ranking has only one target, so the order does not matter there.
        ranking: "local" narrows one target after the other (round-robin). "global" takes the lowest scores of all
            together; n of m and "filter" are rules per layer and do not allow it.
        overshoot: "rollback" undoes a step beyond the tolerance. "keep" keeps it and locks the target, as the paper
            seems to do.
        shrink: "round" slices at the end of every round; "end" masks units, and slices when the search is over. Only
            for "structured", and "end" not with the kinds "embed", "head_dim" and "qk".
        kinds: Kinds of groups to prune: "heads", "mlp", "head_dim" and "embed"; in spiking networks also "conv", "qk"
            and "v". Only for "structured".
        layers: Patterns (fnmatch) of the names to prune; None for all.
        criterion: A name in `pruning.CRITERIA`, or a function (`pruning.Criterion`). "second_order" takes what costs
            least if the rest makes up for it, so it belongs with `compensation="ridge"`; of masks it searches those of
            each step. It needs calibration images.
        target: Part of the cost to remove, above 0 and below 1; the search ends when it is reached. None for no target.
        target_of: Cost that `target` counts: "macs", "parameters" or "bytes" (four per parameter, and a bit per
            element of a masked weight). A target in MACs is only for "structured".
        max_rounds: The search ends after this number of rounds, 1 or more; None for no limit.
        time_budget_s: The search ends after this number of seconds of searching, without training; None for no limit.
        compensation: What makes up for what goes, in the layers that read it. "none" leaves them as they are, "bias"
            adds what went on average, and "ridge" solves their weights and biases again, from calibration images. Of
            masks, "ridge" solves what stays of each output. "second_order" is the same as "ridge".

    Raises:
        ValueError: If a field is outside its range, or fields contradict each other; the message names the field.
    """

    tolerance: float = 1.0
    audit: float = 0.0
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
            "audit": checked_audit(self.audit),
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
    "compensation": METHODS,
}
