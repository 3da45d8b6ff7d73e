"""The candidates of PrimeSVT: what each saves, and what it scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swincompress_pl.pruning.criteria import Gradients, needs_gradients
from swincompress_pl.pruning.evaluation.divergence import Divergence, first_images
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, from_rank_zero, rank
from swincompress_pl.pruning.evaluation.scorer import Evaluator, Verdict
from swincompress_pl.pruning.prime.batchnorm import StatisticsCorrection, batchnorm_state, restore_batchnorm
from swincompress_pl.pruning.prime.config import AllocatedPolicy, PrimeSVTConfig
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache, Widths
from swincompress_pl.pruning.prime.fingerprint import fingerprint, fingerprint_of_0_1, images_digest
from swincompress_pl.pruning.prime.result import Candidate
from swincompress_pl.pruning.space import Removal, Target, compensator_for, local_space
from swincompress_pl.pruning.structure.change import Change
from swincompress_pl.pruning.structure.cost import count_parameters
from swincompress_pl.pruning.structure.weight_masks import masked_parameters


class Candidates:
    """Makes candidates of a network, which is changed only inside a context or a call.

    Args:
        network: The network.
        evaluator: Scores candidates.
        config: The settings of the search.
        floor: The least accuracy in points.
        calibration: Batches (images, ...) for compensation and corrected statistics, if the config asks for them.
        gradients: Collects gradients, for the criteria that need them.
        cache_path: File that keeps every verdict; None for none.

    Attributes:
        compensation_s: Seconds that the matrices took which compensation and "second_order" need.
    """

    def __init__(
        self,
        network: nn.Module,
        evaluator: Evaluator,
        config: PrimeSVTConfig,
        *,
        floor: float,
        calibration: Iterable[Any] | None,
        gradients: Callable[[nn.Module], Gradients] | None,
        cache_path: Path | None,
    ) -> None:
        _check_sources(config, calibration, gradients)
        if isinstance(calibration, Iterator):
            calibration = list(calibration)  # it is read more than once
        if config.granularity == "filter" and masked_parameters(network):
            raise ValueError(
                f"granularity='filter': {type(network).__name__} has masked weights already; begin with a network "
                "without masks"
            )
        self.network, self.config = network, config
        self._evaluator, self._floor = evaluator, floor
        space = config.space(network)
        compensator = compensator_for(space, calibration, intercepts=config.batchnorm != "correct")
        self._space = local_space(space, compensator=compensator)
        began = time.monotonic()
        self._space.prepare(network)
        self.compensation_s = 0.0 if compensator is None else time.monotonic() - began
        self._divergence: Divergence | None = None
        self._curve_images: Sequence[Tensor] = ()
        if _measures_divergence(config):
            assert calibration is not None
            assert isinstance(config.policy, AllocatedPolicy)
            self._curve_images = first_images(calibration, config.policy.curve_images)
            self._divergence = Divergence(network, self._curve_images)
        self.targets = {target.name: target for target in self._space.targets(network)}
        statistics = gradients(network) if gradients is not None and needs_gradients(config.criterion) else None
        # All of the unpruned network, so that a smaller cut is part of a larger one.
        self._scores = {
            name: from_rank_zero(self._space.scores(network, target, statistics))
            for name, target in self.targets.items()
        }
        self.correction = StatisticsCorrection(network, calibration if config.batchnorm == "correct" else None)
        # Curves need no more than the images that they are measured on, and there are many of them.
        self._rough = self.correction
        if self.correction.is_active and self._curve_images:
            self._rough = StatisticsCorrection(network, self._curve_images)
        self._costs, self._parameters = self._space.costs(network, None), count_parameters(network)
        self._cache = EvaluationCache()
        if cache_path is not None:
            images = calibration if self.correction.is_active or config.compensation != "none" else None
            ranks = from_all_ranks([evaluator.fingerprint, images_digest(images)])
            if rank() == 0:
                self._open(cache_path, ranks)
        self._standing: dict[str, int] | None = None  # the widths that candidates are compared with
        self._last: dict[str, int] | None = None  # the widths judged last

    def _open(self, path: Path, ranks: list[list[object]]) -> None:
        about: dict[str, Any] = {"targets": self.targets, "scores": self._scores}
        self._cache = EvaluationCache(
            path,
            fingerprint(self.network, self.config, **about, ranks=ranks, floor=self._floor),
            earlier=fingerprint_of_0_1(self.network, self.config, **about, evaluator=self._evaluator),
            units={name: target.units for name, target in self.targets.items()},
        )

    def widths(self, rates: Mapping[str, float]) -> dict[str, int]:
        """The widths at rates {target: part of its units to remove}, as near to them as `round_to` allows."""
        widths = {}
        for name, rate in rates.items():
            target = self.targets[name]
            width = _width(target, rate, self.config.max_sparsity)
            if width < target.units:
                widths[name] = width
        return widths

    def saving(self, widths: Widths) -> float:
        """The part of all parameters that is removed or masked."""
        kept = {name: self._space.kept(self.targets[name], width) for name, width in widths.items()}
        return (self._parameters - self._costs.parameters(kept)) / self._parameters

    def judge(
        self,
        widths: dict[str, int],
        base: dict[str, int],
        *,
        phase: str,
        label: str,
        resolution_points: float | None = None,
    ) -> Candidate:
        """Decides whether the network at these widths meets the accuracy constraint.

        The candidate is compared with the network at the widths `base`, which are nowhere narrower.
        `resolution_points` is the largest standard error of an accepted candidate's score; None for any.
        """
        known = from_rank_zero(self._cache.get(widths))
        finest = math.inf if resolution_points is None else resolution_points
        fresh = known is None or (known.accepted and known.error_points > finest)
        if fresh:
            known = self._evaluate(widths, base, resolution_points)
            self._cache.put(widths, known)
        assert known is not None
        return Candidate(
            phase=phase, label=label, widths=widths, saving=self.saving(widths), **asdict(known), remembered=not fresh
        )

    def _evaluate(self, widths: dict[str, int], base: dict[str, int], resolution: float | None) -> Verdict:
        if self._standing != base:
            with self.masked(base):
                if base:
                    self._evaluator.network_changed()
                self._evaluator.compare_with(self.network)
            if base:
                self._evaluator.network_changed()
            self._standing = dict(base)
        with self.masked(widths):
            verdict = self._evaluator.is_at_least(
                self._floor, self.network, self._changed(widths, base), resolution_points=resolution
            )
        self._last = dict(widths)
        return verdict

    def accept(self, widths: dict[str, int], base: dict[str, int]) -> None:
        """Says that later candidates have `widths` as their base; reuses the answers if they were judged last."""
        if self._standing == base and self._last == widths:
            self._evaluator.keep(self._changed(widths, base))
            self._standing = dict(widths)

    def _changed(self, widths: Widths, base: Widths) -> list[str]:
        """The tensors in which two candidates differ; empty for anywhere, as with corrected statistics."""
        if self.correction.is_active:
            return []
        changed = [name for name in widths if widths[name] != base.get(name)]
        return list(dict.fromkeys(tensor for name in changed for tensor in self.targets[name].tensors))

    def divergence(self, widths: Widths) -> float:
        """How far the answers of the network at these widths are from the unpruned one's; see `Divergence`."""
        assert self._divergence is not None
        with self.masked(widths, self._rough):
            found = self._divergence.now(self._changed(widths, {}))
        if found is None:
            raise ValueError(
                f"curves='divergence': {type(self.network).__name__} does not give one tensor of logits; take "
                "curves='accuracy'"
            )
        return found

    @contextmanager
    def masked(self, widths: Widths, correction: StatisticsCorrection | None = None) -> Iterator[None]:
        """Inside the context, the network computes as if narrowed, with corrected statistics if the config says so."""
        with self._space.masked(self.network, self._removal(widths)):
            before = batchnorm_state(self.network)
            try:
                if widths:
                    (correction or self.correction).correct()
                yield
            finally:
                restore_batchnorm(self.network, before)

    def commit(self, widths: Widths) -> Change:
        """Narrows the network for good: slices it, or registers masks."""
        self._standing = self._last = None
        self._evaluator.network_changed()
        removal = self._removal(widths)
        with self._space.masked(self.network, removal):
            self.correction.correct()
        return self._space.commit(self.network, removal)

    def _removal(self, widths: Widths) -> Removal:
        removal: dict[str, Any] = {}
        for name, width in widths.items():
            target = self.targets[name]
            removal.update(self._space.refined(target, self._space.lowest(self._scores[name], target, width)))
        return removal


def _width(target: Target, rate: float, max_sparsity: float) -> int:
    """The width nearest to the wanted one: all units, or a multiple of the granule, but not below the least."""
    wanted = target.units * (1 - rate)
    least = min(target.least_units(max_sparsity), target.units)
    below = _floor_multiple(wanted, target.granule)
    above = min(below + target.granule, target.units)
    nearest = above if above - wanted <= wanted - below else below
    return max(nearest, least)


def _floor_multiple(value: float, granule: int) -> int:
    """The largest multiple of `granule` that is not above `value`."""
    return int((value + 1e-9) // granule) * granule


def _measures_divergence(config: PrimeSVTConfig) -> bool:
    return isinstance(config.policy, AllocatedPolicy) and config.policy.curves == "divergence"


def _check_sources(
    config: PrimeSVTConfig, calibration: Iterable[Any] | None, gradients: Callable[[nn.Module], Gradients] | None
) -> None:
    if config.batchnorm == "correct" and calibration is None:
        raise ValueError("batchnorm='correct' needs calibration=: batches of training images, e.g. a list of a few")
    if _measures_divergence(config) and calibration is None:
        raise ValueError("curves='divergence' needs calibration=: batches of training images, e.g. a list of a few")
    if config.batchnorm == "correct" and isinstance(calibration, Iterator):
        raise ValueError("calibration is an iterator, which ends after the first candidate; give a list or a loader")
    if needs_gradients(config.criterion) and gradients is None:
        raise ValueError(
            f"criterion={config.criterion!r} needs gradients: give gradients=lambda network: "
            "collect_gradients(network, batches)"
        )
