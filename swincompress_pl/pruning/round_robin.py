"""Adaptive iterative pruning: round-robin over the groups, a step each, kept only where the accuracy allows it.

After Cai & Liu (DOI 10.13700/j.bh.1001-5965.2024.0222), for whole units. A round tries one step on every active group
in turn: the units with the lowest scores are masked and the network is scored; within the tolerance of the baseline
they stay masked, otherwise they come back and the group's step is halved. At the end of a round everything accepted is
sliced at once.

Nothing here knows Lightning: `prune` is the whole loop, `run_round` one round of it for those who train in between.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from ..registry import adapter_for
from .apply import AppliedPlan, apply_plan, revert_plan
from .config import RoundRobinConfig
from .cost import count_macs, count_parameters, skeleton
from .groups import Group
from .masks import mask_units
from .plan import PruningPlan
from .scores import lowest_units, unit_scores
from .state import GroupState, SearchState, Step

Evaluate = Callable[[nn.Module], float]
"""The accuracy of a network on a hold-out in points, 0 to 100; it must leave the weights alone."""

Progress = Callable[[Step], None]
"""Told of each tried step, accepted or not."""

_ROUNDING_POINTS = 1e-9  # a score is a quotient of counts: the tolerance itself is within the tolerance


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """One finished round: what was cut (for the optimizers), the steps tried, and the state for the next round."""

    applied: AppliedPlan
    steps: tuple[Step, ...]
    state: SearchState


@dataclass(frozen=True, kw_only=True)
class PruningResult:
    """A finished search.

    plan: from the original network to the final one.
    score, baseline_score: accuracy in points on the hold-out that decided.
    steps: every tried step in order. stopped: why the search ended, and whether a target was met.
    """

    plan: PruningPlan
    score: float
    steps: tuple[Step, ...]
    stopped: str
    state: SearchState

    @property
    def baseline_score(self) -> float:
        """The accuracy before pruning, in points."""
        return self.state.baseline_score


def prune(
    network: nn.Module,
    evaluate: Evaluate,
    config: RoundRobinConfig | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    recover: Callable[[nn.Module, AppliedPlan], None] | None = None,
    progress: Progress | None = None,
) -> PruningResult:
    """Prune `network` in place, round by round, until all groups are locked, a target is met or the rounds are used up.

    evaluate: (network) -> accuracy in points, 0 to 100, on a hold-out; called in eval mode with masks in place.
    input_shape: of one input with its batch axis, e.g. (1, 3, 224, 224); needed for a target in MACs.
    recover: (network, what was just cut) -> None, fine-tuning between rounds; use `slice_optimizer` on its optimizer.
    progress: told of each tried step.
    Whatever is raised (by evaluate, by progress, an interrupt), the network is left as it was before; with `recover`,
    which trains, as it was before the round that failed.
    """
    config = config or RoundRobinConfig()
    state = begin_search(network, evaluate, config, input_shape=input_shape)
    applied: list[AppliedPlan] = []
    plan = PruningPlan.identity()
    try:
        while state.stopped is None:
            outcome = run_round(
                network,
                evaluate,
                config,
                state,
                input_shape=input_shape,
                retrains=recover is not None,
                progress=progress,
            )
            state, plan = outcome.state, plan.then(outcome.applied.plan)
            if recover is None:
                applied.append(outcome.applied)
            elif state.stopped is None:
                recover(network, outcome.applied)
    except BaseException:
        for earlier in reversed(applied):
            revert_plan(network, earlier)
        raise
    score = state.baseline_score if state.score is None else state.score
    return PruningResult(plan=plan, score=score, steps=tuple(state.steps), stopped=state.stopped, state=state)


def begin_search(
    network: nn.Module, evaluate: Evaluate, config: RoundRobinConfig, *, input_shape: Sequence[int] | None = None
) -> SearchState:
    """Score the baseline: the state before the first round."""
    groups = prunable_groups(network, config)
    if config.target is not None and config.target_of == "macs" and input_shape is None:
        raise ValueError(f"target={config.target} of the MACs needs input_shape, e.g. input_shape=(1, 3, 224, 224)")
    with evaluation_mode(network):
        baseline = _checked_score(evaluate(network), "the unpruned network")
    if 0 < baseline <= 1:
        warnings.warn(f"the baseline is {baseline:g} points of 100; does evaluate return a fraction?", stacklevel=2)
    state = SearchState(
        baseline_score=baseline,
        baseline_parameters=count_parameters(network),
        baseline_macs=None if input_shape is None else count_macs(network, input_shape),
        groups={g.name: GroupState(initial_units=g.units, step=config.step) for g in groups},
    )
    _lock_finished(state, groups, {}, config)
    return state


def run_round(
    network: nn.Module,
    evaluate: Evaluate,
    config: RoundRobinConfig,
    state: SearchState,
    *,
    input_shape: Sequence[int] | None = None,
    retrains: bool = True,
    progress: Progress | None = None,
) -> RoundOutcome:
    """Try one step on every active group in turn, then slice what was accepted; `state` itself is not changed.

    retrains: the weights are trained between rounds, so a step that failed may be tried again in the next one.
    On any exception the network is as it was.
    """
    groups = prunable_groups(network, config)
    state = copy.deepcopy(state)
    _check_same_groups(state, groups)
    state.rounds += 1
    with evaluation_mode(network):
        trial = _Round(network, evaluate, config, state, input_shape, retrains, progress)
        with ExitStack() as masks:
            for group in _in_order(network, groups, config):
                if trial.target_met():
                    break
                if state.groups[group.name].locked is None:
                    trial.try_step(group, masks)
        applied = trial.slice_accepted(groups)
    state.steps.extend(trial.steps)
    _lock_finished(
        state, groups, {name: g.units - len(trial.removed.get(name, ())) for name, g in _named(groups).items()}, config
    )
    state.stopped = _why_stopped(state, config, trial)
    return RoundOutcome(applied=applied, steps=tuple(trial.steps), state=state)


class _Round:
    """One round at work: the masks and steps so far, and the costs, counted on a copy without weights."""

    def __init__(
        self,
        network: nn.Module,
        evaluate: Evaluate,
        config: RoundRobinConfig,
        state: SearchState,
        input_shape: Sequence[int] | None,
        retrains: bool,
        progress: Progress | None,
    ) -> None:
        self.network, self.evaluate, self.config, self.state = network, evaluate, config, state
        self.input_shape, self.retrains, self.progress = input_shape, retrains, progress
        self.steps: list[Step] = []
        self.removed: dict[str, tuple[int, ...]] = {}
        self._bare = skeleton(network)
        self._count()

    def _count(self) -> None:
        self.parameters = count_parameters(self._bare)
        self.macs = None if self.input_shape is None else count_macs(self._bare, self.input_shape)

    def removed_part(self) -> float:
        """The part of the baseline's cost, in the target's measure, that is gone."""
        if self.config.target_of == "parameters":
            return 1 - self.parameters / self.state.baseline_parameters
        return 0.0 if self.macs is None else 1 - self.macs / (self.state.baseline_macs or self.macs)

    def target_met(self) -> bool:
        return self.config.target is not None and self.removed_part() >= self.config.target

    def try_step(self, group: Group, masks: ExitStack) -> None:
        """Mask a step of `group` and score it; keep the mask on `masks` if the step is accepted."""
        entry = self.state.groups[group.name]
        after = _units_after_step(group, group.units, entry, self.config)
        assert after is not None  # such groups were locked before the round
        scores = unit_scores(self.network, group, self.config.criterion)
        gone = lowest_units(scores, group.units - after)
        with ExitStack() as trial:
            trial.enter_context(mask_units(self.network, group, gone))
            score = _checked_score(self.evaluate(self.network), f"{group.name} with {after} of {group.units} units")
            within = self._within(score)
            accepted = within or self.config.overshoot == "keep"
            if accepted:
                masks.enter_context(trial.pop_all())
        if accepted:
            self.removed[group.name] = gone
            self._cut_bare(group.name, after)
        if not within:
            self._reject(group, entry, after)
        self._report(group, after, score, accepted)

    def slice_accepted(self, groups: Sequence[Group]) -> AppliedPlan:
        """Slice the accepted steps and score the result once more: sums in another order may tip an image.

        Should that take it beyond the tolerance, the latest steps are given up until it is within.
        """
        while True:
            applied = apply_plan(self.network, PruningPlan.removing(groups, self.removed))
            if not self.removed:
                return applied
            try:
                score = _checked_score(self.evaluate(self.network), "the sliced network")
            except BaseException:
                revert_plan(self.network, applied)
                raise
            if self._within(score) or self.config.overshoot == "keep":
                self.state.score = score
                return applied
            revert_plan(self.network, applied)
            self._give_up_latest(_named(groups), score)

    def _within(self, score: float) -> bool:
        return self.state.baseline_score - score <= self.config.tolerance + _ROUNDING_POINTS

    def _reject(self, group: Group, entry: GroupState, tried: int) -> None:
        if self.config.overshoot == "keep":
            entry.locked = "the tolerance is exceeded; overshoot='keep' keeps the last step"
            return
        entry.step /= 2
        # Without training in between the same units would fail again: halve until the step differs.
        while not self.retrains and entry.step >= self.config.min_step:
            if _units_after_step(group, group.units, entry, self.config) != tried:
                break
            entry.step /= 2
        if entry.step < self.config.min_step:
            entry.locked = "no smaller step is within the tolerance"

    def _cut_bare(self, name: str, after: int) -> None:
        bare_groups = adapter_for(self._bare).groups(self._bare)
        units = _named(bare_groups)[name].units
        apply_plan(self._bare, PruningPlan.removing(bare_groups, {name: range(after, units)}), groups=bare_groups)
        self._count()

    def _report(self, group: Group, after: int, score: float, accepted: bool) -> None:
        step = Step(
            round=self.state.rounds,
            group=group.name,
            kind=group.kind,
            units_before=group.units,
            units_after=after,
            score=score,
            accepted=accepted,
            parameters=self.parameters,
            macs=self.macs,
        )
        self.steps.append(step)
        if self.progress is not None:
            self.progress(step)

    def _give_up_latest(self, groups: Mapping[str, Group], score: float) -> None:
        name = next(reversed(self.removed))
        group, gone = groups[name], self.removed.pop(name)
        after = group.units - len(gone)
        self._bare = skeleton(self.network)
        for kept_name, kept_gone in self.removed.items():
            self._cut_bare(kept_name, groups[kept_name].units - len(kept_gone))
        self._count()
        self._reject(group, self.state.groups[name], after)
        self._report(group, after, score, accepted=False)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """`network.eval()` for a while; after it every module is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def prunable_groups(network: nn.Module, config: RoundRobinConfig) -> list[Group]:
    """The groups of `network` of the kinds in `config`; ValueError when a kind matches none."""
    groups: list[Group] = adapter_for(network).groups(network)
    kinds = sorted({g.kind for g in groups})
    for kind in config.kinds:
        if kind not in kinds:
            raise ValueError(
                f"kinds={config.kinds}: {type(network).__name__} has no group of kind {kind!r}, only {', '.join(kinds)}"
            )
    return [g for g in groups if g.kind in config.kinds]


def _named(groups: Sequence[Group]) -> dict[str, Group]:
    return {group.name: group for group in groups}


def _checked_score(value: object, what: str) -> float:
    score = float(value)  # type: ignore[arg-type]  # a zero-dimensional tensor is welcome
    if not 0 <= score <= 100:
        raise ValueError(
            f"the score of {what} is {score}; an accuracy in points, 0 to 100, is expected "
            "(NaN: look for NaN weights or an empty hold-out). The network was left as it was."
        )
    return score


def _check_same_groups(state: SearchState, groups: Sequence[Group]) -> None:
    names = {g.name for g in groups}
    if names != set(state.groups):
        different = sorted(names ^ set(state.groups))[:4]
        raise ValueError(
            f"the search was begun on another network or with other kinds; groups that differ: {different}"
        )


def _in_order(network: nn.Module, groups: Sequence[Group], config: RoundRobinConfig) -> list[Group]:
    if config.order == "fixed":
        return list(groups)
    return sorted(groups, key=lambda group: -group_parameters(network, group))


def group_parameters(network: nn.Module, group: Group) -> int:
    """How many parameter elements the units of `group` own."""
    shapes = {name: p.shape for name, p in network.named_parameters()}
    parts = [(shapes[s.tensor], s) for s in group.slices if s.tensor in shapes]
    return sum(math.prod(shape) // shape[s.axis] * s.width * len(s.offsets) * group.units for shape, s in parts)


def _units_after_step(group: Group, units: int, entry: GroupState, config: RoundRobinConfig) -> int | None:
    """The width after the next step, None when the group is as narrow as it may be."""
    granule = 1 if group.kind == "heads" else config.round_to
    least = math.ceil(entry.initial_units * (1 - config.max_sparsity) / granule - 1e-9) * granule
    least = max(least, group.min_units, granule)
    if units <= least:
        return None
    removed = max(1, round(entry.step * entry.initial_units / granule)) * granule
    return max((units - removed) // granule * granule, least)


def _lock_finished(
    state: SearchState, groups: Sequence[Group], units: Mapping[str, int], config: RoundRobinConfig
) -> None:
    for group in groups:
        entry = state.groups[group.name]
        if entry.locked is None and _units_after_step(group, units.get(group.name, group.units), entry, config) is None:
            entry.locked = "as narrow as max_sparsity, round_to and the last head allow"


def _why_stopped(state: SearchState, config: RoundRobinConfig, trial: _Round) -> str | None:
    missed = ""
    if config.target is not None:
        if trial.target_met():
            return f"target reached: {trial.removed_part():.1%} of the {config.target_of} removed"
        removed = f"{trial.removed_part():.1%} of the {config.target_of} removed"
        missed = f"; {removed}, the target of {config.target:.1%} is not met"
    if all(entry.locked is not None for entry in state.groups.values()):
        return "every group is locked" + missed
    if config.max_rounds is not None and state.rounds >= config.max_rounds:
        return f"max_rounds={config.max_rounds} is reached" + missed
    return None
