"""One round of the search at work, and the rules of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from torch import nn

from swincompress_pl.pruning.adaptive.config import RoundRobinConfig
from swincompress_pl.pruning.adaptive.state import SearchState, Step, TargetState
from swincompress_pl.pruning.cost_tracker import Ledger
from swincompress_pl.pruning.criteria import Gradients
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.evaluation.scorer import ROUNDING_POINTS, Scorer
from swincompress_pl.pruning.space import Change, Granularity, Removal, Target, nothing_applied, revert
from swincompress_pl.pruning.structure.apply import AppliedPlan

Progress = Callable[[Step], None]
"""Told of each tried step, accepted or not."""


class Follower(Protocol):
    """What belongs to a network and has to be cut with it, such as the scales of its quantization."""

    def cut(self, applied: AppliedPlan) -> None:
        """The network was cut; on an exception the cut is taken back and this is as it was."""
        ...

    def uncut(self) -> None:
        """The latest cut was taken back."""
        ...


class Round:
    """One round at work: what was accepted and the steps so far."""

    def __init__(
        self,
        network: nn.Module,
        scorer: Scorer,
        config: RoundRobinConfig,
        state: SearchState,
        granularity: Granularity,
        gradients: Gradients | None,
        input_shape: Sequence[int] | None,
        retrains: bool,
        progress: Progress | None,
        follower: Follower | None = None,
    ) -> None:
        self.network, self.scorer, self.config, self.state = network, scorer, config, state
        self.granularity, self.gradients, self.retrains, self.progress = granularity, gradients, retrains, progress
        self.follower = follower
        self.steps: list[Step] = []
        self.accepted: dict[str, tuple[Target, int, Removal]] = {}  # target -> itself, width before, what is gone
        self.ledger = Ledger(network, config, input_shape)
        self.floor = state.baseline_score - state.tolerance - ROUNDING_POINTS
        self.scored = self.below_floor = False
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def out_of_time(self) -> bool:
        budget = self.config.time_budget_s
        return budget is not None and bool(from_rank_zero(self.state.elapsed_s + self.seconds() >= budget))

    def begin(self, unchanged: bool) -> bool:
        """Score the network as it stands; False when training left it below the tolerance."""
        self.state.score = self.scorer.begin_round(self.network, unchanged=unchanged)
        self.scored = True
        self.below_floor = self.state.score < self.floor and self.config.overshoot != "keep"
        return not self.below_floor

    def removed_part(self) -> float:
        """The part of the baseline's cost, in the target's measure, that is gone."""
        if self.config.target_of == "parameters":
            return 1 - self.ledger.parameters / self.state.baseline_parameters
        if self.config.target_of == "bytes":
            return 1 - self.ledger.size_bytes / self.state.baseline_bytes
        return (
            0.0 if self.ledger.macs is None else 1 - self.ledger.macs / (self.state.baseline_macs or self.ledger.macs)
        )

    def target_met(self) -> bool:
        return self.config.target is not None and self.removed_part() >= self.config.target

    def try_step(self, target: Target, masks: ExitStack) -> None:
        """Mask a step of `target` and score it; keep the mask on `masks` if the step is accepted."""
        entry = self.state.targets[target.name]
        before, after = entry.units, units_after_step(target, entry, self.config)
        assert after is not None  # such targets were locked before the round
        target = replace(target, units=before)
        after, removal = self._removal(target, after)
        with ExitStack() as trial:
            trial.enter_context(self.granularity.masked(self.network, removal))
            try:
                verdict = self.scorer.judge(self.network, self.floor, target.tensors)
            except ValueError as error:
                error.add_note(f"while {target.name} was tried with {after} of {before} {target.kind}")
                raise
            accepted = verdict.accepted or self.config.overshoot == "keep"
            if accepted:
                self.scorer.accept(target.tensors)
                masks.enter_context(trial.pop_all())
        if accepted:
            self.accepted[target.name] = (target, before, removal)
            entry.units = after
            self.ledger.cut(removal)
        if not verdict.accepted:
            self._reject(target, entry, after)
        self._report(target, before, after, verdict.score, accepted, verdict.images, verdict.exact)

    def _removal(self, target: Target, after: int) -> tuple[int, Removal]:
        """What a step to `after` units removes, or a smaller one where that is beyond the search's target already."""

        def at(keep: int) -> Removal:
            return from_rank_zero(self.granularity.removal(self.network, target, keep, self.gradients))

        removal = at(after)
        if self.config.target is None or self._removed_part_with(removal) <= self.config.target:
            return after, removal
        widths = range(target.units // target.granule * target.granule, after - 1, -target.granule)
        low, high = 0, len(widths) - 1  # the target is met at the last of them
        while low < high:
            middle = (low + high) // 2
            met = self._removed_part_with(at(widths[middle])) >= self.config.target
            low, high = (low, middle) if met else (middle + 1, high)
        after = widths[low]
        return after, at(after)

    def _removed_part_with(self, removal: Removal) -> float:
        """`removed_part` if `removal` were accepted."""
        self.ledger.cut(removal)
        part = self.removed_part()
        self._recount()
        return part

    def _recount(self) -> None:
        self.ledger.reset()
        for _, _, removal in self.accepted.values():
            self.ledger.cut(removal)

    def commit_accepted(self) -> Change:
        """Make the accepted steps last and score the whole hold-out: sampling, or sums in another order, may have
        erred. Should that be beyond the tolerance, the latest steps are given up until it is within."""
        while True:
            if not self.accepted:
                return Change(applied=nothing_applied())
            removal = {name: gone for _, _, part in self.accepted.values() for name, gone in part.items()}
            change = self._commit(removal)
            try:
                score = self.scorer.full(self.network)
            except BaseException:
                self._revert(change)
                raise
            if score >= self.floor or self.config.overshoot == "keep":
                self.state.score, self.scored = score, True
                return change
            self._revert(change)
            self.scored = False
            self._give_up_latest(score)

    def _commit(self, removal: Removal) -> Change:
        change = self.granularity.commit(self.network, removal)
        if self.follower is not None:
            try:
                self.follower.cut(change.applied)
            except BaseException:
                revert(self.network, change)
                raise
        return change

    def _revert(self, change: Change) -> None:
        revert(self.network, change)
        if self.follower is not None:
            self.follower.uncut()

    def _give_up_latest(self, score: float) -> None:
        _, (target, before, _) = self.accepted.popitem()
        entry = self.state.targets[target.name]
        tried, entry.units = entry.units, before
        self._recount()
        self._reject(target, entry, tried)
        self._report(target, before, tried, score, False, self.scorer.images, True)

    def _reject(self, target: Target, entry: TargetState, tried: int) -> None:
        if self.config.overshoot == "keep":
            entry.locked = "the tolerance is exceeded; overshoot='keep' keeps the last step"
            return
        entry.step /= 2
        # Without training in between the same units would fail again: halve until the step differs.
        while not self.retrains and entry.step >= self.config.min_step:
            if units_after_step(target, entry, self.config) != tried:
                break
            entry.step /= 2
        if entry.step < self.config.min_step:
            entry.locked = "no smaller step is within the tolerance"

    def _report(
        self, target: Target, before: int, after: int, score: float, accepted: bool, images: int, exact: bool
    ) -> None:
        step = Step(
            round=self.state.rounds,
            target=target.name,
            kind=target.kind,
            units_before=before,
            units_after=after,
            score=score,
            accepted=accepted,
            parameters=self.ledger.parameters,
            size_bytes=self.ledger.size_bytes,
            macs=self.ledger.macs,
            images=images,
            exact=exact,
        )
        self.steps.append(step)
        if self.progress is not None:
            self.progress(step)

    def why_stopped(self) -> str | None:
        config, missed = self.config, ""
        if self.below_floor and not self.retrains:
            return f"{self.state.score:.2f} points are below the tolerance before anything is tried"
        if config.target is not None:
            removed = f"{self.removed_part():.1%} of the {config.target_of} removed"
            if self.target_met():
                return f"target reached: {removed}"
            missed = f"; {removed}, the target of {config.target:.1%} is not met"
        if all(entry.locked is not None for entry in self.state.targets.values()):
            return "every target is locked" + missed
        if config.max_rounds is not None and self.state.rounds >= config.max_rounds:
            return f"max_rounds={config.max_rounds} is reached" + missed
        if self.out_of_time():
            return f"time_budget_s={config.time_budget_s} is used up" + missed
        return None


def check_same_targets(state: SearchState, targets: Sequence[Target]) -> None:
    names = {t.name for t in targets}
    if names != set(state.targets):
        different = sorted(names ^ set(state.targets))[:4]
        raise ValueError(
            f"the search was begun on another network or with other settings; targets that differ: {different}"
        )
    for target in targets:
        expected = state.targets[target.name].units
        if not target.members and target.units != expected:
            raise ValueError(
                f"{target.name} has {target.units} units, the search left it with {expected}; was the network changed "
                "in between? Begin a new search"
            )


def in_order(targets: Sequence[Target], state: SearchState, config: RoundRobinConfig) -> list[Target]:
    if config.order == "fixed":
        return list(targets)
    if config.order == "size":
        return sorted(targets, key=lambda target: -target.weights)
    return sorted(targets, key=lambda target: _loss_a_part(state.sensitivity.get(target.name, [])))


def _loss_a_part(curve: Sequence[tuple[float, float]]) -> float:
    """Points lost a part removed, averaged over the measured levels."""
    losses = [(curve[0][1] - score) / part for part, score in curve[1:]]
    return sum(losses) / len(losses) if losses else 0.0


def units_after_step(target: Target, entry: TargetState, config: RoundRobinConfig) -> int | None:
    """The width after the next step, None when the target is as narrow as it may be."""
    least = target.least_units(config.max_sparsity)
    if entry.units <= least:
        return None
    removed = max(1, round(entry.step * entry.initial_units / target.granule)) * target.granule
    return max((entry.units - removed) // target.granule * target.granule, least)


def lock_finished(state: SearchState, targets: Sequence[Target], config: RoundRobinConfig) -> None:
    for target in targets:
        entry = state.targets[target.name]
        if entry.locked is None and units_after_step(target, entry, config) is None:
            entry.locked = "as narrow as max_sparsity, round_to and its own limits allow"


def widen_tolerance(state: SearchState, targets: Sequence[Target], config: RoundRobinConfig) -> None:
    """When nothing more is to be had within a tolerance that is not yet the last, double it and begin again."""
    if state.tolerance >= config.tolerance or any(entry.locked is None for entry in state.targets.values()):
        return
    state.tolerance = min(2 * state.tolerance, config.tolerance)
    for entry in state.targets.values():
        entry.step, entry.locked = config.step, None
    lock_finished(state, targets, config)
