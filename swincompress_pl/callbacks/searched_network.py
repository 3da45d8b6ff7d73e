"""The network that a pruning search sees in a module: the one it holds, or the float one in a quantized one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor, nn

from swincompress_pl.callbacks.quantization import QuantizationAwareTraining
from swincompress_pl.callbacks.scoring import answering
from swincompress_pl.checkpoint.holder import float_network, held_by, network_of
from swincompress_pl.pruning.space import SpaceConfig, StructuredSpace, local_space
from swincompress_pl.pruning.structure.apply import AppliedPlan, SlicedTensor
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.quant.scale_cut import ScaleCut


def searched_network(module: LightningModule, model_attribute: str) -> nn.Module:
    """The network that has the groups, weights and masks: the held one, or the `network` of a `QuantizedNetwork`."""
    return float_network(network_of(module, model_attribute))


def scored_network(module: LightningModule, model_attribute: str, network: nn.Module) -> nn.Module:
    """What computes the logits of the searched `network`: itself, or fake quantization if it is quantized."""
    held = network_of(module, model_attribute)
    return _Rounded(held) if isinstance(held, QuantizedNetwork) and held.network is network else network


@contextmanager
def standing(module: LightningModule, model_attribute: str, network: nn.Module) -> Iterator[None]:
    """Lets `module` call `scored_network` as its network inside the context: eager, and rounded if quantized."""
    held = held_by(module, model_attribute)
    scored = scored_network(module, model_attribute, network)
    with answering(held, held.forward if scored is held else scored):
        yield


class _Rounded(nn.Module):
    """Fake quantization in either mode, because integers would be made again for every candidate."""

    def __init__(self, quantized: QuantizedNetwork) -> None:
        super().__init__()
        self.quantized = quantized
        self.training = quantized.training

    def forward(self, images: Tensor) -> Any:
        return self.quantized.fake_quantized(images)


class CoupledScales:
    """Cuts the scales of a quantized network with its weights, and undoes that; does nothing for a float network."""

    def __init__(self, module: LightningModule, model_attribute: str) -> None:
        network = network_of(module, model_attribute)
        self._quantized = network if isinstance(network, QuantizedNetwork) else None
        self._cuts: list[ScaleCut | None] = []

    def cut(self, applied: AppliedPlan) -> None:
        """See `pruning.adaptive.rounds.CoupledState`."""
        cut = None
        if self._quantized is not None and applied.tensors:
            cut = self._quantized.follow({sliced.name: dict(sliced.kept) for sliced in applied.tensors})
        self._cuts.append(cut)

    def uncut(self) -> None:
        """See `pruning.adaptive.rounds.CoupledState`; does nothing if nothing was cut."""
        latest = self._cuts.pop() if self._cuts else None
        if latest is not None and self._quantized is not None:
            self._quantized.unfollow(latest)

    def with_scales(self, applied: AppliedPlan) -> AppliedPlan:
        """The latest cut `applied`, with that of the learned scales, for the optimizers."""
        latest = self._cuts[-1] if self._cuts else None
        if latest is None or latest.adjustment is None:
            return applied
        old, new, index = latest.adjustment
        adjustment = SlicedTensor(name="scales.adjustment", old=old, new=new, kept=((0, index),))
        return replace(applied, tensors=(*applied.tensors, adjustment))


def pruned_tensors(network: nn.Module, space: SpaceConfig) -> set[str]:
    """The names of the parameters that a search may cut or mask; a ValueError if there are none."""
    found = local_space(space)
    names = {target.name for target in found.targets(network)}
    if not isinstance(found, StructuredSpace):
        return names
    own = dict(network.named_parameters(remove_duplicate=False))
    return {part.tensor for group in found.groups(network) for part in group.slices if part.tensor in own}


def refuse_masked_integers(
    trainer: Trainer, module: LightningModule, model_attribute: str, monitor: str | None, kinds: Collection[str]
) -> None:
    """Raises a ValueError for a search that would score integers with masked LayerNorms, which integers do not have."""
    quantizers = [
        other
        for other in trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        if isinstance(other, QuantizationAwareTraining) and other.model_attribute == model_attribute
    ]
    quantized = isinstance(network_of(module, model_attribute), QuantizedNetwork) or bool(quantizers)
    if monitor is not None and "embed" in kinds and quantized:
        raise ValueError(
            f"monitor={monitor!r} with kinds={tuple(kinds)}: the validation of a quantized network runs in integers, "
            "whose LayerNorms cannot leave out the channels that the kind 'embed' tries. Leave monitor out (the search "
            "scores top-1 itself), or 'embed', or prune in an earlier fit"
        )
