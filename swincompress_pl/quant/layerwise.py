"""Walks through the graph and searches the scales around each weighted layer, one layer after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from swincompress_pl.quant.calibration import LayerSample
from swincompress_pl.quant.graph import Graph, Node, QuantizerSpec, WeightedNode
from swincompress_pl.quant.graph.nodes import ActivationNode, GatherNode
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.progress import Progress, track
from swincompress_pl.quant.search import LayerProblem, best_centered_scale, best_equalization, best_value_scale


class LayerwiseSearch:
    """The search for the scales of a calibrated network, with the switches of `SearchOptions`.

    `bounds` has the least and the largest value of the channels of each quantizer, (C,) each, from which the candidates
    start. `samples` are removed layer by layer.
    """

    def __init__(
        self,
        quantized: QuantizedNetwork,
        bounds: Mapping[str, tuple[Tensor, Tensor]],
        samples: dict[str, LayerSample],
        *,
        equalize: bool,
        center: bool,
        bias_correction: bool,
    ) -> None:
        self.quantized, self.bounds, self.samples = quantized, bounds, samples
        self.equalize, self.center, self.bias_correction = equalize, center, bias_correction
        graph = quantized.graph
        self._linear_inputs = {
            source(graph, node.inputs[0]).output for node in graph.weighted_nodes if graph.spec_of(node.inputs[0])
        }

    def run(self, *, progress: Progress) -> None:
        """Searches the scales of all layers."""
        for node in track(self.quantized.graph.weighted_nodes, "searching scales", progress):
            self._layer(node)
            self._output(node)
            del self.samples[node.name]

    def _layer(self, node: WeightedNode) -> None:
        """Finds the input scale of a layer, with ratios and sign, and its weight steps; then corrects its bias."""
        scales, spec = self.quantized.scales, self.quantized.graph.spec_of(node.inputs[0])
        problem = self._problem(node, spec)
        without = self._without_sign(node, problem, spec)
        if spec is not None and without is not None and without.coarse_error() < problem.coarse_error():
            self.quantized.make_unsigned([spec.name])
            assert without.centering is not None
            scales.activation_quantizer(spec).centering.copy_(without.centering)
            problem = without
        scale, step = problem.solve()
        scales.weight_quantizer(node).step.copy_(step)
        if scale is not None and spec is not None:
            scales.activation_quantizer(spec).scale.fill_(scale)
        if self.bias_correction:
            x = problem.x if scale is None else problem.quantized_input(scale)
            node.add_to_bias(self.quantized.network, (problem.target - x @ problem.quantized_weight(step).T).mean(0))

    def _problem(self, node: WeightedNode, spec: QuantizerSpec | None) -> LayerProblem:
        network, scales = self.quantized.network, self.quantized.scales
        x, sensitivity = self.samples[node.name].rows
        weight = node.search_weight(network)
        weight_q_max = scales.weight_quantizer(node).q_max
        magnitude, centering = None, None
        if spec is not None and spec.searched:
            low, high = self.bounds[spec.name]
            magnitude = float(torch.maximum(-low, high).max())
            if spec.equalized and self.equalize:
                ratios, centering = best_equalization(
                    x,
                    weight,
                    sensitivity,
                    (low, high),
                    center=self.center and spec.can_center,
                    q_max=spec.q_max,
                    weight_q_max=weight_q_max,
                )
                scales.activation_quantizer(spec).equalization.copy_(ratios)
                if spec.can_center:
                    scales.activation_quantizer(spec).centering.copy_(centering)
                magnitude = float((torch.maximum(-(low + centering), high + centering) / ratios).max())
                x, weight, centering = x / ratios, weight * ratios, centering / ratios
        return LayerProblem(
            x=x,
            weight=weight,
            sensitivity=sensitivity,
            magnitude=magnitude if magnitude else None,
            centering=centering,
            q_max=127 if spec is None else spec.q_max,
            signed=True if spec is None else spec.signed,
            weight_q_max=weight_q_max,
            step=node.exact_step(weight, weight_q_max),
        )

    def _without_sign(
        self, node: WeightedNode, problem: LayerProblem, spec: QuantizerSpec | None
    ) -> LayerProblem | None:
        """The same problem with codes from 0 to 2 q_max + 1, for the output of a non-linearity plus a constant.

        No code is then spent on values below the least one, and GELU's steps halve. None if the codes need a sign.
        """
        if spec is None or not (self.center and spec.can_center and spec.signed) or problem.magnitude is None:
            return None
        if not isinstance(source(self.quantized.graph, node.inputs[0]), ActivationNode):
            return None
        low, high = self.bounds[spec.name]
        centering = (-low.min()).clamp(min=0).reshape(1)
        magnitude = float(high.max().clamp(min=0) + centering)
        return replace(problem, signed=False, q_max=2 * problem.q_max + 1, centering=centering, magnitude=magnitude)

    def _output(self, node: WeightedNode) -> None:
        """Finds the scales of an output that no linear layer reads, each segment by the error of its own values."""
        spec = self.quantized.graph.spec_of(node.output)
        if spec is None or not spec.searched or node.output in self._linear_inputs:
            return
        network = self.quantized.network
        x, sensitivity = self.samples[node.name].rows
        values = x @ node.search_weight(network).T
        bias = node.folded_bias(network)
        values = values if bias is None else values + bias
        scale, (low, high) = self.quantized.scales.activation_quantizer(spec), self.bounds[spec.name]
        if self.center and spec.can_center and spec.signed and not spec.equalized:
            ends = float(low.min()), float(high.max())
            if any(ends):
                found, centering = best_centered_scale(values, sensitivity, q_max=spec.q_max, bounds=ends)
                scale.scale.fill_(found)
                scale.centering.fill_(centering)
            return
        sizes = list(spec.segments)
        clip = torch.maximum(-low, high)
        parts = zip(values.split(sizes, 1), sensitivity.split(sizes, 1), clip.split(sizes), strict=True)
        for number, (part, weight, magnitude) in enumerate(parts):
            if float(magnitude.max()) > 0:
                scale.scale[number] = best_value_scale(
                    part, weight, q_max=spec.q_max, signed=spec.signed, magnitude=float(magnitude.max())
                )


def source(graph: Graph, value: str) -> Node:
    """The node that made a value, before any gathers; a KeyError is raised for the image."""
    makers = {node.output: node for node in graph.nodes}
    node = makers[value]
    while isinstance(node, GatherNode):
        node = makers[node.inputs[0]]
    return node
