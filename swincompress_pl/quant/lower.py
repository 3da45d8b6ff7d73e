"""Lowers a graph with scales to an integer Program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from swincompress_pl.quant.graph import Graph, Lowering, WeightedNode
from swincompress_pl.quant.graph.graph import FloatArray, to_array
from swincompress_pl.quant.graph.outputs import GraphOutput
from swincompress_pl.quant.quantizers import quantize_weight
from swincompress_pl.quant.scales import Scales
from swincompress_pl.spec import InputDescription, Output, Program


class ScaledLowering(Lowering):
    """A lowering with the scales and steps of `scales`, which must be fixed (`Scales.fixed`)."""

    def __init__(self, graph: Graph, network: nn.Module, scales: Scales) -> None:
        super().__init__(graph, network)
        self._scales = scales

    def segment_scales(self, value: str) -> FloatArray:
        """The scales of a value's segments, (segments,)."""
        return to_array(self._scales.activation_quantizer(self.spec(value)).checked_scale())

    def ratios(self, value: str) -> FloatArray:
        """The ratios of a value's channels to its scale, (C,) or (1,)."""
        ratios = self._equalization(value)
        return np.ones(1) if ratios is None else to_array(ratios)

    def _equalization(self, value: str) -> Tensor | None:
        spec = self.graph.spec_of(value)
        return self._scales.activation_quantizer(spec).equalization if spec is not None and spec.equalized else None

    def centering(self, value: str) -> FloatArray:
        """The constant that the codes of a value include, (C,) or (1,)."""
        spec = self.graph.spec_of(value)
        if spec is None or not spec.can_center:
            return np.zeros(1)
        return to_array(self._scales.activation_quantizer(spec).centering)

    def scales(self, value: str) -> FloatArray:
        """The scale of every channel of a value, (C,)."""
        return to_array(self._scales.activation_quantizer(self.spec(value)).channel_scales())

    def weight(self, node: WeightedNode) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """The integer weight of a layer and its steps (M,)."""
        folded = node.folded_weight(self.network, self._equalization(node.inputs[0]))
        step, q_max = self._scales.step(node), self._scales.weight_quantizer(node).q_max
        weight_q = quantize_weight(folded, step, q_max).to("cpu", torch.int8).numpy()
        return weight_q, to_array(step)


@torch.no_grad()
def lower(
    graph: Graph,
    network: nn.Module,
    scales: Scales,
    *,
    preprocessing: Mapping[str, Any],
    classes: tuple[str, ...] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Program:
    """The integer Program of a network; whatever runs or writes it (twin, engine, artifact) checks its bounds first.

    A ValueError that names the node is raised for scales that are missing, not finite or contradictory, and for weights
    that are not finite.
    """
    lowering = ScaledLowering(graph, network, scales)
    for node in graph.nodes:
        try:
            node.lower(lowering)
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from error
    outputs = tuple(_output(lowering, output) for output in graph.outputs)
    return Program(
        input=InputDescription(
            height=graph.height,
            width=graph.width,
            channels=graph.channels,
            time_steps=graph.time_steps,
            preprocessing=dict(preprocessing),
        ),
        operations=tuple(lowering.operations),
        tensors=lowering.tensors,
        logit_scale=1.0 if outputs else lowering.scalar_scale(graph.nodes[-1].output),
        classes=None if outputs else classes,
        origin=dict(origin or {}),
        outputs=outputs,
    )


def _output(lowering: ScaledLowering, output: GraphOutput) -> Output:
    """The named output of a Program; its value may have one scale, and neither ratios nor a centering."""
    if (lowering.ratios(output.value) != 1).any() or lowering.centering(output.value).any():
        raise ValueError(f"output {output.name!r}: {output.value!r} has ratios or a centering, which no reader undoes")
    return Output(name=output.name, value=output.value, scale=lowering.scalar_scale(output.value), shape=output.shape)
