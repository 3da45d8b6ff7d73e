"""Walks the graph and searches the scales around every weighted layer, one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from rich.progress import Progress
from torch import Tensor

from swincompress_pl.quant.calibration import LayerSample
from swincompress_pl.quant.graph.graph import Graph, Node, WeightedNode
from swincompress_pl.quant.graph.nodes import ActivationNode, GatherNode
from swincompress_pl.quant.graph.quantizer_spec import Site
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.search import LayerProblem, best_balance, best_shifted_scale, best_value_scale


class LayerwiseSearch:
    """bounds: (C,) least and largest value of every site's channels, from which candidates begin. samples: consumed
    layer by layer.

    The switches are those of `SearchOptions`.
    """

    def __init__(
        self,
        quantized: QuantizedNetwork,
        bounds: Mapping[str, tuple[Tensor, Tensor]],
        samples: dict[str, LayerSample],
        *,
        balance: bool,
        shift: bool,
        bias_correction: bool,
    ) -> None:
        self.quantized, self.bounds, self.samples = quantized, bounds, samples
        self.balance, self.shift, self.bias_correction = balance, shift, bias_correction
        graph = quantized.graph
        self._linear_inputs = {
            source(graph, node.inputs[0]).output for node in graph.weighted_nodes if graph.site_of(node.inputs[0])
        }

    def run(self, *, progress: bool) -> None:
        nodes = self.quantized.graph.weighted_nodes
        with Progress(transient=True, disable=not progress) as bar:
            task = bar.add_task("searching scales", total=len(nodes))
            for node in nodes:
                self._layer(node)
                self._output(node)
                del self.samples[node.name]
                bar.advance(task)

    def _layer(self, node: WeightedNode) -> None:
        """Input scale (with its ratios and sign) and weight steps of one layer; then its bias."""
        scales, site = self.quantized.scales, self.quantized.graph.site_of(node.inputs[0])
        problem = self._problem(node, site)
        without = self._without_sign(node, problem, site)
        if site is not None and without is not None and without.coarse_error() < problem.coarse_error():
            self.quantized.make_unsigned([site.name])
            assert without.shift is not None
            scales.site(site).shift.copy_(without.shift)
            problem = without
        scale, step = problem.solve()
        scales.weight_scale(node).step.copy_(step)
        if scale is not None and site is not None:
            scales.site(site).scale.fill_(scale)
        if self.bias_correction:
            x = problem.x if scale is None else problem.quantized_input(scale)
            node.add_to_bias(self.quantized.network, (problem.target - x @ problem.quantized_weight(step).T).mean(0))

    def _problem(self, node: WeightedNode, site: Site | None) -> LayerProblem:
        network, scales = self.quantized.network, self.quantized.scales
        x, sensitivity = self.samples[node.name].rows
        weight = node.search_weight(network)
        weight_q_max = scales.weight_scale(node).q_max
        magnitude, shift = None, None
        if site is not None and site.searched:
            low, high = self.bounds[site.name]
            magnitude = float(torch.maximum(-low, high).max())
            if site.balanced and self.balance:
                ratios, shift = best_balance(
                    x,
                    weight,
                    sensitivity,
                    (low, high),
                    shift=self.shift and site.shiftable,
                    q_max=site.q_max,
                    weight_q_max=weight_q_max,
                )
                scales.site(site).balance.copy_(ratios)
                if site.shiftable:
                    scales.site(site).shift.copy_(shift)
                magnitude = float((torch.maximum(-(low + shift), high + shift) / ratios).max())
                x, weight, shift = x / ratios, weight * ratios, shift / ratios
        return LayerProblem(
            x=x,
            weight=weight,
            sensitivity=sensitivity,
            magnitude=magnitude if magnitude else None,
            shift=shift,
            q_max=127 if site is None else site.q_max,
            signed=True if site is None else site.signed,
            weight_q_max=weight_q_max,
        )

    def _without_sign(self, node: WeightedNode, problem: LayerProblem, site: Site | None) -> LayerProblem | None:
        """The same with codes from 0 to 2 q_max + 1 for the output of a non-linearity plus a constant: none of them is
        then spent on values below the least, and GELU's steps halve. None where that cannot be."""
        if site is None or not (self.shift and site.shiftable and site.signed) or problem.magnitude is None:
            return None
        if not isinstance(source(self.quantized.graph, node.inputs[0]), ActivationNode):
            return None
        low, high = self.bounds[site.name]
        shift = (-low.min()).clamp(min=0).reshape(1)
        magnitude = float(high.max().clamp(min=0) + shift)
        return replace(problem, signed=False, q_max=2 * problem.q_max + 1, shift=shift, magnitude=magnitude)

    def _output(self, node: WeightedNode) -> None:
        """The output's scales, where no linear layer reads it: each segment by the error of its own values."""
        site = self.quantized.graph.site_of(node.output)
        if site is None or not site.searched or node.output in self._linear_inputs:
            return
        network = self.quantized.network
        x, sensitivity = self.samples[node.name].rows
        values = x @ node.search_weight(network).T
        bias = node.folded_bias(network)
        values = values if bias is None else values + bias
        scale, (low, high) = self.quantized.scales.site(site), self.bounds[site.name]
        if self.shift and site.shiftable and site.signed and not site.balanced:
            ends = float(low.min()), float(high.max())
            if any(ends):
                found, shift = best_shifted_scale(values, sensitivity, q_max=site.q_max, bounds=ends)
                scale.scale.fill_(found)
                scale.shift.fill_(shift)
            return
        sizes = list(site.segments)
        clip = torch.maximum(-low, high)
        parts = zip(values.split(sizes, 1), sensitivity.split(sizes, 1), clip.split(sizes), strict=True)
        for number, (part, weight, magnitude) in enumerate(parts):
            if float(magnitude.max()) > 0:
                scale.scale[number] = best_value_scale(
                    part, weight, q_max=site.q_max, signed=site.signed, magnitude=float(magnitude.max())
                )


def source(graph: Graph, value: str) -> Node:
    """The node that made a value, chains of gathers left out. KeyError for the image."""
    makers = {node.output: node for node in graph.nodes}
    node = makers[value]
    while isinstance(node, GatherNode):
        node = makers[node.inputs[0]]
    return node
