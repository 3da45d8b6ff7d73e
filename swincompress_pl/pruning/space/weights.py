"""Single weights, n:m, blocks and filters, kept at zero by masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.compensation.masks import MaskCompensator
from swincompress_pl.pruning.criteria import (
    SECOND_ORDER,
    Gradients,
    weight_scores,
)
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.space.config import Removal, Removals, SpaceConfig, Target, matching
from swincompress_pl.pruning.structure.apply import check_layers, stored_tensor
from swincompress_pl.pruning.structure.change import Change, commit_masks, owners
from swincompress_pl.pruning.structure.cost import CostTracker
from swincompress_pl.pruning.structure.patterns import Pattern
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, temporary_mask
from swincompress_pl.registry import adapter_for

# Without half of a layer's weights, the answers move e^(8 p) times as far for a part p more, as they do in the
# linear layers of DeiT-Tiny, roughly.
_GROWTH = 8.0
_LEAST_GROWTH = 1.0
_LEAST_MOVED = 1e-12  # nats; less is rounding


class WeightSpace:
    """Weights of the linear layers and convolutions in the network's segments, divided by a pattern and kept at zero.

    The layer that reads the pixels (patch embedding) and the head are left alone, as in the paper.
    """

    def __init__(self, config: SpaceConfig, pattern: Pattern, compensator: Compensator | None = None) -> None:
        self.config, self.pattern = config, pattern
        self._compensator: MaskCompensator | None = None
        if compensator is not None:
            self._compensator = MaskCompensator(compensator, writes=config.compensation != "none")
        self._refined: dict[str, tuple[Tensor, Tensor]] = {}  # the latest of each layer, before and after

    def prepare(self, network: nn.Module) -> None:
        """Begins a round on the network as it is now: collects what compensation and "second_order" need."""
        self._refined = {}
        if self._compensator is not None:
            self._compensator.begin_round(network, self._names(network))

    def _names(self, network: nn.Module) -> list[str]:
        """The weights that may be masked."""
        prunable = prunable_weights(network)
        if not prunable:
            raise ValueError(
                f"granularity={self.config.granularity!r}: {type(network).__name__} has no linear layer or convolution "
                "behind the one that reads the pixels; there is nothing to prune"
            )
        names = matching(prunable, self.config.layers)
        check_layers(network, names)
        return names

    def targets(self, network: nn.Module) -> list[Target]:
        """One target per layer."""
        parameters = dict(network.named_parameters(remove_duplicate=False))  # a shared one is refused by its own name
        names, masks = self._names(network), masked_parameters(network)
        found = []
        for name in names:
            shape = tuple(parameters[name].shape)
            self.pattern.check(name, shape)
            units = self.pattern.units(shape)
            weights = parameters[name].numel()
            kept = units
            if name in masks:
                kept = round(int(masks[name][1].sum()) * units / weights)
            found.append(
                Target(
                    name=name,
                    kind="weight",
                    units=kept,
                    initial_units=units,
                    min_units=self.pattern.min_units,
                    weights=weights,
                    tensors=tuple(dict.fromkeys([name, *self._rewritten(name)])),
                )
            )
        return found

    def scores(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Tensor:
        """The scores of the parameter's weights; those that are masked already score below all others."""
        if self.config.criterion == SECOND_ORDER:
            scores = self._errors(network, target.name)
        else:
            scores = weight_scores(network, target.name, self.config.criterion, gradients)
        masks = masked_parameters(network)
        if target.name in masks:
            scores = scores.masked_fill(~masks[target.name][1].to(scores.device), -1.0)
        return scores

    def removals(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Removals:
        """See `SearchSpace.removals`."""
        scores = self.scores(network, target, gradients)
        return lambda keep: from_rank_zero(self.lowest(scores, target, keep))

    def lowest(self, scores: Tensor, target: Target, keep: int) -> Removal:
        """What is gone if the `keep` units of `target` with the highest `scores` stay."""
        return {target.name: self.pattern.keep_mask(scores, keep)}

    def refined(self, target: Target, removal: Removal) -> Removal:
        """The mask of as many weights that costs least, where `criterion` is "second_order"; else `removal`."""
        if self.config.criterion != SECOND_ORDER or self._compensator is None:
            return removal
        known = self._refined.get(target.name)
        if known is None or not torch.equal(known[0], removal[target.name]):
            known = self._refined[target.name] = removal[target.name], self._best_mask(target, removal[target.name])
        return {target.name: known[1]}

    def _best_mask(self, target: Target, mask: Tensor) -> Tensor:
        assert self._compensator is not None
        keep = round(int(mask.sum()) * target.initial_units / target.weights)

        def kept(saliency: Tensor, part: float) -> Tensor:
            return self.pattern.keep_mask(saliency, target.units - round((target.units - keep) * part))

        found = self._compensator.best_mask(target.name, kept, mask.shape)
        return mask if found is None else from_rank_zero(found.to(mask.device))

    def kept(self, target: Target, units: int) -> int:
        """What stays if `units` stay, as `CostTracker` counts it: weights."""
        return target.weights // target.initial_units * units

    def scores_of_kept(self, network: nn.Module, target: Target, saliency: Tensor) -> Tensor:
        """The scores (target.units,), float64, of the units that are still there, to be compared between targets.

        `saliency` is that of all weights, as `scores` gives it.
        """
        scores = self.pattern.unit_scores(saliency).double().cpu()
        scores = scores[scores >= 0]
        return self._costs(network, target, saliency, scores) if self.config.criterion == SECOND_ORDER else scores

    def _costs(self, network: nn.Module, target: Target, saliency: Tensor, scores: Tensor) -> Tensor:
        """How much farther the answers move for each unit, if those with lower scores are gone already.

        The scores of single units say which go first, but not what many cost together; that is measured, once.
        """
        assert self._compensator is not None
        curve = self._compensator.once(target.name, lambda: self._curve(network, target, saliency))
        if curve is None:
            return scores
        ranks = torch.empty(len(scores), dtype=torch.float64)
        ranks[scores.argsort(stable=True)] = torch.arange(len(scores), dtype=torch.float64)
        return curve.slopes(target.initial_units - target.units + ranks)

    def _curve(self, network: nn.Module, target: Target, saliency: Tensor) -> _Curve | None:
        """Measured without half of the units, and without any; None if the network does not give one tensor."""
        assert self._compensator is not None
        keep = max(target.units - max(1, target.units // 2), target.min_units)
        halved = self.refined(target, self.lowest(saliency, target, keep))
        empty = {target.name: torch.zeros_like(halved[target.name])}
        half, all_gone = (self._compensator.distance(network, removal) for removal in (halved, empty))
        if half is None or all_gone is None:
            return None
        return _Curve(units=target.initial_units, halved=target.initial_units - keep, half=half, all_gone=all_gone)

    def masked(self, network: nn.Module, removal: Removal) -> AbstractContextManager[Any]:
        """See `SearchSpace.masked`."""
        if self._compensator is not None:
            return self._compensator.masked(network, removal)
        with ExitStack() as stack:
            for name, mask in removal.items():
                stack.enter_context(temporary_mask(network, name, mask))
            return stack.pop_all()

    def commit(self, network: nn.Module, removal: Removal) -> Change:
        """Registers masks."""
        if self._compensator is None:
            return commit_masks(network, removal)
        names = sorted({tensor for name in removal for tensor in self._rewritten(name)})
        before = {name: stored_tensor(network, name).detach().clone() for name in names}
        with all_or_nothing(written=owners(network, [*removal, *before])):
            self._compensator.settle(network, removal)
            return replace(commit_masks(network, removal), rewritten=before)

    def _rewritten(self, name: str) -> tuple[str, ...]:
        """The tensors that compensating a mask changes."""
        return () if self._compensator is None else self._compensator.tensors(name)

    def _errors(self, network: nn.Module, name: str) -> Tensor:
        shape = stored_tensor(network, name).shape
        errors = None if self._compensator is None else self._compensator.errors(name, shape)
        if errors is None:
            reason = "the space has no calibration images" if self._compensator is None else self._compensator.why(name)
            raise ValueError(
                f"criterion='second_order': the weights of {name} cannot be solved again ({reason}); leave the layer "
                "out (layers=), or take another criterion"
            )
        return errors

    def costs(self, network: nn.Module, input_shape: Sequence[int] | None) -> CostTracker:
        """See `SearchSpace.costs`."""
        return CostTracker(network, None, input_shape)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """How far the answers move without some of a layer's `units`: `half` without `halved`, `all_gone` without any.

    Its logarithm grows with `_GROWTH` per layer up to half, and ever faster from there, as the end says.
    """

    units: int
    halved: int
    half: float
    all_gone: float

    def slopes(self, gone: Tensor) -> Tensor:
        """How much farther the answers move per unit, if so many are gone already."""
        half, rest = max(self.half, _LEAST_MOVED), max(self.units - self.halved, 1) / self.units
        growth = math.log(max(self.all_gone, _LEAST_MOVED) / half)
        rate = min(_GROWTH, max(growth / rest, _LEAST_GROWTH))
        bend = max(growth - rate * rest, 0.0) / rest**2
        part = (gone - self.halved) / self.units
        beyond = part.clamp_min(0.0)
        moved = half * (rate * part + bend * beyond.square()).exp()
        return moved * (rate + 2 * bend * beyond) / self.units


def prunable_weights(network: nn.Module) -> list[str]:
    """The weights of linear layers and convolutions inside the network's segments, without the one that reads pixels.

    The latter is the first of them.
    """
    segments = adapter_for(network).segments(network)
    return [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and any(name.startswith(f"{segment}.") for segment in segments)
    ][1:]
