"""Cuts scales when units are removed from the network to which they belong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swincompress_pl._deprecated import renamed_attributes
from swincompress_pl.quant.graph import Graph
from swincompress_pl.quant.scales import Scales, weight_key

Kept = Mapping[str, Mapping[int, Tensor]]
"""{name of a parameter that was cut: {axis: the indices along it that were kept}}."""


@renamed_attributes(drift="adjustment")
@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleCut:
    """What a cut replaced in the scales, so that `QuantizedNetwork.unfollow` can undo it.

    Attributes:
        graph: The graph before the cut.
        buffers: The module, the name and the former tensor of each buffer.
        adjustment: For the optimizers, the parameter of learned scales before and after the cut, and the indices that
            were kept; None if it did not change.
    """

    graph: Graph
    buffers: tuple[tuple[nn.Module, str, Tensor], ...]
    adjustment: tuple[nn.Parameter, nn.Parameter, Tensor] | None


def cut_scales(scales: Scales, graph: Graph, kept: Kept) -> ScaleCut:
    """Cuts the scales of removed units, and keeps the others exactly as they are; `graph` is the one before the cut.

    Each row of a weight has a step, and each column that reads equalized values has a ratio and a centering. A
    quantizer's scale stays, because it belongs to all channels together.
    """
    places: dict[tuple[nn.Module, str], Tensor] = {}
    rows: dict[str, Tensor] = {}
    for node in graph.weighted_nodes:
        axes, weight = kept.get(f"{node.module}.weight", {}), scales.weight_quantizer(node)
        spec = graph.spec_of(node.inputs[0])
        if 0 in axes:
            rows[weight_key(node)] = axes[0]
            places |= {(weight, name): axes[0] for name in ("step", "zero_point") if name in weight._buffers}
        if 1 in axes and spec is not None and spec.equalized:
            ratios = scales.calibrated_quantizer(spec)
            places |= {(ratios, name): axes[1] for name in ("equalization", "centering") if name in ratios._buffers}
    adjustment = _cut_adjustment(scales, rows)  # it needs the lengths before
    buffers = tuple((module, name, module.get_buffer(name)) for module, name in places)
    for (module, name), index in places.items():
        setattr(module, name, module.get_buffer(name).index_select(0, index.to(module.get_buffer(name).device)))
    if adjustment is not None:
        scales.adjustment = adjustment[1]
    return ScaleCut(graph=graph, buffers=buffers, adjustment=adjustment)


def undo_cut(scales: Scales, cut: ScaleCut) -> None:
    """Restores the scales from before the latest cut."""
    for module, name, tensor in cut.buffers:
        setattr(module, name, tensor)
    if cut.adjustment is not None:
        scales.adjustment = cut.adjustment[0]


def _cut_adjustment(scales: Scales, rows: Mapping[str, Tensor]) -> tuple[nn.Parameter, nn.Parameter, Tensor] | None:
    """The former parameter of the learned scales, the new one with only the kept rows, and their indices."""
    old = scales.adjustment
    if old is None or not rows:
        return None
    parts, start = [], 0
    for key, values in scales.calibrated().items():
        index = rows.get(key, torch.arange(len(values)))
        parts.append(start + index.to(old.device))
        start += len(values)
    index = torch.cat(parts)
    new = nn.Parameter(old.detach().index_select(0, index), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # attributes that users and libraries set on parameters
    if old.grad is not None:
        new.grad = old.grad.index_select(0, index)
    return old, new, index


def check_fit(scales: Scales, graph: Graph, network: nn.Module) -> None:
    """Raises a ValueError that names the layer if scales are not as wide as the network."""
    for node in graph.weighted_nodes:
        weight, step = node.folded_weight(network, None), scales.weight_quantizer(node).step
        spec = graph.spec_of(node.inputs[0])
        ratios = scales.calibrated_quantizer(spec).equalization if spec is not None and spec.equalized else None
        wide = len(step) if ratios is None else (len(step), len(ratios))
        expected = weight.shape[0] if ratios is None else tuple(weight.shape[:2])
        if wide != expected:
            raise ValueError(
                f"{node.name}: the layer is {tuple(weight.shape)}, but its scales are made for {wide}; cut the network "
                "and its scales together: QuantizedNetwork.follow takes what pruning.apply_plan returned"
            )
