"""One round of the search, and the rules of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from swincompress_pl.pruning.adaptive.config import AdaptivePruningConfig
from swincompress_pl.pruning.adaptive.limits import KEPT_BEYOND, NARROW, NO_SMALLER_STEP, removed_part, why_over
from swincompress_pl.pruning.adaptive.state import SearchState, Step, TargetState
from swincompress_pl.pruning.criteria import Gradients
from swincompress_pl.pruning.evaluation.audit import Audit, Auditor
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.evaluation.scorer import ROUNDING_POINTS, Evaluator
from swincompress_pl.pruning.space import Removal, SearchSpace, Target
from swincompress_pl.pruning.structure.apply import AppliedPlan
from swincompress_pl.pruning.structure.change import Change, nothing_applied, revert
from swincompress_pl.pruning.structure.cost import Cost


class CoupledState(Protocol):
    """What belongs to a network and has to be cut with it, such as the scales of its quantization.

    An exception restores its attributes, including modules among them, together with the network (`all_or_nothing`).
    """

    def cut(self, applied: AppliedPlan) -> None:
        """Called after the network was cut."""
        ...

    def uncut(self) -> None:
        """Called after the latest cut was undone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a round works with; of this it changes only the network and what is coupled to it.

    Attributes:
        network: The network to prune.
        evaluator: Scores the network.
        config: The settings of the search.
        space: The search space.
        input_shape: Shape of one input with its batch axis; None if MACs are not counted.
        gradients: Statistics of the present network, for the criteria that need them.
        retrains: Whether the weights are trained between rounds, so that a failed step may be tried again.
        on_step: Called with each tried step.
        coupled: Cut together with the network.
        auditor: Says at the end of a round what it lost on images that decided nothing; None for no audit.
    """

    network: nn.Module
    evaluator: Evaluator
    config: AdaptivePruningConfig
    space: SearchSpace
    input_shape: Sequence[int] | None
    gradients: Gradients | None
    retrains: bool
    on_step: Callable[[Step], None] | None
    coupled: CoupledState | None
    auditor: Auditor | None = None


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """An accepted step: its target before, what is gone of it, and what the network cost before."""

    target: Target
    removal: Removal
    cost_before: Cost


class Round:
    """One round under way: what was accepted and the steps so far. It changes `state` as it goes."""

    def __init__(self, setup: Setup, state: SearchState) -> None:
        self.setup, self.state = setup, state
        self.network, self.config, self.space = setup.network, setup.config, setup.space
        self.evaluator = setup.evaluator
        self.steps: list[Step] = []
        self.accepted: dict[str, Accepted] = {}
        self.costs = setup.space.costs(setup.network, setup.input_shape)
        self.cost = self.costs.after({})  # of the network with what was accepted
        self.floor = state.baseline_score - state.tolerance - ROUNDING_POINTS
        self.below_floor = False
        self._started = time.monotonic()

    def run(self, targets: Sequence[Target]) -> Change:
        """Tries one step on every active target in turn, then removes for good what was accepted."""
        if self._begin():
            with ExitStack() as masks:
                for target in in_order(targets, self.state, self.config):
                    if self._target_met() or self._out_of_time() or self._out_of_rounds():
                        break
                    if self.state.targets[target.name].locked is None:
                        self._try_step(target, masks)
        return self._commit_accepted()

    def seconds(self) -> float:
        """The duration of the round so far."""
        return time.monotonic() - self._started

    def _out_of_time(self) -> bool:
        budget = self.config.time_budget_s
        return budget is not None and bool(from_rank_zero(self.state.elapsed_s + self.seconds() >= budget))

    def _begin(self) -> bool:
        """Scores the present network; returns False if training left it below the tolerance."""
        self.state.score = self.evaluator.compare_with(self.network)
        self.below_floor = self.state.score < self.floor and self.config.overshoot != "keep"
        return not self.below_floor

    def _out_of_rounds(self) -> bool:
        """Whether a search that continues with a smaller `max_rounds` has had more rounds already."""
        return self.config.max_rounds is not None and self.state.rounds > self.config.max_rounds

    def _removed_part(self, cost: Cost) -> float:
        return removed_part(self.state, self.config, cost)

    def _target_met(self) -> bool:
        return self.config.target is not None and self._removed_part(self.cost) >= self.config.target

    def _try_step(self, target: Target, masks: ExitStack) -> None:
        """Masks a step of a target and scores it; keeps the mask on `masks` if the step is accepted."""
        entry = self.state.targets[target.name]
        before, after = entry.units, units_after_step(target, entry, self.config)
        assert after is not None  # such targets were locked before the round
        target = replace(target, units=before)
        after, removal, cost = self._removal(target, after)
        removal = self.space.refined(target, removal)
        with ExitStack() as trial:
            trial.enter_context(self.space.masked(self.network, removal))
            try:
                verdict = self.evaluator.is_at_least(self.floor, self.network, target.tensors)
            except ValueError as error:
                error.add_note(f"while {target.name} was tried with {after} of {before} {target.kind}")
                raise
            accepted = verdict.accepted or self.config.overshoot == "keep"
            if accepted:
                self.evaluator.keep(target.tensors)
                masks.enter_context(trial.pop_all())
        if accepted:
            self.accepted[target.name] = Accepted(target=target, removal=removal, cost_before=self.cost)
            entry.units, self.cost = after, cost or self._cost_with(removal)
        if not verdict.accepted:
            self._reject(target, entry, after)
        self._record(target, after, verdict.score, accepted, verdict.images, verdict.exact)

    def _removal(self, target: Target, after: int) -> tuple[int, Removal, Cost | None]:
        """The width after a step, what the step removes, and the cost of the network then, None if it is not known.

        The step goes to `after` units, or only as far as the target of the search needs.
        """
        at = self.space.removals(self.network, target, self.setup.gradients)
        removal = at(after)
        if self.config.target is None:
            return after, removal, None
        cost = self._cost_with(removal)
        if self._removed_part(cost) <= self.config.target:
            return after, removal, cost
        widths = range(target.units // target.granule * target.granule, after - 1, -target.granule)
        low, high = 0, len(widths) - 1  # the target is met at the last of them
        while low < high:
            middle = (low + high) // 2
            met = self._removed_part(self._cost_with(at(widths[middle]))) >= self.config.target
            low, high = (low, middle) if met else (middle + 1, high)
        return widths[low], at(widths[low]), None

    def _removal_accepted(self) -> dict[str, object]:
        return {name: gone for each in self.accepted.values() for name, gone in each.removal.items()}

    def _cost_with(self, removal: Removal) -> Cost:
        """The cost of the network without `removal` and without what was accepted before."""
        return self.costs.after({**self._removal_accepted(), **removal})

    def _commit_accepted(self) -> Change:
        """Removes for good what was accepted, and scores the whole hold-out, and then the audit.

        Decisions by sampling, or sums in another order, may have been wrong, and many decisions on the same images fit
        them. If the score is below the tolerance, or the audit lost more, the latest steps are given up until neither
        is so.
        """
        given_back, keeps = 0, self.config.overshoot == "keep"
        while self.accepted:
            change = self._commit()
            score = self.evaluator.score(self.network)
            if score >= self.floor or keeps:
                audit = self._audit(score, given_back)
                if audit is None or audit.holds or keeps:
                    self.state.score = score
                    self._note(audit)
                    return change
                given_back += 1
            self._revert(change)
            self.evaluator.network_changed()
            self._give_up_latest(score)
        self._audit_what_was(given_back)
        return Change(applied=nothing_applied())

    def _audit(self, score: float, given_back: int) -> Audit | None:
        """What the audit says of the present network, after it had so many steps given back; None without one."""
        if self.setup.auditor is None:
            return None
        return self.setup.auditor.look(
            self.network,
            self.state.audits,
            round=self.state.rounds,
            tolerance=self.state.tolerance,
            deciding_lost_points=self.state.baseline_score - score,
            given_back=given_back,
        )

    def _audit_what_was(self, given_back: int) -> None:
        """Notes the audit of a round that kept nothing; a network that did not train is that of the round before."""
        audits, score = self.state.audits, self.state.score
        if self.setup.auditor is None:
            return
        assert score is not None  # the round has begun
        if audits and not self.setup.retrains:
            last, state = audits[-1], self.state
            look = last.look + given_back
            audits.append(
                replace(last, round=state.rounds, tolerance=state.tolerance, given_back=given_back, look=look)
            )
        else:
            self._note(self._audit(score, given_back))

    def _note(self, audit: Audit | None) -> None:
        if audit is not None:
            assert self.setup.auditor is not None
            self.setup.auditor.warn_if_coarse(audit, self.state.audits)
            self.state.audits.append(audit)

    def _commit(self) -> Change:
        change = self.space.commit(self.network, self._removal_accepted())
        if self.setup.coupled is not None:
            self.setup.coupled.cut(change.applied)
        return change

    def _revert(self, change: Change) -> None:
        revert(self.network, change)
        if self.setup.coupled is not None:
            self.setup.coupled.uncut()

    def _give_up_latest(self, score: float) -> None:
        _, latest = self.accepted.popitem()
        entry = self.state.targets[latest.target.name]
        tried, entry.units = entry.units, latest.target.units
        self.cost = latest.cost_before
        self._reject(latest.target, entry, tried)
        self._record(latest.target, tried, score, False, self.evaluator.images, True)

    def _reject(self, target: Target, entry: TargetState, tried: int) -> None:
        if self.config.overshoot == "keep":
            entry.locked = KEPT_BEYOND
            return
        entry.step /= 2
        # Without training in between the same units would fail again: halve until the step differs.
        while not self.setup.retrains and entry.step >= self.config.min_step:
            if units_after_step(target, entry, self.config) != tried:
                break
            entry.step /= 2
        if entry.step < self.config.min_step:
            entry.locked = NO_SMALLER_STEP

    def _record(self, target: Target, after: int, score: float, accepted: bool, images: int, exact: bool) -> None:
        step = Step(
            round=self.state.rounds,
            target=target.name,
            kind=target.kind,
            units_before=target.units,
            units_after=after,
            score=score,
            accepted=accepted,
            parameters=self.cost.parameters,
            size_bytes=self.cost.size_bytes,
            macs=self.cost.macs,
            images=images,
            exact=exact,
        )
        self.steps.append(step)
        if self.setup.on_step is not None:
            self.setup.on_step(step)

    def why_stopped(self) -> str | None:
        """Why the search is over after this round; None if it is not."""
        if self.below_floor and not self.setup.retrains:
            return f"{self.state.score:.2f} points are below the tolerance before anything is tried"
        return why_over(self.state, self.config, self._removed_part(self.cost), out_of_time=self._out_of_time())


def check_same_targets(state: SearchState, targets: Sequence[Target]) -> None:
    """Raises ValueError if the network does not have the targets, and their widths, of the state."""
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


def in_order(targets: Sequence[Target], state: SearchState, config: AdaptivePruningConfig) -> list[Target]:
    """The targets in the order in which a round tries them."""
    if config.order == "fixed":
        return list(targets)
    if config.order == "size":
        return sorted(targets, key=lambda target: -target.weights)
    return sorted(targets, key=lambda target: _loss_a_part(state.sensitivity.get(target.name, [])))


def _loss_a_part(curve: Sequence[tuple[float, float]]) -> float:
    """Points lost per part removed, averaged over the measured levels."""
    losses = [(curve[0][1] - score) / part for part, score in curve if part > 0]
    return sum(losses) / len(losses) if losses else 0.0


def units_after_step(target: Target, entry: TargetState, config: AdaptivePruningConfig) -> int | None:
    """The width after the next step; None if the target is as narrow as it may be."""
    least = target.least_units(config.max_sparsity)
    if entry.units <= least:
        return None
    removed = max(1, round(entry.step * entry.initial_units / target.granule)) * target.granule
    return max((entry.units - removed) // target.granule * target.granule, least)


def lock_finished(state: SearchState, targets: Sequence[Target], config: AdaptivePruningConfig) -> None:
    """Locks the targets that are as narrow as they may be."""
    for target in targets:
        entry = state.targets[target.name]
        if entry.locked is None and units_after_step(target, entry, config) is None:
            entry.locked = NARROW


def widen_tolerance(state: SearchState, targets: Sequence[Target], config: AdaptivePruningConfig) -> None:
    """Doubles the tolerance and unlocks all targets once every one is locked, up to the final tolerance."""
    if state.tolerance >= config.tolerance or any(entry.locked is None for entry in state.targets.values()):
        return
    state.tolerance = min(2 * state.tolerance, config.tolerance)
    for entry in state.targets.values():
        entry.step, entry.locked = config.step, None
    lock_finished(state, targets, config)
