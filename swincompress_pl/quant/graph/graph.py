"""The quantizable graph of a network: which values exist, which of them carry a scale, and which modules make them.

An adapter in `models/` writes the graph of its family once; everything else follows from it: the float pass that
calibration watches, the fake-quantized pass that training differentiates, and the integer Program. Values are token
matrices `(N, rows, channels)`; the input is the normalized image `(N, C, H, W)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from swincompress_pl._deprecated import renamed, renamed_attributes
from swincompress_pl.quant.graph.quantizer_spec import EMBEDDING, QuantizerSpec
from swincompress_pl.spec import INPUT_VALUE, Operation, multiplier
from swincompress_pl.spec.spiking import CURRENT_MAX

FloatArray = npt.NDArray[np.float64]
_PASSING = ("linear", "layer_norm", "table", "gather")


class Quantizer(Protocol):
    """What happens to values and weights on the way through the graph: nothing, observation, or fake quantization.

    equalizations: ratios (C,) of the channels to the scale, for the equalized quantizers, by name.
    """

    @property
    def equalizations(self) -> Mapping[str, Tensor]: ...

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor: ...

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor: ...

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...


class Passthrough:
    """The float network."""

    @property
    def equalizations(self) -> Mapping[str, Tensor]:
        return {}

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        return x

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return weight

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None


class Delegating:
    """A quantizer that leaves everything to another one, `inner`; subclasses do something beside it, or instead."""

    def __init__(self, inner: Quantizer) -> None:
        self.inner = inner

    @property
    def equalizations(self) -> Mapping[str, Tensor]:
        return self.inner.equalizations

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        return self.inner.activation(spec, x)

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return self.inner.weight(node, weight)

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inner.output(node, inputs, output)


@renamed_attributes(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of the graph. `output` is the name of the value that it makes, by default its own. `quantizer` names the
    activation quantizer of that; None: it is in the unit of the first input.

    `regularizers` are paths of dropout and stochastic-depth modules that act on the output in training.
    """

    name: str
    inputs: tuple[str, ...]
    output: str = ""
    quantizer: str | None = None
    regularizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", self.output or self.name)

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def lower(self, lowering: Lowering) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WeightedNode(Node):
    """A linear layer or convolution: has quantized weights with one step per output channel."""

    module: str

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """(M, K...) the weight as it is quantized: with input ratios and layer scale folded in."""
        raise NotImplementedError

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """(M,) the real bias, or None."""
        raise NotImplementedError

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Make `folded_weight` give (M, K...) `folded`, in the network itself."""
        raise NotImplementedError

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Add (M,) to what `folded_bias` gives, in the network itself; a layer without a bias stays as it is."""
        raise NotImplementedError

    def input_rows(self, network: nn.Module, x: Tensor) -> Tensor:
        """(N, rows, K) the input as the rows that `search_weight` multiplies."""
        raise NotImplementedError

    def search_weight(self, network: nn.Module) -> Tensor:
        """(M, K) the folded weight without ratios, as the matrix that a search tries steps on."""
        return self.folded_weight(network, None).flatten(1)

    def sampled_rows(self, network: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """(R, K) some of the rows, counted over the whole batch."""
        return self.input_rows(network, x).flatten(0, 1)[index]

    def groups(self, network: nn.Module) -> int:
        """Into how many equal parts outputs and inputs split, that have nothing to do with each other."""
        return 1

    def grid(self, network: nn.Module, step: Tensor, equalization: Tensor | None) -> float:
        """The step (M,) of the folded weight in the network's own weight, for a typical channel."""
        return float(step.median()) / (1.0 if equalization is None else float(equalization.median()))

    def exact_step(self, weight: Tensor, q_max: int) -> Tensor | None:
        """(M,) steps at which the matrix `weight` is exact, or None where they are to be searched."""
        return None

    def settled_step(self, network: nn.Module, step: Tensor, in_scale: float) -> Tensor:
        """(M,) the steps nearest to these that what reads the layer can take."""
        return step


@renamed(sites="quantizers")
@renamed_attributes(site_of="spec_of", sites="quantizers")
@dataclass(frozen=True, kw_only=True)
class Graph:
    """Sites by name and nodes in order; the last node writes the logits, or the features of a network without a
    classifier. time_steps: of events; None for images."""

    quantizers: dict[str, QuantizerSpec]
    nodes: tuple[Node, ...]
    height: int
    width: int
    channels: int
    time_steps: int | None = None

    def __post_init__(self) -> None:
        owner: dict[str, str | None] = {INPUT_VALUE: None}
        for node in self.nodes:
            missing = [name for name in node.inputs if name not in owner]
            if missing or node.output in owner:
                raise ValueError(f"graph node {node.name!r}: reads unknown {missing} or rewrites {node.output!r}")
            if node.quantizer is not None and node.quantizer not in self.quantizers:
                raise ValueError(f"graph node {node.name!r}: unknown quantizer {node.quantizer!r}")
            owner[node.output] = node.quantizer if node.quantizer is not None else owner[node.inputs[0]]
        object.__setattr__(self, "_spec_of", owner)
        last = {name: number for number, node in enumerate(self.nodes) for name in node.inputs}
        object.__setattr__(self, "_last_use", last)

    @property
    def embeds(self) -> bool:
        """Whether it gives features, for a head outside the network, instead of classes."""
        return self.nodes[-1].quantizer == EMBEDDING

    def last_use(self, value: str) -> int:
        """The number of the last node that reads a value; -1: none does."""
        uses: dict[str, int] = self._last_use  # type: ignore[attr-defined]
        return uses.get(value, -1)

    def blocks(self) -> list[range]:
        """The numbers of the nodes, cut wherever a single value is all that goes on, with weights in every part."""
        found: list[range] | None = vars(self).get("_blocks")
        if found is None:
            found = self._find_blocks()
            object.__setattr__(self, "_blocks", found)
        return list(found)

    def _find_blocks(self) -> list[range]:
        blocks, start = [], 0
        for number, node in enumerate(self.nodes):
            alive = {n.output for n in self.nodes[: number + 1] if self.last_use(n.output) > number}
            later = any(isinstance(n, WeightedNode) for n in self.nodes[number + 1 :])
            weighted = any(isinstance(n, WeightedNode) for n in self.nodes[start : number + 1])
            if alive <= {node.output} and weighted and later:
                blocks.append(range(start, number + 1))
                start = number + 1
        return [*blocks, range(start, len(self.nodes))]

    def spec_of(self, value: str) -> QuantizerSpec | None:
        """The quantizer in whose unit `value` is; None for the pixels."""
        name = self._spec_of[value]  # type: ignore[attr-defined]
        return None if name is None else self.quantizers[name]

    def check_images(self, images: Tensor) -> None:
        """ValueError for images of another shape than the network takes."""
        time = () if self.time_steps is None else (self.time_steps,)
        expected = (*time, self.channels, self.height, self.width)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this network takes (N, {', '.join(map(str, expected))})"
            )

    @property
    def weighted_nodes(self) -> tuple[WeightedNode, ...]:
        return tuple(node for node in self.nodes if isinstance(node, WeightedNode))


@renamed_attributes(balance="equalization")
class Run:
    """One pass of the graph over a network with a quantizer."""

    def __init__(self, graph: Graph, network: nn.Module, quantizer: Quantizer) -> None:
        self.graph, self.network, self.quantizer = graph, network, quantizer

    def __call__(self, images: Tensor) -> Tensor:
        """images: normalized float (N, C, H, W), or events (N, T, C, H, W) -> logits (N, classes)."""
        self.graph.check_images(images)
        return self.walk({INPUT_VALUE: images})[self.graph.nodes[-1].output].flatten(1)

    def walk(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all nodes."""
        return self.advance(values, range(len(self.graph.nodes)))

    def advance(self, values: Mapping[str, Tensor], numbers: range) -> dict[str, Tensor]:
        """Run the nodes of these numbers on what is known so far: the values that later nodes read, or the result."""
        known = dict(values)
        for number in numbers:
            node = self.graph.nodes[number]
            inputs = tuple(known[name] for name in node.inputs)
            output = node.forward(self, *inputs)
            self.quantizer.output(node, inputs, output)
            if node.quantizer is not None:
                output = self.quantizer.activation(self.graph.quantizers[node.quantizer], output)
            for path in node.regularizers:
                output = self.network.get_submodule(path)(output)
            known[node.output] = output
            for name in node.inputs:
                if self.graph.last_use(name) == number:
                    known.pop(name, None)
        return known

    def weight(self, node: WeightedNode) -> Tensor:
        """The weight of `node` as this pass uses it, input ratios divided out again."""
        equalization = self.equalization(node)
        folded = self.quantizer.weight(node, node.folded_weight(self.network, equalization))
        return folded if equalization is None else folded / equalization

    def equalization(self, node: WeightedNode) -> Tensor | None:
        """(K,) ratios of the input's channels to its scale, or None."""
        spec = self.graph.spec_of(node.inputs[0])
        return None if spec is None else self.quantizer.equalizations.get(spec.name)


def to_array(tensor: Tensor) -> FloatArray:
    return tensor.detach().to("cpu", torch.float64).numpy()


@dataclass(frozen=True, kw_only=True)
class Current:
    """Accumulators that a neuron reads as they are: (C,) their unit; (C,) the real bias that is still to be added; the
    largest magnitude that they can reach."""

    unit: FloatArray
    bias: FloatArray
    reach: float


@renamed_attributes(shift="centering", site="spec")
class Lowering:
    """Gathers the operations and tensors of a Program while the graph's nodes write themselves into it.

    How a value or a weight is scaled is for the subclass to say (`quant.lower`).
    """

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        self.graph, self.network = graph, network
        self.operations: list[Operation] = []
        self.tensors: dict[str, npt.NDArray[Any]] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.currents: dict[str, Current] = {}

    def segment_scales(self, value: str) -> FloatArray:
        """(segments,) scales of a value."""
        raise NotImplementedError

    def ratios(self, value: str) -> FloatArray:
        """(C,) or (1,): ratios of the channels to the value's scale."""
        raise NotImplementedError

    def centering(self, value: str) -> FloatArray:
        """(C,) or (1,): what the codes of a value stand for beyond it; 0 for pixels and where nothing is centered."""
        raise NotImplementedError

    def scales(self, value: str) -> FloatArray:
        """(C,) scale of every channel, ratios included."""
        raise NotImplementedError

    def weight(self, node: WeightedNode) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """(weight_q, step): integer weight and its step per output channel."""
        raise NotImplementedError

    def spec(self, value: str) -> QuantizerSpec:
        spec = self.graph.spec_of(value)
        if spec is None:
            raise ValueError(f"value {value!r} has no scale")
        return spec

    def scalar_scale(self, value: str) -> float:
        """The one scale of a value; per-channel ratios, where it has them, are in the next layer's weights."""
        scales = self.segment_scales(value)
        if len(scales) != 1:
            raise ValueError(f"value {value!r} has {len(scales)} scales where one is needed")
        return float(scales[0])

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
        spec = self.spec(node.output)
        codes = np.rint(real / self.scales(node.output))
        return np.ascontiguousarray(np.clip(codes, -spec.q_max, spec.q_max).astype(spec.storage))

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
        if kind not in _PASSING and any(self.centering(value).any() for value in (*node.inputs, node.output)):
            raise ValueError(
                f"operation {kind!r} cannot absorb the centering of its values; only {', '.join(_PASSING)} can"
            )
        keys = {role: self._store(node.name, role, tensor) for role, tensor in (tensors or {}).items()}
        self.operations.append(
            Operation(
                kind=kind,
                name=node.name,
                inputs=node.inputs,
                output=node.output,
                dtype=self.spec(node.output).dtype,
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


def parameter(network: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(network.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{path} is {type(tensor).__name__}, not a tensor")
    return tensor


def float_logits(graph: Graph, network: nn.Module, images: Tensor) -> Tensor:
    """The float network through its graph; equal to `network(images)` up to float rounding."""
    with torch.no_grad():
        return Run(graph, network, Passthrough())(images)
