"""The phases of PrimeSVT's search: target set, robustness, policy, selection (see `primesvt.py`)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from swincompress_pl.pruning.criteria import Gradients
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks
from swincompress_pl.pruning.evaluation.scorer import ROUNDING_POINTS, Scorer
from swincompress_pl.pruning.prime.allocation import LEAST_DROP, allocate
from swincompress_pl.pruning.prime.candidates import Candidate, Candidates, batchnorm_state, restore_batchnorm
from swincompress_pl.pruning.prime.config import PrimeSVTConfig
from swincompress_pl.pruning.prime.result import BlockState, TargetSet
from swincompress_pl.pruning.space import Change, Target, revert
from swincompress_pl.registry import SpikingAdapter, adapter_for


@dataclass(frozen=True, kw_only=True)
class PrimeProgress:
    """How far a search is: `done` of at most `total` candidates of `phase`; left_s: the seconds that they may take at
    most, as far as those done so far tell; None before the first."""

    phase: str
    done: int
    total: int
    candidate: Candidate
    left_s: float | None


class Search:
    """One search at work."""

    def __init__(
        self,
        network: nn.Module,
        scorer: Scorer,
        config: PrimeSVTConfig,
        calibration: Iterable[Any] | None,
        gradients: Callable[[nn.Module], Gradients] | None,
        memo: Path | None,
    ) -> None:
        self.network, self.scorer, self.config = network, scorer, config
        self._spent_before = scorer.cost.to_dict()
        self.baseline, self.spike_rates = _baseline(network, scorer)
        self.floor = self.baseline - config.max_accuracy_drop - ROUNDING_POINTS
        self.candidates = Candidates(
            network,
            scorer,
            config,
            floor=self.floor,
            calibration=calibration,
            gradients=gradients,
            memo=memo,
        )
        self.progress: Callable[[PrimeProgress], None] | None = None
        self.applied: Candidate | None = None
        self.within_accuracy: Candidate | None = None
        self.within_memory: Candidate | None = None
        self.met = False
        self.change: Change | None = None
        self.found: list[Candidate] = []
        self.target_sets: list[TargetSet] = []
        self.blocks: list[BlockState] = []
        self.initial_rate = 0.0
        self._spent_s, self._policy_tries = 0.0, 0
        # where scores are compared with others, and not only with the floor
        self._resolution_points = {
            "target set": config.benefit_resolution_points,
            "robustness": config.robustness_resolution(),
        }

    def refuse_impossible(self) -> None:
        """ValueError where no candidate could save what is asked for."""
        config, most = self.config, self.candidates.widths(dict.fromkeys(self.candidates.targets, self.config.max_rate))
        saving = self.candidates.saving(most)
        if saving < config.min_memory_saving:
            raise ValueError(
                f"min_memory_saving={config.min_memory_saving} cannot be met: all {len(self.candidates.targets)} "
                f"layers at max_rate={config.max_rate} save {saving:.1%} of the parameters; widen kinds or layers, "
                "raise max_rate, or ask for less"
            )

    def run(self) -> None:
        """All phases; what they tried is in `found`."""
        if self.config.policy == "allocated":
            self.blocks = self._into_blocks(list(self.candidates.targets.values()))
            allocate(self)
            return
        layers = self._choose_target_set()
        if not layers:
            return
        self.blocks = self._into_blocks(layers)
        if self.config.order == "size":
            self.blocks.sort(key=lambda block: -block.parameters_part)
        else:
            self._measure_robustness()
        self._raise_rates()

    # Alg. 1

    def _choose_target_set(self) -> list[Target]:
        """The layers of the set with the highest benefit; sets the initial rate. Empty where no rate was acceptable."""
        by_size = sorted(self.candidates.targets.values(), key=lambda target: -target.weights)
        chosen: list[Target] = []
        highest = -math.inf
        total, done = len(self.config.target_sets) * len(self.config.rates), 0
        for part in self.config.target_sets:
            layers = by_size[: math.ceil(part * len(by_size) - 1e-9)]
            accepted: list[tuple[float, Candidate]] = []
            for rate in sorted(self.config.rates):
                label = f"{part:.0%} of the layers at {rate:.0%}"
                widths = self.candidates.widths({layer.name: rate for layer in layers})
                done += 1
                candidate = self.judge(widths, {}, "target set", label, done, total)
                if candidate.accepted:
                    accepted.append((rate, candidate))
            benefit = _mean([each.score + 100 * each.saving for _, each in accepted]) if accepted else None
            self.target_sets.append(
                TargetSet(
                    part=part,
                    layers=len(layers),
                    accepted_rates=tuple(rate for rate, _ in accepted),
                    benefit=benefit,
                )
            )
            if benefit is not None and benefit > highest:
                highest, chosen, self.initial_rate = benefit, layers, accepted[-1][0]
        return chosen

    # Alg. 3

    def _into_blocks(self, layers: Sequence[Target]) -> list[BlockState]:
        """The layers by block, in the order of the network."""
        segments = adapter_for(self.network).segments(self.network)
        order = {name: number for number, name in enumerate(self.candidates.targets)}
        members: dict[str, list[str]] = {}
        for layer in sorted(layers, key=lambda each: order[each.name]):
            inside = (s for s in segments if layer.tensors[0].startswith(f"{s}."))
            block = layer.name if self.config.blocks == "layer" else next(inside, layer.name)
            members.setdefault(block, []).append(layer.name)
        weights = {layer.name: layer.weights for layer in layers}
        all_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return [
            BlockState(
                name=name,
                layers=tuple(names),
                parameters_part=sum(weights[each] for each in names) / all_parameters,
                rate=self.initial_rate,
            )
            for name, names in members.items()
        ]

    def _measure_robustness(self) -> None:
        """Each block at twice the rate; sorts the blocks, the most robust first."""
        base = self.widths_of(self.blocks)
        rate = min(2 * self.initial_rate, self.config.max_rate)
        measured = []
        for number, block in enumerate(self.blocks, start=1):
            changed = [replace(each, rate=rate) if each is block else each for each in self.blocks]
            label = f"{block.name} at {rate:.0%}, the others at {self.initial_rate:.0%}"
            found = self.judge(self.widths_of(changed), base, "robustness", label, number, len(self.blocks))
            drop = max(self.baseline - found.score, 0.0)
            measured.append(replace(block, robustness=100 * found.saving / (drop + LEAST_DROP)))
        measured.sort(key=lambda block: -_robustness(block))
        self.blocks = measured

    # Alg. 4

    def _raise_rates(self) -> None:
        """Raise the blocks until none gains, by their bands; then those whose increment is 0, banded among themselves,
        unless `frozen` keeps them."""
        waiting = [block.name for block in self.worthy_blocks()]
        while waiting:
            increments = self._band(waiting)
            self._raise_in_turn({name: steps for name, steps in increments.items() if steps})
            # the first of a banding has an increment above 0, so there are fewer each time
            waiting = [name for name, steps in increments.items() if not steps and self.config.frozen == "last"]

    def worthy_blocks(self) -> list[BlockState]:
        """Those that hold enough parameters to be raised (`min_block_share`)."""
        least = self.config.min_block_share * _mean([block.parameters_part for block in self.blocks])
        return [block for block in self.blocks if block.parameters_part >= least]

    def _band(self, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Put these blocks into bands below the most robust of them: {name: the increments above 0, falling}."""
        banded = [block for block in self.blocks if block.name in names]
        if self.config.order == "robustness":
            best, last = _robustness(banded[0]), len(self.config.increments) - 1
            banded = [
                replace(block, band=min(int((best - _robustness(block)) / self.config.theta), last)) for block in banded
            ]
        found = {block.name: block for block in banded}
        self.blocks = [found.get(block.name, block) for block in self.blocks]
        return {
            block.name: tuple(step for step in self.config.increments[block.band :] if step > 0) for block in banded
        }

    def _raise_in_turn(self, steps: dict[str, tuple[float, ...]]) -> None:
        """Raise each block by its first increment, the next where that is refused, until none gains.

        Until a raise is refused, all of a turn are tried at once: what they lose together, fewer of them do not.
        """
        while self._raise_together(steps):
            pass
        gained = True
        while gained:
            gained = False
            for number, block in enumerate(self.blocks):
                while steps.get(block.name) and block.rate < self.config.max_rate:
                    if self._raise({number: steps[block.name][0]}, f"{block.name} at {{rate:.0%}}", steps):
                        gained = True
                        break
                    steps[block.name] = steps[block.name][1:]

    def _raise_together(self, steps: Mapping[str, tuple[float, ...]]) -> bool:
        """Raise every block by its increment; whether that was accepted, and any could be raised."""
        raises = {
            number: steps[block.name][0]
            for number, block in enumerate(self.blocks)
            if steps.get(block.name) and block.rate < self.config.max_rate
        }
        return bool(raises) and self._raise(raises, f"{len(raises)} blocks raised, the last at {{rate:.0%}}", steps)

    def _raise(self, raises: Mapping[int, float], label: str, steps: Mapping[str, tuple[float, ...]]) -> bool:
        """Raise some blocks, {number: by how much}, if that is within the accuracy."""
        before, widths_before, plans = self.blocks, self.widths_of(self.blocks), 0
        raised = list(before)
        for number, step in raises.items():
            rate, plan = min(before[number].rate + step, self.config.max_rate), self.widths_of(raised)
            raised[number] = replace(before[number], rate=rate)
            plans += self.widths_of(raised) != plan
        widths = self.widths_of(raised)
        self._policy_tries += 1
        if widths != widths_before:
            total = self._policy_tries + self._steps_left(steps)
            tried = label.format(rate=rate)
            together = plans if len(raises) > 1 else None
            found = self.judge(widths, widths_before, "policy", tried, self._policy_tries, total, together)
            if not found.accepted:
                return False
            self.candidates.accept(widths, widths_before)
        self.blocks = raised
        return True

    def _steps_left(self, steps: Mapping[str, tuple[float, ...]]) -> int:
        """How many steps are left at most, all being accepted at their present increment."""
        total = 0
        for block in self.blocks:
            if steps.get(block.name):
                total += math.ceil((self.config.max_rate - block.rate) / steps[block.name][0])
        return total

    def widths_of(self, blocks: Sequence[BlockState]) -> dict[str, int]:
        """The widths of their layers at the blocks' rates."""
        return self.candidates.widths({layer: block.rate for block in blocks for layer in block.layers})

    def judge(
        self,
        widths: dict[str, int],
        base: dict[str, int],
        phase: str,
        label: str,
        done: int,
        total: int,
        together: int | None = None,
    ) -> Candidate:
        """Try the network at these widths, against that at those of `base`; kept in `found`, and `progress` told."""
        started, resolution = time.monotonic(), self._resolution_points.get(phase)
        try:
            found = self.candidates.judge(widths, base, phase=phase, label=label, resolution_points=resolution)
        except ValueError as error:
            error.add_note(f"while {label} was tried")
            raise
        if together is not None:  # the plain algorithm tries them one by one, and would not have tried what is refused
            found = replace(found, stands_for=together if found.accepted else 0)
        self.found.append(found)
        if not found.remembered:
            self._spent_s += time.monotonic() - started
        if self.progress is not None:
            fresh = self._evaluations()
            left = self._spent_s / fresh * max(total - done, 0) if fresh else None
            self.progress(PrimeProgress(phase=phase, done=done, total=total, candidate=found, left_s=left))
        return found

    def _evaluations(self) -> int:
        return sum(not each.remembered for each in self.found)

    # Selection

    def apply(self) -> None:
        """Apply the best candidate that holds on the whole hold-out; `met` and the alternatives say what it is."""
        self.within_accuracy = self._apply_within_accuracy()
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
        """The largest saving first, until one is within the constraint on all images; it is applied."""
        for candidate in self._distinct(lambda each: each.accepted, lambda each: (-each.saving, -each.score)):
            exact = self._scored(candidate)
            if exact.accepted:
                return exact
            self.undo()
        return None

    def _score_within_memory(self) -> Candidate | None:
        """The best accuracy of those that save enough, on all images; nothing is applied."""
        least = self.config.min_memory_saving
        for candidate in self._distinct(lambda each: each.saving >= least, lambda each: (-each.score, -each.saving)):
            exact = self._scored(candidate)
            self.undo()
            return exact
        return None

    def _distinct(
        self, wanted: Callable[[Candidate], bool], order: Callable[[Candidate], tuple[float, float]]
    ) -> list[Candidate]:
        plans = {tuple(sorted(each.widths.items())): each for each in self.found if each.widths and wanted(each)}
        return sorted(plans.values(), key=order)

    def _scored(self, candidate: Candidate) -> Candidate:
        """Applies it; the candidate as the whole hold-out sees it."""
        self._commit(candidate)
        score = self.scorer.full(self.network)
        return replace(
            candidate,
            score=score,
            accepted=score >= self.floor,
            images=self.scorer.images,
            exact=True,
            error_points=0.0,
            remembered=False,
        )

    def _commit(self, candidate: Candidate) -> None:
        self._batchnorm = batchnorm_state(self.network)
        self.change = self.candidates.commit(candidate.widths)

    def undo(self) -> None:
        """Take back what was applied, if anything was."""
        if self.change is not None:
            revert(self.network, self.change)
            restore_batchnorm(self.network, self._batchnorm)
            self.change = None

    def scoring(self) -> dict[str, float]:
        """What the search cost; see `PrimeSVTResult`."""
        spent = {key: value - self._spent_before[key] for key, value in self.scorer.cost.to_dict().items()}
        distinct = {tuple(sorted(each.widths.items())): each.stands_for for each in self.found}
        images = self.scorer.images
        return spent | {
            "candidates": len(self.found),
            "plans": len(distinct),
            "evaluations": self._evaluations(),
            "remembered": len(self.found) - self._evaluations(),
            "batchnorm_passes": self.candidates.reestimates,
            "holdout_images": images,
            "naive_image_forwards": (sum(each.stands_for for each in self.found) + 2) * images,  # baseline, final score
            "naive_image_forwards_distinct": (sum(distinct.values()) + 2) * images,
        }


def _baseline(network: nn.Module, scorer: Scorer) -> tuple[float, dict[str, float]]:
    """Score the unpruned network and watch it spike; ValueError where it is no network that spikes."""
    adapter = adapter_for(network)
    if not isinstance(adapter, SpikingAdapter):
        raise ValueError(
            f"{type(network).__name__}: a {adapter.family} is not a spiking network; PrimeSVT prunes spiking ones, "
            "`prune` and AdaptiveIterativePruning any"
        )
    adapter.check_spiking(network)
    with adapter.watching_spikes(network) as rates:
        baseline = scorer.full(network)
    rates = _over_ranks(rates)
    if 0 < baseline <= 1:
        warnings.warn(f"the baseline is {baseline:g} points of 100; does evaluate return a fraction?", stacklevel=4)
    if not rates:
        raise ValueError(
            f"evaluate gave {baseline:g} points without a pass through the network; it has to score the one it is given"
        )
    stem = adapter.segments(network)[0]
    silent = [name for name, rate in rates.items() if not rate]
    if not any(rate for name, rate in rates.items() if not name.startswith(f"{stem}.")):
        raise ValueError(
            f"{type(network).__name__}: not one of its {len(rates)} neurons behind {stem} spikes on the hold-out, so "
            "the logits say nothing about the images; train the network, or give it its trained BatchNorm statistics"
        )
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(rates)} neurons never spike on the hold-out ({', '.join(silent[:3])}"
            f"{', ...' if silent[3:] else ''}); is the network trained? What only leads to them costs nothing to prune",
            stacklevel=4,
        )
    return baseline, rates


def _over_ranks(rates: dict[str, float]) -> dict[str, float]:
    """The mean over the ranks that had images; their shards are of one size, but for an image."""
    shards = [shard for shard in from_all_ranks(rates) if shard]
    return {name: _mean([shard[name] for shard in shards]) for name in (shards[0] if shards else {})}


def _robustness(block: BlockState) -> float:
    assert block.robustness is not None
    return block.robustness


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
