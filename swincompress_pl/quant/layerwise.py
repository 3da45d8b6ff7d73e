"""Walks the graph and searches the scales around every weighted layer, one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rich.progress import Progress
from torch import Tensor

from swincompress_pl.quant.calibration import LayerSample
from swincompress_pl.quant.graph import Graph, Node, Site, WeightedNode
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.nodes import ActivationNode, GatherNode
from swincompress_pl.quant.search import LayerProblem, best_balance, best_value_scale


class LayerwiseSearch:
    """clips: (C,) magnitude of every site's channels, from which candidates begin. samples: consumed layer by layer.

    The switches are those of `SearchOptions`.
    """

    def __init__(
        self,
        quantized: QuantizedNetwork,
        clips: Mapping[str, Tensor],
        samples: dict[str, LayerSample],
        *,
        balance: bool,
        unsigned: bool,
        bias_correction: bool,
    ) -> None:
        self.quantized, self.clips, self.samples = quantized, clips, samples
        self.balance, self.unsigned, self.bias_correction = balance, unsigned, bias_correction
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
        if site is not None and problem.magnitude is not None and self._better_unsigned(node, problem):
            self.quantized.make_unsigned([site.name])
            problem = _without_sign(problem)
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
        weight = node.folded_weight(network, None).flatten(1)
        weight_q_max = scales.weight_scale(node).q_max
        magnitude = None
        if site is not None and site.searched:
            clip = self.clips[site.name]
            if site.balanced and self.balance:
                ratios = best_balance(x, weight, sensitivity, clip, q_max=site.q_max, weight_q_max=weight_q_max)
                scales.site(site).balance.copy_(ratios)
                x, weight, clip = x / ratios, weight * ratios, clip / ratios
            magnitude = float(clip.max())
        return LayerProblem(
            x=x,
            weight=weight,
            sensitivity=sensitivity,
            magnitude=magnitude if magnitude else None,
            q_max=127 if site is None else site.q_max,
            signed=True if site is None else site.signed,
            weight_q_max=weight_q_max,
        )

    def _better_unsigned(self, node: WeightedNode, problem: LayerProblem) -> bool:
        """Whether the layer that reads a non-linearity does better without the sign: twice the steps above zero."""
        maker = source(self.quantized.graph, node.inputs[0])
        if not (self.unsigned and problem.signed and isinstance(maker, ActivationNode)):
            return False
        return _without_sign(problem).coarse_error() < problem.coarse_error()

    def _output(self, node: WeightedNode) -> None:
        """The output's scales, where no linear layer reads it: each segment by the error of its own values."""
        site = self.quantized.graph.site_of(node.output)
        if site is None or not site.searched or node.output in self._linear_inputs:
            return
        network = self.quantized.network
        x, sensitivity = self.samples[node.name].rows
        values = x @ node.folded_weight(network, None).flatten(1).T
        bias = node.folded_bias(network)
        values = values if bias is None else values + bias
        sizes = list(site.segments)
        parts = zip(
            values.split(sizes, 1), sensitivity.split(sizes, 1), self.clips[site.name].split(sizes), strict=True
        )
        scale = self.quantized.scales.site(site).scale
        for number, (part, weight, magnitude) in enumerate(parts):
            if float(magnitude.max()) > 0:
                scale[number] = best_value_scale(
                    part, weight, q_max=site.q_max, signed=site.signed, magnitude=float(magnitude.max())
                )


def source(graph: Graph, value: str) -> Node:
    """The node that made a value, chains of gathers left out. KeyError for the image."""
    makers = {node.output: node for node in graph.nodes}
    node = makers[value]
    while isinstance(node, GatherNode):
        node = makers[node.inputs[0]]
    return node


def _without_sign(problem: LayerProblem) -> LayerProblem:
    """The same with codes from 0 to 2 q_max + 1, and candidates from the largest positive value."""
    largest = float(problem.x.max())
    assert problem.magnitude is not None
    magnitude = min(problem.magnitude, largest) if largest > 0 else problem.magnitude
    return replace(problem, signed=False, q_max=2 * problem.q_max + 1, magnitude=magnitude)
