"""PrimeSVT's search: the baseline, a policy that tries candidates, and the choice among them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from swincompress_pl.pruning.criteria import Gradients
from swincompress_pl.pruning.evaluation.audit import Audit, Auditor
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks
from swincompress_pl.pruning.evaluation.scorer import ROUNDING_POINTS, Evaluator
from swincompress_pl.pruning.prime.allocation import allocate
from swincompress_pl.pruning.prime.batchnorm import batchnorm_state, restore_batchnorm
from swincompress_pl.pruning.prime.candidates import Candidates
from swincompress_pl.pruning.prime.config import PrimeSVTConfig, PrioritizedPolicy
from swincompress_pl.pruning.prime.memory import try_within_memory
from swincompress_pl.pruning.prime.prioritized import Prioritized
from swincompress_pl.pruning.prime.result import BlockState, Candidate, TargetSet
from swincompress_pl.pruning.prime.trials import PrimeProgress, Trials
from swincompress_pl.pruning.space import check_on_trial
from swincompress_pl.pruning.structure.change import Change, revert
from swincompress_pl.pruning.structure.trial import FirstInputs
from swincompress_pl.registry import SpikingAdapter, adapter_for


class Search:
    """One search: `run` tries candidates, and `apply` leaves the best in the network."""

    def __init__(
        self,
        network: nn.Module,
        evaluator: Evaluator,
        config: PrimeSVTConfig,
        *,
        auditor: Auditor | None,
        calibration: Iterable[Any] | None,
        gradients: Callable[[nn.Module], Gradients] | None,
        cache_path: Path | None,
        on_progress: Callable[[PrimeProgress], None] | None,
    ) -> None:
        self.network, self.evaluator, self.config = network, evaluator, config
        self.auditor = auditor
        self.audit: Audit | None = None  # of what is applied
        self._refused = 0  # by the audit
        self._spent_before = evaluator.spent()
        heard = FirstInputs()
        with heard.of(network):
            self.baseline, self.spike_rates = _baseline(network, evaluator)
        if auditor is not None:
            auditor.begin(network, config.tolerance)
        check_on_trial(network, config.space(network), heard, None)
        self.floor = self.baseline - config.tolerance - ROUNDING_POINTS
        self.candidates = Candidates(
            network,
            evaluator,
            config,
            floor=self.floor,
            calibration=calibration,
            gradients=gradients,
            cache_path=cache_path,
        )
        self._refuse_impossible()
        self.trials = Trials(self.candidates, baseline=self.baseline, on_progress=on_progress)
        self.target_sets: list[TargetSet] = []
        self.blocks: list[BlockState] = []
        self.initial_rate = 0.0
        self.applied: Candidate | None = None
        self.within_accuracy: Candidate | None = None
        self.within_memory: Candidate | None = None
        self.met = False
        self.change: Change | None = None

    def _refuse_impossible(self) -> None:
        """Raises ValueError if no candidate could save what is asked for."""
        config, targets = self.config, self.candidates.targets
        saving = self.candidates.saving(self.candidates.widths(dict.fromkeys(targets, config.max_sparsity)))
        if saving < config.min_memory_saving:
            raise ValueError(
                f"min_memory_saving={config.min_memory_saving} cannot be met: all {len(targets)} layers at "
                f"max_sparsity={config.max_sparsity} save {saving:.1%} of the parameters; widen kinds or layers, raise "
                "max_sparsity, or ask for less"
            )

    def run(self) -> None:
        """Lets the policy try candidates; what it tried is in `trials.found`."""
        if not isinstance(self.config.policy, PrioritizedPolicy):
            self.blocks = allocate(self.trials)
            return
        policy = Prioritized(self.trials, self.config.policy)
        policy.run()
        self.blocks, self.target_sets, self.initial_rate = policy.blocks, policy.target_sets, policy.initial_rate

    def apply(self) -> None:
        """Applies the best candidate within the constraint on all images; sets `met` and the alternatives."""
        self.within_accuracy = self._apply_within_accuracy()
        self._apply_preferred()
        if self.auditor is not None:
            if self.audit is None or self.applied is not self.within_accuracy:
                self.audit = self._look(self.baseline if self.applied is None else self.applied.score)
            assert self.audit is not None
            self.auditor.warn_if_coarse(self.audit, [])

    def _apply_preferred(self) -> None:
        """Applies, if `within_accuracy` does not save enough, what the config prefers then."""
        saving = 0.0 if self.within_accuracy is None else self.within_accuracy.saving
        self.met = self.within_accuracy is not None and saving >= self.config.min_memory_saving
        self.applied = self.within_accuracy
        if self.met:
            self.within_memory = self.within_accuracy
            return
        self.undo()
        self.within_memory = self._score_within_memory()
        self.applied = self.within_accuracy if self.config.prefer == "accuracy" else self.within_memory
        if self.applied is not None:
            self._commit(self.applied)

    def _apply_within_accuracy(self) -> Candidate | None:
        """Applies the first candidate within the constraint on all images, the largest saving first."""
        for candidate in self._distinct(lambda each: each.accepted, lambda each: (-each.saving, -each.score)):
            exact = self._scored(candidate)
            if exact.accepted and self._holds_on_audit(exact.score):
                return exact
            self.undo()
        return None

    def _holds_on_audit(self, score: float) -> bool:
        """Whether the applied candidate, with this score on the deciding part, is within the tolerance on the audit."""
        audit = self._look(score)
        if audit is not None and not audit.holds:
            self._refused += 1
            return False
        self.audit = audit
        return True

    def _look(self, score: float) -> Audit | None:
        if self.auditor is None:
            return None
        held = [] if self.audit is None else [self.audit]  # a look before, at another candidate
        found = self.auditor.look(
            self.network,
            held,
            round=1,
            tolerance=self.config.tolerance,
            deciding_lost_points=self.baseline - score,
            given_back=0 if held else self._refused,
        )
        return replace(found, given_back=self._refused)

    def _score_within_memory(self) -> Candidate | None:
        """The best accuracy of those that save enough, scored on all images; nothing stays applied."""
        least = self.config.min_memory_saving
        found = self._distinct(lambda each: each.saving >= least, lambda each: (-each.score, -each.saving))[:1]
        exact = [self._scored_and_undone(each) for each in found or try_within_memory(self.trials, self.blocks)]
        return max(exact, key=lambda each: (each.score, each.saving), default=None)

    def _scored_and_undone(self, candidate: Candidate) -> Candidate:
        exact = self._scored(candidate)
        self.undo()
        return exact

    def _distinct(
        self, wanted: Callable[[Candidate], bool], order: Callable[[Candidate], tuple[float, float]]
    ) -> list[Candidate]:
        plans = {tuple(sorted(each.widths.items())): each for each in self.trials.found if each.widths and wanted(each)}
        return sorted(plans.values(), key=order)

    def _scored(self, candidate: Candidate) -> Candidate:
        """Applies a candidate, and returns it with its score on the whole hold-out."""
        self._commit(candidate)
        score = self.evaluator.score(self.network)
        return replace(
            candidate,
            score=score,
            accepted=score >= self.floor,
            images=self.evaluator.images,
            exact=True,
            error_points=0.0,
            remembered=False,
        )

    def _commit(self, candidate: Candidate) -> None:
        self._batchnorm = batchnorm_state(self.network)
        self.change = self.candidates.commit(candidate.widths)

    def undo(self) -> None:
        """Undoes what was applied, if anything was."""
        if self.change is not None:
            revert(self.network, self.change)
            restore_batchnorm(self.network, self._batchnorm)
            self.change = None

    def scoring(self) -> dict[str, float]:
        """What the search cost; see `PrimeSVTResult`."""
        spent = self.evaluator.spent_since(self._spent_before)
        if self.auditor is not None:
            spent = {key: value + spent[key] for key, value in self.auditor.spent().items()}
        distinct = {tuple(sorted(each.widths.items())): each.stands_for for each in self.trials.found}
        images = self.evaluator.images
        tried = sum(each.stands_for for each in self.trials.found) + 2  # the baseline and the final score
        return spent | {
            "candidates": len(self.trials.found),
            "plans": len(distinct),
            "evaluations": self.trials.num_evaluations,
            "remembered": len(self.trials.found) - self.trials.num_evaluations,
            "batchnorm_passes": self.candidates.correction.passes,
            "compensation_s": self.candidates.compensation_s,
            "holdout_images": images,
            "naive_image_forwards": tried * images,
            "naive_image_forwards_distinct": (sum(distinct.values()) + 2) * images,
        }


def _baseline(network: nn.Module, evaluator: Evaluator) -> tuple[float, dict[str, float]]:
    """Scores the unpruned network and counts its spikes; a ValueError if it does not spike."""
    adapter = adapter_for(network)
    if not isinstance(adapter, SpikingAdapter):
        raise ValueError(
            f"{type(network).__name__}: a {adapter.family} is not a spiking network; PrimeSVT prunes spiking ones, "
            "`prune` and AdaptiveIterativePruning any"
        )
    adapter.check_spiking(network)
    with adapter.watching_spikes(network) as rates:
        baseline = evaluator.score(network)
    rates = _over_ranks(rates)
    if 0 < baseline <= 1:
        warnings.warn(f"the baseline is {baseline:g} points of 100; does evaluate return a fraction?", stacklevel=7)
    if not rates:
        raise ValueError(
            f"evaluate gave {baseline:g} points without a pass through the network; it has to score the one it is given"
        )
    stem = adapter.segments(network)[0]
    silent = [name for name, rate in rates.items() if not rate]
    if not any(rate for name, rate in rates.items() if not name.startswith(f"{stem}.")):
        raise ValueError(
            f"{type(network).__name__}: none of its neurons behind {stem} spikes on the hold-out, so the logits say "
            "nothing about the images; train the network, or give it its trained BatchNorm statistics"
        )
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(rates)} neurons never spike on the hold-out ({', '.join(silent[:3])}"
            f"{', ...' if silent[3:] else ''}); is the network trained? What leads only to them costs nothing to prune",
            stacklevel=7,
        )
    return baseline, rates


def _over_ranks(rates: dict[str, float]) -> dict[str, float]:
    """The mean over the ranks that had images; their shards differ by at most one image."""
    shards = [shard for shard in from_all_ranks(rates) if shard]
    return {name: math.fsum(shard[name] for shard in shards) / len(shards) for name in (shards[0] if shards else {})}
