"""From a graph with scales to an integer Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from swincompress_pl.quant.scales import quantize_weight
from swincompress_pl.spec import InputDescription, Operation, Program, check, multiplier
from swincompress_pl.spec.spiking import CURRENT_MAX

if TYPE_CHECKING:
    from swincompress_pl.quant.graph.graph import Graph, Node, Site, WeightedNode
    from swincompress_pl.quant.scales import Scales

FloatArray = npt.NDArray[np.float64]
_PASSING = ("linear", "layer_norm", "table", "gather")


def to_array(tensor: Tensor) -> FloatArray:
    return tensor.detach().to("cpu", torch.float64).numpy()


@dataclass(frozen=True, kw_only=True)
class Current:
    """Accumulators that a neuron reads as they are: (C,) their unit; (C,) the real bias that is still to be added; the
    largest magnitude that they can reach."""

    unit: FloatArray
    bias: FloatArray
    reach: float


class Lowering:
    """Gathers the operations and tensors of a Program while the graph's nodes write themselves into it."""

    def __init__(self, graph: Graph, network: nn.Module, scales: Scales) -> None:
        self.graph, self.network, self._scales = graph, network, scales
        self.operations: list[Operation] = []
        self.tensors: dict[str, npt.NDArray[Any]] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.currents: dict[str, Current] = {}

    def site(self, value: str) -> Site:
        site = self.graph.site_of(value)
        if site is None:
            raise ValueError(f"value {value!r} has no scale")
        return site

    def segment_scales(self, value: str) -> FloatArray:
        """(segments,) scales of a value."""
        return to_array(self._scales.site(self.site(value)).checked_scale())

    def scalar_scale(self, value: str) -> float:
        """The one scale of a value; per-channel ratios, where it has them, are in the next layer's weights."""
        scales = self.segment_scales(value)
        if len(scales) != 1:
            raise ValueError(f"value {value!r} has {len(scales)} scales where one is needed")
        return float(scales[0])

    def ratios(self, value: str) -> FloatArray:
        """(C,) or (1,): ratios of the channels to the value's scale."""
        site = self.graph.site_of(value)
        return np.ones(1) if site is None or not site.balanced else to_array(self._scales.site(site).balance)

    def shift(self, value: str) -> FloatArray:
        """(C,) or (1,): what the codes of a value stand for beyond it; 0 for pixels and where nothing is shifted."""
        site = self.graph.site_of(value)
        if site is None or not site.shiftable:
            return np.zeros(1)
        return to_array(self._scales.site(site).shift)

    def scales(self, value: str) -> FloatArray:
        """(C,) scale of every channel, ratios included."""
        return to_array(self._scales.site(self.site(value)).channel_scales())

    def current(self, value: str) -> Current:
        """What a neuron reads; a stream's may be anything, since its unit leaves no fraction to gain."""
        if value in self.currents:
            return self.currents[value]
        scales = self.scales(value)
        return Current(unit=scales, bias=np.zeros(len(scales)), reach=float(CURRENT_MAX))

    def pass_current(self, value: str, output: str) -> None:
        """`output` holds a choice of the same accumulators."""
        if value in self.currents:
            self.currents[output] = self.currents[value]

    def counted(self, output: str, channels: int, reach: float) -> None:
        """`output` holds sums of spikes."""
        self.currents[output] = Current(unit=np.ones(channels), bias=np.zeros(channels), reach=reach)

    def weight(self, node: WeightedNode) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """(weight_q, step): integer weight and its step per output channel."""
        site = self.graph.site_of(node.inputs[0])
        balance = None if site is None or not site.balanced else self._scales.site(site).balance
        folded = node.folded_weight(self.network, balance)
        step = self._scales.step(node)
        weight_q = quantize_weight(folded, step, self._scales.weight_scale(node).q_max).to("cpu", torch.int8).numpy()
        return weight_q, to_array(step)

    def bias(self, node: Node, real: FloatArray, unit: FloatArray) -> npt.NDArray[np.int32]:
        """Bias in accumulator units; ValueError where it leaves no room in int32."""
        bias = np.rint(real / unit)
        if not (np.abs(bias) < 2**30).all():
            worst = int(np.argmax(np.abs(bias)))
            raise ValueError(
                f"bias {real.flat[worst]:.3g} is {abs(bias.flat[worst]):.3g} accumulator steps, beyond 2**30; "
                f"its weights are too small for it: recalibrate, or prune the channel"
            )
        return bias.astype(np.int32)

    def constant(self, node: Node, real: FloatArray) -> npt.NDArray[Any]:
        """Constant tokens in the unit of the node's output."""
        site = self.site(node.output)
        codes = np.rint(real / self.scales(node.output))
        return np.ascontiguousarray(np.clip(codes, -site.q_max, site.q_max).astype(site.storage))

    def requantization(self, factor: FloatArray) -> dict[str, npt.NDArray[Any]]:
        mult, shift = multiplier(factor)
        return {"mult": mult, "shift": shift}

    def emit(
        self,
        node: Node,
        kind: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        if kind not in _PASSING and any(self.shift(value).any() for value in (*node.inputs, node.output)):
            raise ValueError(f"operation {kind!r} cannot absorb the shift of its site; only {', '.join(_PASSING)} can")
        keys = {role: self._store(node.name, role, tensor) for role, tensor in (tensors or {}).items()}
        self.operations.append(
            Operation(
                kind=kind,
                name=node.name,
                inputs=node.inputs,
                output=node.output,
                dtype=self.site(node.output).dtype,
                attributes=dict(attributes or {}),
                tensors=keys,
            )
        )

    def _store(self, name: str, role: str, tensor: npt.NDArray[Any]) -> str:
        """Equal tensors are stored once: the window indices of a stage serve all its blocks."""
        tensor = np.ascontiguousarray(tensor)
        identity = (str(tensor.dtype), tensor.shape, tensor.tobytes())
        key = self._shared.setdefault(identity, f"{name}.{role}")
        self.tensors[key] = tensor
        return key


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
    """The integer Program of a network; checked, so all bounds of the norm hold on any input.

    Raises ValueError naming the node for scales that are missing, not finite or contradictory, and for NaN weights.
    """
    lowering = Lowering(graph, network, scales)
    for node in graph.nodes:
        try:
            node.lower(lowering)
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from error
    program = Program(
        input=InputDescription(
            height=graph.height,
            width=graph.width,
            channels=graph.channels,
            time_steps=graph.time_steps,
            preprocessing=dict(preprocessing),
        ),
        operations=tuple(lowering.operations),
        tensors=lowering.tensors,
        logit_scale=lowering.scalar_scale(graph.nodes[-1].output),
        classes=classes,
        origin=dict(origin or {}),
    )
    check(program)
    return program
