"""Adaptive iterative pruning: round-robin over groups or layers, a step each, kept only where the accuracy allows it.

After Cai & Liu (DOI 10.13700/j.bh.1001-5965.2024.0222). A round tries one step on every active target in turn: what
has the lowest scores is masked and the network is scored; within the tolerance of the baseline it stays masked,
otherwise it comes back and the target's step is halved. At the end of a round everything accepted is made to last and
the whole hold-out is scored; should that be beyond the tolerance, the latest steps are given up until it is within.

Nothing here knows Lightning: `prune` is the whole loop, `run_round` one round of it for those who train in between.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

from torch import nn

from swincompress_pl.pruning.adaptive.config import RoundRobinConfig
from swincompress_pl.pruning.adaptive.rounds import (
    Follower,
    Progress,
    Round,
    check_same_targets,
    in_order,
    lock_finished,
    widen_tolerance,
)
from swincompress_pl.pruning.adaptive.state import SearchState, Step, TargetState
from swincompress_pl.pruning.cost_tracker import Ledger
from swincompress_pl.pruning.criteria import Gradients, needs_gradients
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.evaluation.scorer import FunctionScorer, Scorer, evaluation_mode
from swincompress_pl.pruning.space import (
    Change,
    Granularity,
    StructuredGranularity,
    granularity_for,
    nothing_applied,
    plan_of_masks,
    revert,
)
from swincompress_pl.pruning.structure.apply import AppliedPlan, apply_plan
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, remove_masks

Evaluate = Callable[[nn.Module], float]
"""The accuracy of a network on a hold-out in points, 0 to 100; it must leave the weights alone."""

SENSITIVITY_LEVELS = (0.125, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """One finished round: what was changed, the steps tried, and the state for the next round.

    scored: the network as the round left it is the one that the scorer last scored in full.
    """

    change: Change
    steps: tuple[Step, ...]
    state: SearchState
    scored: bool

    @property
    def applied(self) -> AppliedPlan:
        """What was sliced, for `slice_optimizer`."""
        return self.change.applied


@dataclass(frozen=True, kw_only=True)
class PruningResult:
    """A finished search.

    plan: what was sliced, from the original network to the final one; empty for masks.
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
    evaluate: Evaluate | Scorer,
    config: RoundRobinConfig | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    recover: Callable[[nn.Module, AppliedPlan], None] | None = None,
    gradients: Callable[[nn.Module], Gradients] | None = None,
    progress: Progress | None = None,
) -> PruningResult:
    """Prune `network` in place, round by round, until all is locked, a target is met, or rounds or time are used up.

    evaluate: a `HoldOut` (few images a decision), or a function (network) -> accuracy in points, 0 to 100, on a
        hold-out; called in eval mode with masks in place.
    input_shape: of one input with its batch axis, e.g. (1, 3, 224, 224); needed for a target in MACs.
    recover: (network, what was just cut) -> None, fine-tuning between rounds; use `slice_optimizer` on its optimizer,
        and `keep_masks` for granularities other than "structured".
    gradients: (network) -> Gradients, e.g. with `collect_gradients`; for the criteria that need them.
    progress: told of each tried step.
    Whatever is raised (by evaluate, by progress, an interrupt), the network is left as it was before; with `recover`,
    which trains, as it was before the round that failed.
    """
    config = config or RoundRobinConfig()
    scorer = as_scorer(evaluate)
    state = begin_search(network, scorer, config, input_shape=input_shape, gradients=gradients)
    changes: list[Change] = []
    plan = PruningPlan.identity()
    unchanged = True
    try:
        while state.stopped is None:
            outcome = run_round(
                network,
                scorer,
                config,
                state,
                input_shape=input_shape,
                gradients=gradients,
                retrains=recover is not None,
                unchanged=unchanged,
                progress=progress,
            )
            state, plan = outcome.state, plan.then(outcome.applied.plan)
            unchanged = outcome.scored and recover is None
            if recover is None:
                changes.append(outcome.change)
            elif state.stopped is None:
                recover(network, outcome.applied)
        plan = plan.then(finish_search(network, config).plan)
    except BaseException:
        for earlier in reversed(changes):
            revert(network, earlier)
        raise
    score = state.baseline_score if state.score is None else state.score
    return PruningResult(plan=plan, score=score, steps=tuple(state.steps), stopped=state.stopped, state=state)


def begin_search(
    network: nn.Module,
    evaluate: Evaluate | Scorer,
    config: RoundRobinConfig,
    *,
    input_shape: Sequence[int] | None = None,
    gradients: Callable[[nn.Module], Gradients] | None = None,
) -> SearchState:
    """Score the baseline, and each target's sensitivity if the order asks for it: the state before the first round."""
    started, scorer = time.monotonic(), as_scorer(evaluate)
    if config.target is not None and config.target_of == "macs" and input_shape is None:
        raise ValueError(f"target={config.target} of the MACs needs input_shape, e.g. input_shape=(1, 3, 224, 224)")
    spent_before = scorer.cost.to_dict()
    granularity = granularity_for(config, input_shape=input_shape)
    targets = granularity.targets(network)
    statistics = _statistics(network, config, gradients)
    ledger = Ledger(network, config, input_shape)
    with evaluation_mode(network):
        baseline = scorer.full(network)
        if 0 < baseline <= 1:
            warnings.warn(f"the baseline is {baseline:g} points of 100; does evaluate return a fraction?", stacklevel=2)
        curves = {}
        if config.order == "sensitivity" and config.ranking == "local":
            curves = measure_sensitivity(network, scorer, granularity, baseline - config.tolerance, statistics)
    state = SearchState(
        granularity=config.granularity,
        baseline_score=baseline,
        baseline_parameters=ledger.parameters,
        baseline_prunable=sum(t.weights for t in targets),
        baseline_bytes=ledger.size_bytes,
        baseline_macs=ledger.macs,
        tolerance=config.first_tolerance or config.tolerance,
        targets={
            t.name: TargetState(kind=t.kind, initial_units=t.units, units=t.units, step=config.step) for t in targets
        },
        initial_units={m.name: m.units for t in targets for m in (t.members or (t,))},
        sensitivity=curves,
        scoring=_spent({}, scorer.cost.to_dict(), spent_before),
    )
    lock_finished(state, targets, config)
    state.elapsed_s = time.monotonic() - started
    return state


def measure_sensitivity(
    network: nn.Module,
    scorer: Scorer,
    granularity: Granularity,
    floor: float,
    gradients: Gradients | None = None,
    levels: Sequence[float] = SENSITIVITY_LEVELS,
) -> dict[str, list[tuple[float, float]]]:
    """{target: [(part removed, accuracy in points), ...]} with each target narrowed alone.

    The scores are as exact as it takes to tell whether they are above `floor`. The network is left as it was.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    with evaluation_mode(network):
        reference = scorer.begin_round(network, unchanged=True)
        for target in granularity.targets(network):
            points = curves.setdefault(target.name, [(0.0, reference)])
            for level in levels:
                keep = max(round(target.units * (1 - level) / target.granule) * target.granule, target.min_units)
                if keep >= target.units or points[-1][0] >= 1 - keep / target.units:
                    continue
                removal = from_rank_zero(granularity.removal(network, target, keep, gradients))
                with granularity.masked(network, removal):
                    verdict = scorer.judge(network, floor, target.tensors)
                points.append((1 - keep / target.units, verdict.score))
    return curves


def run_round(
    network: nn.Module,
    evaluate: Evaluate | Scorer,
    config: RoundRobinConfig,
    state: SearchState,
    *,
    input_shape: Sequence[int] | None = None,
    gradients: Callable[[nn.Module], Gradients] | None = None,
    retrains: bool = True,
    unchanged: bool = False,
    progress: Progress | None = None,
    follower: Follower | None = None,
) -> RoundOutcome:
    """Try one step on every active target in turn, then make what was accepted last; `state` itself is not changed.

    retrains: the weights are trained between rounds, so a step that failed may be tried again in the next one.
    unchanged: the network is the one that `scorer` last scored in full, so it need not do so again.
    follower: told when what was accepted is cut, before it is scored, and when that is taken back.
    A network that training left below the tolerance is not tried at all: it trains on. On any exception the network is
    as it was.
    """
    state, scorer = copy.deepcopy(state), as_scorer(evaluate)
    granularity = granularity_for(config, state.initial_units, input_shape)
    targets = granularity.targets(network)
    check_same_targets(state, targets)
    statistics = _statistics(network, config, gradients)
    state.rounds += 1
    spent_before = scorer.cost.to_dict()
    trial = Round(network, scorer, config, state, granularity, statistics, input_shape, retrains, progress, follower)
    with evaluation_mode(network):
        if trial.begin(unchanged):
            with ExitStack() as masks:
                for target in in_order(targets, state, config):
                    if trial.target_met() or trial.out_of_time():
                        break
                    if state.targets[target.name].locked is None:
                        trial.try_step(target, masks)
        change = trial.commit_accepted()
    state.steps.extend(trial.steps)
    lock_finished(state, granularity.targets(network), config)
    widen_tolerance(state, granularity.targets(network), config)
    state.scoring = _spent(state.scoring, scorer.cost.to_dict(), spent_before)
    state.elapsed_s += trial.seconds()
    state.stopped = trial.why_stopped()
    return RoundOutcome(change=change, steps=tuple(trial.steps), state=state, scored=trial.scored)


def finish_search(network: nn.Module, config: RoundRobinConfig) -> AppliedPlan:
    """With `shrink="end"`: slice away what the masks have taken, and the masks of those weights with it."""
    if config.shrink != "end":
        return nothing_applied()
    groups = StructuredGranularity(config).groups(network)
    plan = plan_of_masks(network, groups)
    if not plan:
        return nothing_applied()
    readers = {s.tensor for g in groups for s in g.consumers()} & masked_parameters(network).keys()
    remove_masks(network, sorted(readers))
    return apply_plan(network, plan)


def _spent(so_far: Mapping[str, float], now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {key: so_far.get(key, 0) + value - before[key] for key, value in now.items()}


def as_scorer(evaluate: Evaluate | Scorer) -> Scorer:
    """A scorer as it is, a function as one that scores everything each time."""
    return cast(Scorer, evaluate) if hasattr(evaluate, "judge") else FunctionScorer(evaluate)


def _statistics(
    network: nn.Module, config: RoundRobinConfig, gradients: Callable[[nn.Module], Gradients] | None
) -> Gradients | None:
    if not needs_gradients(config.criterion):
        return None
    if gradients is None:
        raise ValueError(
            f"criterion={config.criterion!r} needs gradients: give gradients=lambda network: "
            "collect_gradients(network, batches)"
        )
    return gradients(network)
