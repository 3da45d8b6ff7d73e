"""Post-training quantization: from a float network and some images to a QuantizedNetwork."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from swincompress_pl.quant.calibration import Ranges, calibration_images, observe, sample_layers
from swincompress_pl.quant.graph import Graph, Node, WeightedNode
from swincompress_pl.quant.network import QuantizedNetwork, find_preprocessing
from swincompress_pl.quant.nodes import GatherNode
from swincompress_pl.quant.search import LayerProblem, best_balance, best_value_scale, max_step

# 16-bit sites and logits keep the true maximum and leave room above it: a bit there is free, clipping is not.
HEADROOM = 2.0
# Bias must stay below 2**30 accumulator steps at export; keep two bits of distance.
_BIAS_STEPS = 2.0**28
_DEAD_ROW_STEPS = 256.0


@torch.no_grad()
def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    method: str = "searched",
    preprocessing: Mapping[str, Any] | None = None,
    images: int = 128,
    rows: int = 1024,
    balance: bool | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> QuantizedNetwork:
    """Quantizes a supported network to int8 without training.

    model: a network with an adapter (timm Swin or ViT), in any mode; it is wrapped, not copied, and its weights stay.
    calibration: batches as the network takes them, normalized float (N, C, H, W), alone or first in a tuple; the first
    `images` images are used.
    method: "searched" (scales searched under the Gauss-Newton error), "max" (symmetric, clipped at the maximum),
    "affine" (min-max with offset; a simulation for comparison that cannot be exported).
    preprocessing: mapping with "mean" and "std" of the images; default: the network's own (`network.preprocessing`, or
    timm's `pretrained_cfg`). rows: sampled rows a layer for the search. balance: per-channel ranges of LayerNorm
    outputs, folded away; default: only when searched. classes: names for the artifact.

    Raises ValueError for empty calibration, NaN or infinite values (naming the site), an unknown method or an already
    quantized network; UnsupportedNetworkError for a network without an integer form.
    """
    found = find_preprocessing(
        preprocessing, getattr(model, "preprocessing", None), getattr(model, "pretrained_cfg", None)
    )
    quantized = QuantizedNetwork(model, preprocessing=found, method=method, classes=classes)
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in calibration_images(calibration, images)]
    for batch in batches:
        quantized.pixels(batch)  # refuses images of another normalization
    modes = {module: module.training for module in quantized.modules()}
    quantized.eval()
    try:
        ranges = observe(quantized.graph, model, batches)
        _set_ranges(quantized, ranges)
        if method == "searched":
            use_balance = True if balance is None else balance
            _Search(quantized, ranges, batches, rows=rows, seed=seed).run(balance=use_balance, progress=progress)
        elif balance:
            raise ValueError(f"balance=True goes with method 'searched', not {method!r}")
        _secure_steps(quantized)
    finally:
        for module, training in modes.items():
            module.train(training) if module is quantized else setattr(module, "training", training)
    return quantized


def _set_ranges(quantized: QuantizedNetwork, ranges: Mapping[str, Ranges]) -> None:
    """The starting point, and the end of the methods without search: everything at its maximum."""
    for site in quantized.graph.sites.values():
        scale = quantized.scales.site(site)
        affine = scale.affine and site.searched
        segments = list(site.segments)
        low = torch.stack([part.min() for part in ranges[site.name].low.split(segments)])
        high = torch.stack([part.max() for part in ranges[site.name].high.split(segments)])
        if affine:
            low, high = low.clamp(max=0), high.clamp(min=0)
            step = (high - low) / 255
            scale.scale.copy_(torch.where(step > 0, step, 1.0))
            scale.zero_point.copy_(torch.round(-128 - low / scale.scale).to(torch.int32))
            continue
        magnitude = torch.maximum(low.abs(), high.abs()) * (1.0 if site.searched else HEADROOM)
        scale.scale.copy_(torch.where(magnitude > 0, magnitude, 1.0) / site.q_max)
    for node in quantized.graph.weighted_nodes:
        weight = quantized.scales.weight_scale(node)
        folded = node.folded_weight(quantized.network, None).flatten(1)
        if weight.affine:
            low, high = folded.amin(1).clamp(max=0), folded.amax(1).clamp(min=0)
            step = (high - low) / 255
            weight.step.copy_(torch.where(step > 0, step, 1.0))
            weight.zero_point.copy_(torch.round(-128 - low / weight.step).to(torch.int32))
        else:
            weight.step.copy_(max_step(folded))


def _secure_steps(quantized: QuantizedNetwork) -> None:
    """Steps that int32 accumulators can carry: room for the bias, and a unit for rows without weights."""
    for node in quantized.graph.weighted_nodes:
        scale = quantized.scales.weight_scale(node)
        if scale.affine:
            continue
        in_site, out_site = quantized.graph.site_of(node.inputs[0]), quantized.graph.site_of(node.output)
        in_scale = 1.0 if in_site is None else float(quantized.scales.site(in_site).scale[0])
        assert out_site is not None
        out_scale = quantized.scales.site(out_site).channel_scales()
        step = torch.where(scale.step > 0, scale.step, out_scale / (in_scale * _DEAD_ROW_STEPS))
        bias = node.folded_bias(quantized.network)
        if bias is not None:
            step = torch.maximum(step, bias.abs() / (in_scale * _BIAS_STEPS))
        scale.step.copy_(step)


class _Search:
    """Walks the graph and searches the scales around every weighted layer."""

    def __init__(
        self,
        quantized: QuantizedNetwork,
        ranges: Mapping[str, Ranges],
        batches: Sequence[Tensor],
        *,
        rows: int,
        seed: int,
    ) -> None:
        self.quantized, self.graph, self.ranges = quantized, quantized.graph, ranges
        self.samples = sample_layers(self.graph, quantized.network, batches, rows=rows, seed=seed)
        self._linear_inputs = {_source(self.graph, node.inputs[0]) for node in self.graph.weighted_nodes}

    def run(self, *, balance: bool, progress: bool) -> None:
        nodes = self.graph.weighted_nodes
        with Progress(transient=True, disable=not progress) as bar:
            task = bar.add_task("searching scales", total=len(nodes))
            for node in nodes:
                self._layer(node, balance=balance)
                self._output(node)
                del self.samples[node.name]
                bar.advance(task)

    def _layer(self, node: WeightedNode, *, balance: bool) -> None:
        """Input scale (and ratios) and weight steps of one layer."""
        network, scales = self.quantized.network, self.quantized.scales
        x, sensitivity = self.samples[node.name].rows
        weight = node.folded_weight(network, None).flatten(1)
        site = self.graph.site_of(node.inputs[0])
        magnitude = None
        if site is not None and site.searched:
            channel_magnitude = self.ranges[site.name].magnitude
            if site.balanced and balance:
                ratios = best_balance(x, weight, sensitivity, channel_magnitude)
                scales.site(site).balance.copy_(ratios)
                x, weight, channel_magnitude = x / ratios, weight * ratios, channel_magnitude / ratios
            magnitude = float(channel_magnitude.max())
        problem = LayerProblem(
            x=x,
            weight=weight,
            sensitivity=sensitivity,
            magnitude=magnitude if magnitude else None,
            q_max=127 if site is None else site.q_max,
            signed=True if site is None else site.signed,
        )
        scale, step = problem.solve()
        scales.weight_scale(node).step.copy_(step)
        if scale is not None and site is not None:
            scales.site(site).scale.fill_(scale)

    def _output(self, node: WeightedNode) -> None:
        """The output's scales, where no linear layer reads it: each segment by the error of its own values."""
        site = self.graph.site_of(node.output)
        if site is None or not site.searched or node.output in self._linear_inputs:
            return
        network = self.quantized.network
        x, sensitivity = self.samples[node.name].rows
        values = x @ node.folded_weight(network, None).flatten(1).T
        bias = node.folded_bias(network)
        values = values if bias is None else values + bias
        sizes = list(site.segments)
        parts = zip(
            values.split(sizes, 1),
            sensitivity.split(sizes, 1),
            self.ranges[site.name].magnitude.split(sizes),
            strict=True,
        )
        scale = self.quantized.scales.site(site).scale
        for number, (part, weight, magnitude) in enumerate(parts):
            if float(magnitude.max()) > 0:
                scale[number] = best_value_scale(
                    part, weight, q_max=site.q_max, signed=site.signed, magnitude=float(magnitude.max())
                )


def _source(graph: Graph, value: str) -> str:
    """The value that a chain of gathers started from."""
    makers: dict[str, Node] = {node.output: node for node in graph.nodes}
    while value in makers and isinstance(makers[value], GatherNode):
        value = makers[value].inputs[0]
    return value
