"""Adaptive iterative pruning: one step per group or layer in turn, kept only if the accuracy allows it.

After Cai & Liu (DOI 10.13700/j.bh.1001-5965.2024.0222). A round tries one step on every active target in turn. It masks
what has the lowest scores, and scores the network. Within the tolerance of the baseline, the step stays masked;
otherwise it is undone and the target's step is halved. At the end of a round, everything accepted is removed for good,
and the whole hold-out is scored. If that score is below the tolerance, the latest steps are given up until it is not.
An audit (`evaluation/audit.py`) scores images of its own then, and has steps given back in the same way.

Nothing here knows Lightning. `prune` is the whole loop, and a `SearchSession` runs single rounds with training between.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from swincompress_pl.evaluation_mode import evaluation_mode, outside_inference_mode, replace_inference_tensors
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.progress import told_progress
from swincompress_pl.pruning.adaptive.config import AdaptivePruningConfig
from swincompress_pl.pruning.adaptive.rounds import (
    CoupledState,
    Round,
    Setup,
    check_same_targets,
    lock_finished,
    widen_tolerance,
)
from swincompress_pl.pruning.adaptive.state import SearchState, Step, TargetState
from swincompress_pl.pruning.criteria import Gradients, needs_gradients
from swincompress_pl.pruning.evaluation.audit import split_for_audit
from swincompress_pl.pruning.evaluation.ranks import failing_together
from swincompress_pl.pruning.evaluation.scorer import Evaluate, Evaluator, Scorer, as_evaluator
from swincompress_pl.pruning.space import SearchSpace, StructuredSpace, check_on_trial, compensator_for, search_space
from swincompress_pl.pruning.structure.apply import AppliedPlan, apply_plan
from swincompress_pl.pruning.structure.change import Change, nothing_applied, plan_of_masks
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.trial import FirstInputs
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, remove_masks
from swincompress_pl.summaries import Summarized

SENSITIVITY_LEVELS = (0.125, 0.25, 0.5)
CollectGradients = Callable[[nn.Module], Gradients]


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """One finished round.

    Attributes:
        change: What was changed in the network.
        steps: The steps that were tried.
        state: The state for the next round.
    """

    change: Change
    steps: tuple[Step, ...] = field(repr=False)
    state: SearchState

    @property
    def applied(self) -> AppliedPlan:
        """What was sliced, for `slice_optimizer`; empty if only masks were set."""
        return self.change.applied


@dataclass(frozen=True, kw_only=True)
class PruningResult(Summarized):
    """A finished search. `str(result)` is its summary, and a notebook shows a table.

    Attributes:
        plan: The units that stay, from the original network to the final one; empty for masks of weights.
        score: Accuracy of the network that the last round left, in points on the hold-out that decided.
        steps: Every tried step in order.
        stopped: Why the search ended, and whether its target was met.
        state: The state after the last round, with the costs of the network before, and of scoring.
    """

    plan: PruningPlan
    score: float
    steps: tuple[Step, ...] = field(repr=False)
    stopped: str
    state: SearchState = field(repr=False)

    def facts(self) -> list[tuple[str, str]]:
        """Returns what the search removed, at which score, and why it ended."""
        return self.state.facts()

    @property
    def baseline_score(self) -> float:
        """The accuracy before pruning, in points on the hold-out."""
        return self.state.baseline_score


class SearchSession:
    """A search on a network, round by round.

        session = SearchSession(network, holdout, config, input_shape=(1, 3, 224, 224))
        while session.state.stopped is None:
            outcome = session.round()
            ...  # train; slice_optimizer(optimizer, outcome.applied) comes first
        session.finish()

    Args:
        network: The network; rounds change it in place.
        evaluate: As for `prune`.
        config: What the search prunes, how far and in which steps.
        input_shape: As for `prune`.
        gradients: As for `prune`.
        calibration: As for `prune`.
        state: The state of a search to continue. None begins a new search: it scores the baseline and, if the order
            asks for it, measures the sensitivity of each target.

    Attributes:
        state: Where the search stands; `state.stopped` is None until it is over.

    Raises:
        ValueError: If the config needs an `input_shape`, `gradients` or `calibration`, nothing matches its kinds or
            layers, the network cannot be cut as its groups say, the calibration images give NaN, the score is not an
            accuracy in points, `config.audit` is above 0 and what scores cannot be split, or the state is of another
            hold-out, score or audit.
        UnsupportedNetworkError: If the network has no adapter, or its adapter does not cover this variant.
        RankFailedError: If another process of a distributed run failed.
    """

    @outside_inference_mode()
    @failing_together("beginning the search")
    def __init__(
        self,
        network: nn.Module,
        evaluate: Evaluate | Scorer | Evaluator,
        config: AdaptivePruningConfig,
        *,
        input_shape: Sequence[int] | None = None,
        gradients: CollectGradients | None = None,
        calibration: Iterable[Any] | None = None,
        state: SearchState | None = None,
    ) -> None:
        if config.target is not None and config.target_of == "macs" and input_shape is None:
            raise ValueError(f"target={config.target} of the MACs needs input_shape, e.g. input_shape=(1, 3, 224, 224)")
        if needs_gradients(config.criterion) and gradients is None:
            raise ValueError(
                f"criterion={config.criterion!r} needs gradients: give gradients=lambda network: "
                "collect_gradients(network, batches)"
            )
        self._compensator = compensator_for(config, calibration)
        replace_inference_tensors(network)
        self.network, self.config = network, config
        self.evaluator, self.auditor = split_for_audit(evaluate, config.audit)
        self._input_shape, self._collect = input_shape, gradients
        self._gradients: Gradients | None = None  # of the present network, if they were needed
        if state is None:
            with all_or_nothing(written=[network]):
                state = self._begun()
        else:
            self._take_up(state)
        self.state = state

    @outside_inference_mode()
    @failing_together("pruning")
    def round(
        self,
        *,
        retrains: bool = True,
        on_step: Callable[[Step], None] | None = None,
        coupled: CoupledState | None = None,
    ) -> RoundOutcome:
        """Tries one step on every active target in turn, then removes for good what was accepted.

        If training left the network below the tolerance, nothing is tried, so that it can train on. On any exception
        the network, what is coupled to it, and the state are as before the round.

        Args:
            retrains: Whether the weights are trained between rounds. If so, a step that failed may be tried again.
            on_step: Called with each tried step.
            coupled: Something to cut together with the network. Its `cut` is called before the cut network is scored,
                and its `uncut` if the cut is undone.

        Returns:
            What the round changed, its steps, and the state after it.

        Raises:
            ValueError: If the network, or what the config makes its targets, is not what the state is about, or the
                score is not an accuracy in points.
            RankFailedError: If another process of a distributed run failed.
        """
        together = [] if coupled is None else [coupled]
        try:
            with all_or_nothing(self, *together, written=[self.network]):
                return self._round(retrains, on_step, coupled)
        except BaseException:
            self.evaluator.network_changed()  # what it scored last is gone
            raise

    def _round(
        self, retrains: bool, on_step: Callable[[Step], None] | None, coupled: CoupledState | None
    ) -> RoundOutcome:
        state = copy.deepcopy(self.state)
        space = search_space(self.config, state.initial_units, self._input_shape, self._compensator)
        space.prepare(self.network)
        targets = space.targets(self.network)
        check_same_targets(state, targets)
        lock_finished(state, targets, self.config)  # max_sparsity may have changed since the last round
        setup = Setup(
            network=self.network,
            evaluator=self.evaluator,
            config=self.config,
            space=space,
            input_shape=self._input_shape,
            gradients=self._statistics(),
            retrains=retrains,
            on_step=on_step,
            coupled=coupled,
            auditor=self.auditor,
        )
        state.rounds += 1
        spent_before = self._spent()
        work = Round(setup, state)
        with evaluation_mode(self.network):
            change = work.run(targets)
        self._gradients = None if work.accepted or retrains else self._gradients
        state.steps.extend(work.steps)
        left = space.targets(self.network)
        lock_finished(state, left, self.config)
        widen_tolerance(state, left, self.config)
        state.scoring = _sum(state.scoring, self._spent(spent_before))
        state.elapsed_s += work.seconds()
        state.stopped = work.why_stopped()
        self.state = state
        return RoundOutcome(change=change, steps=tuple(work.steps), state=state)

    def network_changed(self) -> None:
        """Forgets scores and gradients of the network; call it after training."""
        self._gradients = None
        if self._compensator is not None:
            self._compensator.forget()
        self.evaluator.network_changed()

    @outside_inference_mode()
    def finish(self) -> AppliedPlan:
        """Slices away, with `shrink="end"`, the units that are masked, and removes their masks.

        Returns:
            What was sliced, for `slice_optimizer`; empty with `shrink="round"` and for masks of weights.
        """
        return finish_search(self.network, self.config)

    def _begun(self) -> SearchState:
        started, config = time.monotonic(), self.config
        spent_before = self._spent()
        space = search_space(config, None, self._input_shape, self._compensator)
        space.prepare(self.network)
        targets = space.targets(self.network)
        cost = space.costs(self.network, self._input_shape).after({})
        with evaluation_mode(self.network):
            heard = FirstInputs()
            with heard.of(self.network):
                baseline = self.evaluator.score(self.network)
            check_on_trial(self.network, config, heard, self._input_shape)
            if 0 < baseline <= 1:
                warnings.warn(
                    f"the baseline is {baseline:g} points of 100; does evaluate return a fraction?", stacklevel=7
                )
            curves = {}
            if config.order == "sensitivity" and config.ranking == "local":
                floor = baseline - config.tolerance
                curves = measure_sensitivity(self.network, self.evaluator, space, floor, self._statistics())
        state = SearchState(
            granularity=config.granularity,
            baseline_score=baseline,
            baseline_parameters=cost.parameters,
            baseline_prunable=sum(t.weights for t in targets),
            baseline_bytes=cost.size_bytes,
            baseline_macs=cost.macs,
            tolerance=config.first_tolerance or config.tolerance,
            targets={
                t.name: TargetState(kind=t.kind, initial_units=t.units, units=t.units, step=config.step)
                for t in targets
            },
            initial_units={m.name: m.units for t in targets for m in (t.members or (t,))},
            sensitivity=curves,
            score_kind=self.evaluator.score_kind,
        )
        if self.auditor is not None:
            state.audit_before = self.auditor.begin(self.network, state.tolerance)
        state.first_answers = self.evaluator.first_answers()
        state.scoring = self._spent(spent_before)
        lock_finished(state, targets, config)
        state.elapsed_s = time.monotonic() - started
        return state

    def _take_up(self, state: SearchState) -> None:
        """Takes up what the unpruned network answered; a ValueError if the search was begun with another audit."""
        if bool(state.audit_before) != (self.auditor is not None):
            had = "with" if state.audit_before else "without"
            raise ValueError(f"audit={self.config.audit:g}: the search was begun {had} an audit; go on as it was begun")
        if state.score_kind != self.evaluator.score_kind:
            raise ValueError(
                f"score={self.evaluator.score_kind!r}: the search was begun with {state.score_kind!r}; go on with that"
            )
        self.evaluator.take_up_first(state.first_answers)
        if self.auditor is not None:
            self.auditor.resume(state.audit_before)

    def _spent(self, before: Mapping[str, float] | None = None) -> dict[str, float]:
        """What scoring and auditing have cost, since `before` if that is given."""
        spent = self.evaluator.spent()
        if self.auditor is not None:
            spent = _sum(spent, self.auditor.spent())
        return spent if before is None else {key: value - before[key] for key, value in spent.items()}

    def _statistics(self) -> Gradients | None:
        if self._gradients is None and self._collect is not None and needs_gradients(self.config.criterion):
            self._gradients = self._collect(self.network)
        return self._gradients


@outside_inference_mode()
def prune(
    network: nn.Module,
    evaluate: Evaluate | Scorer,
    config: AdaptivePruningConfig | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    recover: Callable[[nn.Module, AppliedPlan], None] | None = None,
    gradients: CollectGradients | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool | Callable[[Step], None] = False,
) -> PruningResult:
    """Prunes a network in place, standard or spiking, as far as its accuracy on a hold-out allows.

    The search (Cai & Liu, DOI 10.13700/j.bh.1001-5965.2024.0222) goes round by round. It ends when every target is
    locked, `config.target` is met, or the rounds or the time are used up.

    On any exception (of `evaluate`, of `progress`, or an interrupt) the network is left as it was before the search.
    With `recover`, which trains, it is left as it was before the round that failed.

    Args:
        network: The network; its family needs an adapter.
        evaluate: A `HoldOut`, which decides on few images, or a function (network) -> accuracy in points, 0 to 100, on
            a hold-out. The function is called in eval mode with masks in place, and must not change the weights.
        config: What to prune, how far and in which steps; None for the defaults.
        input_shape: Shape of one input with its batch axis, such as (1, 3, 224, 224). A target in MACs needs it;
            without it MACs are not counted.
        recover: (network, what was just cut) -> None, for fine-tuning between rounds. It is not called after the last
            round, so train the result once more. Use `slice_optimizer` on its optimizer, and `keep_masks` if masks are
            set (granularities other than "structured", and `shrink="end"`).
        gradients: (network) -> Gradients, made by `collect_gradients`; for the criteria that need them.
        calibration: Batches of unlabelled training images (N, ...), or (images, ...), for `compensation` and
            `criterion="second_order"`; a few hundred images.
        progress: True shows a bar in a terminal or a notebook, and elsewhere prints a line for each tried step. A
            function is called with the step.

    Returns:
        The plan, the scores, and every tried step.

    Raises:
        ValueError: If the config needs an `input_shape`, `gradients` or `calibration`, nothing matches its kinds or
            layers, the network cannot be cut as its groups say, the calibration images give NaN, a score is not an
            accuracy in points, or `config.audit` is above 0 and `evaluate` is a function.
        TypeError: If `evaluate` is neither a scorer nor a function.
        UnsupportedNetworkError: If the network has no adapter, or its adapter does not cover this variant.
        RankFailedError: If another process of a distributed run failed.
    """
    config = config or AdaptivePruningConfig()
    replace_inference_tensors(network)
    remembered = partial(all_or_nothing, written=[network])
    whole, each = (remembered, nullcontext) if recover is None else (nullcontext, remembered)
    plan = PruningPlan.identity()
    with whole():
        session = SearchSession(
            network, evaluate, config, input_shape=input_shape, gradients=gradients, calibration=calibration
        )
        with told_progress(progress, _place_in(session)) as on_step:
            while session.state.stopped is None:
                with each():
                    outcome = session._round(recover is not None, on_step, None)
                    if recover is not None and session.state.stopped is None:
                        recover(network, outcome.applied)
                        session.network_changed()
                plan = plan.then(outcome.applied.plan)
        plan = plan.then(session.finish().plan)
        state = session.state
        assert state.stopped is not None
        score = state.baseline_score if state.score is None else state.score
        return PruningResult(plan=plan, score=score, steps=tuple(state.steps), stopped=state.stopped, state=state)


def _place_in(session: SearchSession) -> Callable[[Step], tuple[str, int, int]]:
    """What is being done at a step, how many steps of its round are done, and the most that there can be."""
    steps: Counter[int] = Counter()

    def place(step: Step) -> tuple[str, int, int]:
        steps[step.round] += 1
        active = sum(entry.locked is None for entry in session.state.targets.values())  # as the round began
        return f"pruning round {step.round}", steps[step.round], active

    return place


def measure_sensitivity(
    network: nn.Module,
    evaluate: Evaluate | Scorer | Evaluator,
    space: SearchSpace,
    floor: float,
    gradients: Gradients | None = None,
    levels: Sequence[float] = SENSITIVITY_LEVELS,
) -> dict[str, list[tuple[float, float]]]:
    """Measures {target: [(part removed, accuracy in points), ...]} with each target narrowed alone.

    The scores are as exact as is needed to tell whether they are above `floor`. The network is left as it was.
    """
    evaluator = as_evaluator(evaluate)
    curves: dict[str, list[tuple[float, float]]] = {}
    with evaluation_mode(network):
        reference = evaluator.compare_with(network)
        for target in space.targets(network):
            points = curves.setdefault(target.name, [(0.0, reference)])
            gone = space.removals(network, target, gradients)
            for level in levels:
                keep = max(round(target.units * (1 - level) / target.granule) * target.granule, target.min_units)
                if keep >= target.units or points[-1][0] >= 1 - keep / target.units:
                    continue
                with space.masked(network, gone(keep)):
                    verdict = evaluator.is_at_least(floor, network, target.tensors)
                points.append((1 - keep / target.units, verdict.score))
    return curves


def finish_search(network: nn.Module, config: AdaptivePruningConfig) -> AppliedPlan:
    """Slices away, with `shrink="end"`, the units that are masked, and removes their masks."""
    if config.shrink != "end":
        return nothing_applied()
    groups = StructuredSpace(config).groups(network)
    plan = plan_of_masks(network, groups)
    if not plan:
        return nothing_applied()
    readers = {s.tensor for g in groups for s in g.consumers()} & masked_parameters(network).keys()
    with all_or_nothing(network):
        remove_masks(network, sorted(readers))
        return apply_plan(network, plan)


def _sum(so_far: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {key: so_far.get(key, 0) + value for key, value in more.items()}
