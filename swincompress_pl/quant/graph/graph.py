"""The quantizable graph of a network: which values exist, which of them have a scale, and which modules make them.

An adapter in `models/` writes the graph of its family once. Everything else follows from it: the float pass that
calibration observes, the fake-quantized pass that training differentiates, and the integer Program. Values are matrices
of tokens (N, rows, channels); the input is the normalized image (N, C, H, W).
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
from swincompress_pl.quant.graph.outputs import GraphOutput, joined
from swincompress_pl.quant.graph.quantizer_spec import EMBEDDING, QuantizerSpec
from swincompress_pl.spec import INPUT_VALUE, Operation, multiplier
from swincompress_pl.spec.spiking import CURRENT_MAX

FloatArray = npt.NDArray[np.float64]
_PASSING = ("linear", "layer_norm", "table", "gather")


class Quantizer(Protocol):
    """What happens to values and weights on their way through the graph: nothing, observation, or fake quantization."""

    @property
    def equalizations(self) -> Mapping[str, Tensor]:
        """The ratios (C,) of the channels to the scale, for each equalized quantizer by name."""
        ...

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        """Quantizes or observes a value.

        Args:
            spec: The quantizer of the value.
            x: The value, (..., C).

        Returns:
            The value that the next nodes read, of the same shape.
        """
        ...

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        """Quantizes or observes a weight.

        Args:
            node: The layer.
            weight: Its folded weight, (M, K...).

        Returns:
            The weight that the layer uses, of the same shape.
        """
        ...

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Observes what a node computes, before it is quantized.

        Args:
            node: The node.
            inputs: The values that it reads.
            output: The value that it makes.
        """
        ...


class Passthrough:
    """The quantizer of the float network, which changes and observes nothing."""

    @property
    def equalizations(self) -> Mapping[str, Tensor]:
        """No ratios."""
        return {}

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        """The value as it is."""
        return x

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        """The weight as it is."""
        return weight

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Does nothing."""
        return None


class Delegating:
    """A quantizer that leaves everything to another one, `inner`; subclasses override some of it."""

    def __init__(self, inner: Quantizer) -> None:
        self.inner = inner

    @property
    def equalizations(self) -> Mapping[str, Tensor]:
        """The ratios of `inner`."""
        return self.inner.equalizations

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        """The value that `inner` makes of it."""
        return self.inner.activation(spec, x)

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        """The weight that `inner` makes of it."""
        return self.inner.weight(node, weight)

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Passes the output to `inner`."""
        self.inner.output(node, inputs, output)


@renamed_attributes(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of the graph.

    Attributes:
        name: Its name, for messages and for the operation of the Program.
        inputs: Names of the values that it reads.
        output: Name of the value that it makes; "" for its own name.
        quantizer: Name of the activation quantizer of the output; None if the output has the unit of the first input.
        regularizers: Paths of the dropout and stochastic-depth modules that act on the output in training.
    """

    name: str
    inputs: tuple[str, ...]
    output: str = ""
    quantizer: str | None = None
    regularizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", self.output or self.name)

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Computes the output in float, before it is quantized.

        Args:
            run: The pass, which has the network and gives the weights (`Run.weight`).
            *inputs: The values that the node reads, each (N, rows, C).

        Returns:
            The value that it makes, (N, rows, C).
        """
        raise NotImplementedError

    def lower(self, lowering: Lowering) -> None:
        """Writes the node's operation into a Program.

        Args:
            lowering: The Program in the making, which has the network and the scales.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WeightedNode(Node):
    """A linear layer or convolution, whose quantized weights have one step per output channel.

    Attributes:
        name: As in `Node`.
        inputs: As in `Node`; the first one is multiplied with the weight.
        output: As in `Node`.
        quantizer: As in `Node`.
        regularizers: As in `Node`.
        module: Path of the module in the network.
    """

    module: str

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """Returns the weight that is quantized, with the ratios of the input and factors of the output folded in.

        Args:
            network: The network.
            equalization: Ratios (K,) of the input's channels; None for none.

        Returns:
            The weight, (M, K...).
        """
        raise NotImplementedError

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """Returns the real bias that goes with the folded weight.

        Args:
            network: The network.

        Returns:
            The bias, (M,); None if there is none.
        """
        raise NotImplementedError

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Writes to the network's parameters so that `folded_weight` returns `folded`.

        Args:
            network: The network.
            folded: The new folded weight, (M, K...).
            equalization: Ratios (K,) of the input's channels; None for none.
        """
        raise NotImplementedError

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Adds to the folded bias, in the network's parameters; a layer without a bias stays as it is.

        Args:
            network: The network.
            change: What is added, (M,).
        """
        raise NotImplementedError

    def input_rows(self, network: nn.Module, x: Tensor) -> Tensor:
        """Returns the input as the rows that are multiplied with `search_weight`.

        Args:
            network: The network.
            x: The value that the node reads.

        Returns:
            The rows, (N, rows, K).
        """
        raise NotImplementedError

    def search_weight(self, network: nn.Module) -> Tensor:
        """Returns the folded weight without ratios, as the matrix for which a search tries steps.

        Args:
            network: The network.

        Returns:
            The matrix, (M, K).
        """
        return self.folded_weight(network, None).flatten(1)

    def sampled_rows(self, network: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """Returns some of the rows of the input.

        Args:
            network: The network.
            x: The value that the node reads.
            index: Numbers (R,) of the rows, counted over the whole batch.

        Returns:
            The rows, (R, K).
        """
        return self.input_rows(network, x).flatten(0, 1)[index]

    def groups(self, network: nn.Module) -> int:
        """Returns the number of equal parts into which outputs and inputs split, each independent of the others.

        Args:
            network: The network.

        Returns:
            The number, 1 for a layer without groups.
        """
        return 1

    def grid(self, network: nn.Module, step: Tensor, equalization: Tensor | None) -> float:
        """Converts the steps of the folded weight to a step of the network's own weight, for a typical channel.

        Args:
            network: The network.
            step: Steps (M,) of the folded weight.
            equalization: Ratios (K,) of the input's channels; None for none.

        Returns:
            The step.
        """
        return float(step.median()) / (1.0 if equalization is None else float(equalization.median()))

    def exact_step(self, weight: Tensor, q_max: int) -> Tensor | None:
        """Returns the steps at which a weight is exact.

        Args:
            weight: The matrix, (M, K).
            q_max: The largest code.

        Returns:
            The steps, (M,); None if they have to be searched.
        """
        return None

    def settled_step(self, network: nn.Module, step: Tensor, in_scale: float) -> Tensor:
        """Returns the nearest steps that whatever reads the layer can work with.

        Args:
            network: The network.
            step: Steps (M,).
            in_scale: Scale of the input.

        Returns:
            The steps, (M,).
        """
        return step


@renamed(sites="quantizers")
@renamed_attributes(site_of="spec_of", sites="quantizers")
@dataclass(frozen=True, kw_only=True)
class Graph:
    """A quantizable network: its activation quantizers, and its nodes in the order of a pass.

    Attributes:
        quantizers: The activation quantizers by name.
        nodes: The nodes. Without `outputs`, the last one makes the logits, or the features of a network without a
            classifier.
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.
        channels: Channels of the images, or polarities of events.
        time_steps: Number of time steps of events; None for images.
        outputs: The named outputs of a network that gives a list of them, such as feature maps; () for logits.

    Raises:
        ValueError: If a node reads a value that no earlier node makes, makes one that there is already, or names an
            unknown quantizer; or if an output gives a value that no node makes, or has the name of another one.
    """

    quantizers: dict[str, QuantizerSpec]
    nodes: tuple[Node, ...]
    height: int
    width: int
    channels: int
    time_steps: int | None = None
    outputs: tuple[GraphOutput, ...] = ()

    def __post_init__(self) -> None:
        owner: dict[str, str | None] = {INPUT_VALUE: None}
        for node in self.nodes:
            missing = [name for name in node.inputs if name not in owner]
            if missing or node.output in owner:
                raise ValueError(f"graph node {node.name!r} reads unknown {missing} or rewrites {node.output!r}")
            if node.quantizer is not None and node.quantizer not in self.quantizers:
                raise ValueError(f"graph node {node.name!r} names an unknown quantizer {node.quantizer!r}")
            owner[node.output] = node.quantizer if node.quantizer is not None else owner[node.inputs[0]]
        for number, output in enumerate(self.outputs):
            taken = [other.name for other in self.outputs[:number]]
            if owner.get(output.value) is None or not output.name or output.name in taken:
                raise ValueError(f"graph output {output.name!r} gives unknown {output.value!r}, or its name is taken")
        object.__setattr__(self, "_spec_of", owner)
        kept = [output.value for output in self.outputs] or [node.output for node in self.nodes[-1:]]
        object.__setattr__(self, "_kept", frozenset(kept))
        last = {name: number for number, node in enumerate(self.nodes) for name in node.inputs}
        object.__setattr__(self, "_last_use", last)

    @property
    def embeds(self) -> bool:
        """Whether the network gives features or named outputs, for a head outside it, instead of classes."""
        return bool(self.outputs) or self.nodes[-1].quantizer == EMBEDDING

    def is_output(self, value: str) -> bool:
        """Tells whether the network gives a value.

        Args:
            value: Name of the value.

        Returns:
            Whether it is the value of an output, or without named outputs that of the last node.
        """
        kept: frozenset[str] = self._kept  # type: ignore[attr-defined]
        return value in kept

    def last_use(self, value: str) -> int:
        """Finds the last reader of a value.

        Args:
            value: Name of the value.

        Returns:
            The index of the last node that reads it; -1 if none does.
        """
        uses: dict[str, int] = self._last_use  # type: ignore[attr-defined]
        return uses.get(value, -1)

    def blocks(self) -> list[range]:
        """Cuts the nodes into blocks between which only a single value passes, each with weights.

        Returns:
            The indices of the nodes of each block, in order.
        """
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
        """Finds the quantizer that gives a value its unit.

        Args:
            value: Name of the value.

        Returns:
            The quantizer; None for the pixels.
        """
        name = self._spec_of[value]  # type: ignore[attr-defined]
        return None if name is None else self.quantizers[name]

    def check_images(self, images: Tensor) -> None:
        """Checks the shape of images.

        Args:
            images: What the network is called with.

        Raises:
            ValueError: If the shape is not (N, C, H, W), or (N, T, C, H, W) with time steps, of the graph's sizes.
        """
        time = () if self.time_steps is None else (self.time_steps,)
        expected = (*time, self.channels, self.height, self.width)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this network takes (N, {', '.join(map(str, expected))})"
                f"{self._time_remedy(tuple(images.shape))}"
            )

    def _time_remedy(self, found: tuple[int, ...]) -> str:
        """What to do about events whose second axis is not that of the time steps."""
        if self.time_steps is None or len(found) != 5 or found[1] == self.time_steps:
            return ""
        return (
            ", the time steps second. If they are in spikingjelly's order (T, N, C, H, W), pass "
            f"images.transpose(0, 1); if they have {found[1]} time steps, quantize the float network for {found[1]}"
        )

    @property
    def weighted_nodes(self) -> tuple[WeightedNode, ...]:
        """The linear layers and convolutions, in order."""
        return tuple(node for node in self.nodes if isinstance(node, WeightedNode))


@renamed_attributes(balance="equalization")
class Run:
    """A pass of a graph over a network, with a quantizer.

    Args:
        graph: The graph.
        network: The network that it describes.
        quantizer: What happens to values and weights.
    """

    def __init__(self, graph: Graph, network: nn.Module, quantizer: Quantizer) -> None:
        self.graph, self.network, self.quantizer = graph, network, quantizer

    def __call__(self, images: Tensor) -> Tensor:
        """Runs all nodes.

        Args:
            images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

        Returns:
            The logits (N, classes), or the features; all named outputs of an image in one row, (N, K).

        Raises:
            ValueError: If the images have another shape than the network takes.
        """
        return joined(self.outputs(images))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Runs all nodes.

        Args:
            images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

        Returns:
            The named outputs as the network gives them, or the logits (N, classes) or features alone.

        Raises:
            ValueError: If the images have another shape than the network takes.
        """
        self.graph.check_images(images)
        return self.results(self.walk({INPUT_VALUE: images}))

    def results(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Finds the outputs among the values after the last node.

        Args:
            values: The values by name.

        Returns:
            The named outputs as the network gives them, or the logits (N, classes) or features alone.
        """
        if not self.graph.outputs:
            return [values[self.graph.nodes[-1].output].flatten(1)]
        return [output.from_value(values[output.value]) for output in self.graph.outputs]

    def walk(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs all nodes on named values.

        Args:
            values: The input by name.

        Returns:
            The values that no node reads and the outputs, by name.
        """
        return self.advance(values, range(len(self.graph.nodes)))

    def advance(self, values: Mapping[str, Tensor], numbers: range) -> dict[str, Tensor]:
        """Runs some nodes.

        Args:
            values: The values that are known so far, by name.
            numbers: Indices of the nodes to run.

        Returns:
            The values that later nodes read, and the outputs so far, by name.
        """
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
                if self.graph.last_use(name) == number and not self.graph.is_output(name):
                    known.pop(name, None)
        return known

    def weight(self, node: WeightedNode) -> Tensor:
        """Returns the weight that a layer uses in this pass.

        Args:
            node: The layer.

        Returns:
            The quantized folded weight (M, K...), with the ratios of the input divided out again.
        """
        equalization = self.equalization(node)
        folded = self.quantizer.weight(node, node.folded_weight(self.network, equalization))
        return folded if equalization is None else folded / equalization

    def equalization(self, node: WeightedNode) -> Tensor | None:
        """Returns the ratios of the channels of a layer's input to its scale.

        Args:
            node: The layer.

        Returns:
            The ratios, (K,); None if there are none.
        """
        spec = self.graph.spec_of(node.inputs[0])
        return None if spec is None else self.quantizer.equalizations.get(spec.name)


def to_array(tensor: Tensor) -> FloatArray:
    """The values of a tensor as a float64 array."""
    return tensor.detach().to("cpu", torch.float64).numpy()


@dataclass(frozen=True, kw_only=True)
class Current:
    """Accumulators that a neuron reads without requantization.

    `unit` (C,) is the real value of one step, `bias` (C,) the real bias that is still to be added, and `reach` the
    largest magnitude that they can have.
    """

    unit: FloatArray
    bias: FloatArray
    reach: float


@dataclass(frozen=True, kw_only=True)
class HeldLayer:
    """A layer that neurons of counts read, before it is written: its results are requantized to counts at once.

    `unit` (M,) is the real value of one step of its accumulators; `tensors` lack those of the requantization.
    """

    node: Node
    kind: str
    attributes: Mapping[str, Any]
    tensors: Mapping[str, npt.NDArray[Any]]
    unit: FloatArray


@renamed_attributes(shift="centering", site="spec")
class Lowering:
    """Gathers the operations and tensors of a Program while the nodes of a graph write themselves into it.

    A subclass tells the scales of values and weights (`quant.lower`).

    Args:
        graph: The graph.
        network: The network that it describes.
    """

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        self.graph, self.network = graph, network
        self.operations: list[Operation] = []
        self.tensors: dict[str, npt.NDArray[Any]] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.currents: dict[str, Current] = {}
        self.held: dict[str, HeldLayer] = {}

    def segment_scales(self, value: str) -> FloatArray:
        """Returns the scales of a value's segments.

        Args:
            value: Name of the value.

        Returns:
            The scales, (segments,).
        """
        raise NotImplementedError

    def ratios(self, value: str) -> FloatArray:
        """Returns the ratios of a value's channels to its scale.

        Args:
            value: Name of the value.

        Returns:
            The ratios, (C,), or (1,) if all are 1.
        """
        raise NotImplementedError

    def centering(self, value: str) -> FloatArray:
        """Returns the constant that the codes of a value include.

        Args:
            value: Name of the value.

        Returns:
            The constant, (C,) or (1,); 0 for pixels and for values that are not centered.
        """
        raise NotImplementedError

    def scales(self, value: str) -> FloatArray:
        """Returns the scale of every channel of a value, with the ratios.

        Args:
            value: Name of the value.

        Returns:
            The scales, (C,).
        """
        raise NotImplementedError

    def weight(self, node: WeightedNode) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """Quantizes the weight of a layer.

        Args:
            node: The layer.

        Returns:
            The integer weight, int8 (M, K...), and its steps, (M,).
        """
        raise NotImplementedError

    def spec(self, value: str) -> QuantizerSpec:
        """Finds the quantizer that gives a value its unit.

        Args:
            value: Name of the value.

        Returns:
            The quantizer.

        Raises:
            ValueError: If the value has none, as the pixels.
        """
        spec = self.graph.spec_of(value)
        if spec is None:
            raise ValueError(f"value {value!r} has no scale")
        return spec

    def scalar_scale(self, value: str) -> float:
        """Returns the one scale of a value, without its ratios, which the next layer's weights absorb.

        Args:
            value: Name of the value.

        Returns:
            The scale.

        Raises:
            ValueError: If the value has several scales.
        """
        scales = self.segment_scales(value)
        if len(scales) != 1:
            raise ValueError(f"value {value!r} has {len(scales)} scales where one is needed")
        return float(scales[0])

    def current(self, value: str) -> Current:
        """Returns the accumulators that a neuron reads.

        Those of a stream may reach any magnitude, because its unit leaves no bits for a fraction.

        Args:
            value: Name of the value.

        Returns:
            Their unit, bias and reach.
        """
        if value in self.currents:
            return self.currents[value]
        scales = self.scales(value)
        return Current(unit=scales, bias=np.zeros(len(scales)), reach=float(CURRENT_MAX))

    def pass_current(self, value: str, output: str) -> None:
        """Notes that a value holds some of the accumulators of another one.

        Args:
            value: Name of the other value.
            output: Name of the value.
        """
        if value in self.currents:
            self.currents[output] = self.currents[value]

    def counted(self, output: str, channels: int, reach: float, unit: float = 1.0) -> None:
        """Notes that a value holds sums of spikes.

        Args:
            output: Name of the value.
            channels: Its number of channels.
            reach: The largest sum that can occur.
            unit: Real value of a sum of 1.
        """
        self.currents[output] = Current(unit=np.full(channels, unit), bias=np.zeros(channels), reach=reach)

    def bias(self, node: Node, real: FloatArray, unit: FloatArray) -> npt.NDArray[np.int32]:
        """Rounds biases to accumulator steps.

        Args:
            node: The node to which they belong.
            real: Real biases, (..., M).
            unit: Real values of one step, of a shape that broadcasts.

        Returns:
            The biases in steps, int32, of the shape of `real`.

        Raises:
            ValueError: If a bias has `2**30` steps or more, which leaves no room in int32.
        """
        bias = np.rint(real / unit)
        if not (np.abs(bias) < 2**30).all():
            worst = int(np.argmax(np.abs(bias)))
            raise ValueError(
                f"bias {real.flat[worst]:.3g} is {abs(bias.flat[worst]):.3g} accumulator steps, beyond 2**30; "
                f"its weights are too small for it: recalibrate, or prune the channel"
            )
        return bias.astype(np.int32)

    def constant(self, node: Node, real: FloatArray) -> npt.NDArray[Any]:
        """Quantizes constant tokens.

        Args:
            node: The node; the tokens get the unit of its output.
            real: Real tokens, (rows, C).

        Returns:
            Their codes, (rows, C).
        """
        spec = self.spec(node.output)
        codes = np.rint(real / self.scales(node.output))
        return np.ascontiguousarray(np.clip(codes, -spec.q_max, spec.q_max).astype(spec.storage))

    def requantization(self, factor: FloatArray) -> dict[str, npt.NDArray[Any]]:
        """Converts real factors to the tensors of a requantization.

        Args:
            factor: Real factors (M,), in `[0, 2**21 - 1)`.

        Returns:
            The tensors "mult" and "shift", (M,) each.
        """
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
        """Appends the operation of a node to the Program.

        Args:
            node: The node.
            kind: Kind of the operation, a key of `spec.kinds.KINDS`.
            attributes: Attributes of the operation; None for none.
            tensors: Tensors of the operation by role; None for none. Equal tensors are stored once.

        Raises:
            ValueError: If a value is centered and operations of this kind cannot absorb the constant.
        """
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
        """The key of a tensor. Equal tensors are stored once, such as the window indices of all blocks of a stage."""
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
    """Runs the float network through its graph; the result equals `network(images)` up to float rounding.

    Args:
        graph: The graph.
        network: The network that it describes.
        images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

    Returns:
        The logits (N, classes), or the features; all named outputs of an image in one row, (N, K).
    """
    with torch.no_grad():
        return Run(graph, network, Passthrough())(images)
