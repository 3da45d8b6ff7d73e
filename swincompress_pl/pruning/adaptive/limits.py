"""When a search is over, and how it continues under other limits than those it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from swincompress_pl.pruning.adaptive.config import AdaptivePruningConfig
from swincompress_pl.pruning.adaptive.state import SearchState

NARROW = "as narrow as max_sparsity, round_to and its own limits allow"
NO_SMALLER_STEP = "no smaller step is within the tolerance"
KEPT_BEYOND = "the tolerance is exceeded; overshoot='keep' keeps the last step"

LIMITS = (
    "tolerance", "first_tolerance", "step", "min_step", "max_sparsity", "round_to", "overshoot", "target", "target_of",
    "max_rounds", "time_budget_s",
)  # fmt: skip
"""The fields of a config that may change while a search is under way."""


class Costs(Protocol):
    """What a network costs: a `Cost` or a `Step`."""

    @property
    def parameters(self) -> int:
        """The number of parameters, without those that a mask makes zero."""
        ...

    @property
    def macs(self) -> int | None:
        """MACs per image; None if no input shape was given."""
        ...

    @property
    def size_bytes(self) -> int:
        """The bytes of the weights."""
        ...


def removed_part(state: SearchState, config: AdaptivePruningConfig, cost: Costs) -> float:
    """The part of the baseline's cost that is gone, in the measure of the target; 0 if MACs are not counted."""
    if config.target_of == "parameters":
        return 1 - cost.parameters / state.baseline_parameters
    if config.target_of == "bytes":
        return 1 - cost.size_bytes / state.baseline_bytes
    return 0.0 if cost.macs is None else 1 - cost.macs / (state.baseline_macs or cost.macs)


def why_over(state: SearchState, config: AdaptivePruningConfig, removed: float, *, out_of_time: bool) -> str | None:
    """Why a search is over; None while it is not. `removed` is what `removed_part` gives."""
    missed = ""
    if config.target is not None:
        told = f"{removed:.1%} of the {config.target_of} removed"
        if removed >= config.target:
            return f"target reached: {told}"
        missed = f"; {told}, the target of {config.target:.1%} is not met"
    if all(entry.locked is not None for entry in state.targets.values()):
        return "every target is locked" + missed
    if config.max_rounds is not None and state.rounds >= config.max_rounds:
        return f"max_rounds={config.max_rounds} is reached" + missed
    if out_of_time:
        return f"time_budget_s={config.time_budget_s} is used up" + missed
    return None


def take_up_limits(state: SearchState, before: Mapping[str, Any], config: AdaptivePruningConfig) -> None:
    """Lets a search continue under the limits of `config`; `before` has the fields, by name, of its config so far.

    Targets that only an old limit had locked are unlocked: by a wider tolerance, a smaller min_step, or another
    max_sparsity, round_to or overshoot. A search that was over continues, whatever ended it, if no new limit ends it.
    A new first_tolerance is the tolerance from now on, and is doubled up to `tolerance` as usual.
    """
    changed = {name for name in LIMITS if name in before and before[name] != getattr(config, name)}
    if not changed:
        return
    wider = _take_up_tolerance(state, before, config, changed)
    for entry in state.targets.values():
        if entry.locked == NARROW and changed & {"max_sparsity", "round_to"}:
            entry.locked = None
        elif entry.locked in (NO_SMALLER_STEP, KEPT_BEYOND) and (wider or "overshoot" in changed):
            entry.locked, entry.step = None, config.step
        elif entry.locked == NO_SMALLER_STEP and entry.step >= config.min_step:
            entry.locked = None
        if entry.locked is None:
            entry.step = config.step if "step" in changed else max(entry.step, config.min_step)
    if state.stopped is not None:
        removed = removed_part(state, config, state.steps[-1]) if state.steps else 0.0
        budget = config.time_budget_s
        state.stopped = why_over(state, config, removed, out_of_time=budget is not None and state.elapsed_s >= budget)


def _take_up_tolerance(
    state: SearchState, before: Mapping[str, Any], config: AdaptivePruningConfig, changed: set[str]
) -> bool:
    """Whether the tolerance of the next round is wider than that of the last."""
    last = state.tolerance
    if "first_tolerance" in changed:
        state.tolerance = config.first_tolerance or config.tolerance
    elif last >= before["tolerance"]:
        state.tolerance = config.tolerance
    else:  # it is still being doubled
        state.tolerance = min(last, config.tolerance)
    return state.tolerance > last
