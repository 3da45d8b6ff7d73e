"""A Program as conventional ONNX: QuantizeLinear and DequantizeLinear around float operators, for int8 kernels.

Runtimes fuse this form into their own kernels, so its integers are near the specification's and not equal to them.
Activations and weights are symmetric int8, weights with one scale per output channel, as TensorRT asks for.

Values are in units of their own step: a code q of any value stands for the real number q. Then a layer's weights have
the scale mult / 2^shift, which already is input scale times weight step over output scale, and every activation has
scale 1. Softmax gets back its natural unit, and LayerNorm its gain, from the multipliers. Counts of spikes are uint8,
and a Clip is their ceiling; neurons with time steps have no conventional form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swincompress_pl import spec
from swincompress_pl.interop.graph import Array, OnnxGraph
from swincompress_pl.interop.spiking import product_of_counts
from swincompress_pl.spec.integer import EXP_STEPS, NORMALIZED_FRACTION_BITS
from swincompress_pl.spec.reference import tensors_of

OPSET, IR_VERSION = 17, 8  # LayerNormalization is of 17
OPSET_OF_INT4, IR_VERSION_OF_INT4 = 21, 10
_PROBABILITY_STEP = 1 / 255


def qdq_graph(onnx: Any, program: spec.Program, *, reduce_range: bool = False) -> OnnxGraph:
    """The graph of a Program; a ProgramError names an operation that has no conventional form.

    Weights whose values fit 4 bits are stored in them, with opset 21. reduce_range: as in `QdqGraph`.
    """
    return QdqGraph(onnx, program, reduce_range=reduce_range).build()


@dataclass(frozen=True, kw_only=True)
class Real:
    """A value of the graph: a byte type, which is quantized with scale 1, or float."""

    name: str
    is_bytes: bool


class QdqGraph:
    """Translates a Program operation by operation.

    Args:
        onnx: The package.
        program: A Program that `spec.check` accepts.
        reduce_range: Weights of 7 bits, whose products with bytes do not saturate on CPUs without VNNI.
    """

    def __init__(self, onnx: Any, program: spec.Program, *, reduce_range: bool) -> None:
        self._onnx, self.program, self._reduce_range = onnx, program, reduce_range
        self.values = spec.check(program)
        self.four_bit_keys = {
            op.tensors["weight"]
            for op in program.operations
            if "weight" in op.tensors and np.abs(program.tensors[op.tensors["weight"]]).max() <= 7
        }
        opset, ir_version = (OPSET_OF_INT4, IR_VERSION_OF_INT4) if self.four_bit_keys else (OPSET, IR_VERSION)
        self.graph = OnnxGraph(onnx, opset=opset, ir_version=ir_version, gather_elements=True)
        self._reals: dict[str, Real] = {}

    def build(self) -> OnnxGraph:
        """The graph, whose outputs are float: "logits", or those that have names."""
        graph, program = self.graph, self.program
        without = next((op for op in program.operations if op.kind not in _KINDS), None)
        if without is not None:
            raise spec.ProgramError(
                f"{without.kind} {without.name!r}: has no conventional form; kinds are {', '.join(_KINDS)}. The exact "
                "form has all of them"
            )
        graph.input(spec.INPUT_VALUE, "uint8", program.input.value.shape)
        self._reals[spec.INPUT_VALUE] = Real(name=spec.INPUT_VALUE, is_bytes=True)
        for op in program.operations:
            graph.at(op.name)
            made = _KINDS[op.kind](self, op, tensors_of(program, op))
            self._reals[op.output] = self._kept(made, self.values[op.output])
        graph.at("output")
        for output in program.outputs:
            self._output(output.value, output.name, output.shape, output.scale)
        if not program.outputs:
            last = program.operations[-1].output
            self._output(last, "logits", (self.values[last].channels,), program.logit_scale)
        return graph

    def _kept(self, made: Real, value: spec.Value) -> Real:
        """Bytes are quantized, after a Clip where they end before their type does; wider values stay in float."""
        dtype, name = spec.STORAGE[value.dtype], made.name
        if made.is_bytes or dtype not in ("int8", "uint8"):
            return made
        if value.reach < spec.LIMITS[dtype][1]:
            ends = (0 if dtype == "uint8" else -value.reach, value.reach)
            name = self.graph.node("Clip", name, *(self.graph.constant(end, "float32") for end in ends))
        return Real(name=self.quantized(name, 1.0, dtype), is_bytes=True)

    def _output(self, value: str, name: str, shape: tuple[int, ...], scale: float) -> None:
        real = self.graph.node("Mul", self.real(value), self.graph.constant(scale, "float32"))
        real = real if shape == self.values[value].shape else self.graph.reshape(real, 0, *shape)
        self.graph.output(real, name, "float32", shape)

    def quantized(self, x: str, scale: float, dtype: str) -> str:
        """Bytes of float numbers."""
        graph = self.graph
        name: str = graph.node("QuantizeLinear", x, graph.constant(scale, "float32"), graph.constant(0, dtype))
        return name

    def dequantized(self, x: str, scale: float, dtype: str) -> str:
        """Float numbers of bytes."""
        graph = self.graph
        name: str = graph.node("DequantizeLinear", x, graph.constant(scale, "float32"), graph.constant(0, dtype))
        return name

    def held(self, value: str) -> str:
        """A value as the graph holds it."""
        return self._reals[value].name

    def is_bytes(self, value: str) -> bool:
        """Whether a value is held in bytes."""
        return self._reals[value].is_bytes

    def real(self, value: str, shaped: str | None = None) -> str:
        """A value of the Program in float; `shaped`: the same in another shape, as it is held."""
        held = self._reals[value]
        name = held.name if shaped is None else shaped
        return self.dequantized(name, 1.0, spec.STORAGE[self.values[value].dtype]) if held.is_bytes else name

    def weight(self, key: str, weight: Array, scale: Array, axis: int) -> str:
        """A layer's weight in float, from bytes or 4 bits, with a scale per index of `axis`."""
        scale, dtype = np.where(scale > 0, scale, 1.0), "int8"  # a dead channel has zero weights
        if key in self.four_bit_keys:
            dtype = "int4"
        elif self._reduce_range:
            # half of all weights are ties: rounded up, they would shift every sum
            weight, scale = np.rint(weight / 2).astype(np.int8), scale * 2
        graph = self.graph
        stored = graph.four_bits(weight) if dtype == "int4" else graph.constant(weight, "int8")
        name: str = graph.node("DequantizeLinear", stored, graph.constant(scale, "float32"), axis=axis)
        return name


def _step(tensors: Mapping[str, Array], mult: str = "mult", shift: str = "shift") -> Array:
    """Mult / 2^shift, for each channel or head."""
    found: Array = tensors[mult].astype(np.float64) * np.exp2(-tensors[shift].astype(np.float64))
    return found


def _living(tensors: Mapping[str, Array]) -> Array:
    """The weight, whose rows are zero where the multiplier is."""
    weight = tensors["weight"]
    rows = (tensors["mult"] != 0).reshape(-1, *(1,) * (weight.ndim - 1))
    found: Array = weight * rows.astype(np.int8)
    return found


def _linear(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    """MatMul, which onnxruntime makes MatMulIntegerToFloat of; it leaves Gemm in float where weights have channels."""
    graph, step = q.graph, _step(tensors)
    weight = q.weight(op.tensors["weight"], np.ascontiguousarray(_living(tensors).T), step, axis=1)
    found = graph.node("MatMul", q.real(op.inputs[0]), weight)
    bias = graph.constant(tensors["bias"] * step, "float32")
    return Real(name=graph.node("Add", found, bias), is_bytes=False)


def _conv2d(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    graph, step, x = q.graph, _step(tensors), q.values[op.inputs[0]]
    if len(x.shape) != 3:
        raise spec.ProgramError(f"conv2d {op.name!r}: time steps have no conventional form; the exact form has them")
    weight = np.ascontiguousarray(_living(tensors).transpose(0, 3, 1, 2))
    top, left = op.attributes["padding"]
    image = graph.transpose(q.held(op.inputs[0]), 0, 3, 1, 2)
    found = graph.node(
        "Conv",
        q.real(op.inputs[0], image),
        q.weight(op.tensors["weight"], weight, step, axis=0),
        group=op.attributes.get("groups", 1),
        kernel_shape=list(weight.shape[2:]),
        pads=[top, left, top, left],
        strides=list(op.attributes["stride"]),
    )
    found = graph.transpose(found, 0, 2, 3, 1)
    bias = tensors["bias"] * step
    if bias.any():
        found = graph.node("Add", found, graph.constant(bias, "float32"))
    return Real(name=found, is_bytes=False)


def _layer_norm(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    graph, channels = q.graph, q.values[op.inputs[0]].channels
    unit = 2.0 ** -op.attributes["shift"]
    gain = tensors["gain"].astype(np.float64) * 2.0**NORMALIZED_FRACTION_BITS * unit
    found = graph.node(
        "LayerNormalization",
        q.real(op.inputs[0]),
        graph.constant(gain, "float32"),
        graph.constant(tensors["offset"].astype(np.float64) * unit, "float32"),
        axis=-1,
        epsilon=op.attributes["epsilon"] / channels**2,
    )
    return Real(name=found, is_bytes=False)


def _table(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    """A look-up: the function behind the entries is not known."""
    graph = q.graph
    index = graph.node("Add", graph.cast(q.held(op.inputs[0]), "int32"), graph.constant(128, "int32"))
    values = np.roll(tensors["values"], 128)
    found = graph.look_up(values, spec.STORAGE[op.dtype], index, *q.values[op.output].shape)
    is_bytes = spec.STORAGE[op.dtype] in ("int8", "uint8")
    return Real(name=found if is_bytes else graph.cast(found, "float32"), is_bytes=is_bytes)


def _add(q: QdqGraph, op: spec.Operation, _: Mapping[str, Array]) -> Real:
    first, second = (q.values[name] for name in op.inputs)
    if first.rows != second.rows:
        raise spec.ProgramError(f"add {op.name!r}: a sum that repeats over time has no conventional form")
    b = q.real(op.inputs[1])
    b = b if first.shape == second.shape else q.graph.reshape(b, 0, *first.shape)
    return Real(name=q.graph.node("Add", q.real(op.inputs[0]), b), is_bytes=False)


def _tokens(q: QdqGraph, value: str) -> str:
    """A value as it is held, (N, rows, channels)."""
    known = q.values[value]
    return q.held(value) if len(known.shape) == 2 else q.graph.reshape(q.held(value), 0, known.rows, known.channels)


def _add_constant(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    x = q.real(op.inputs[0], _tokens(q, op.inputs[0]))
    return Real(name=q.graph.node("Add", x, q.graph.constant(tensors["constant"], "float32")), is_bytes=False)


def _rows_of(q: QdqGraph, value: str, rows: Array) -> str:
    """Constant rows for every image, in the type in which `value` is held."""
    dtype = spec.STORAGE[q.values[value].dtype] if q.is_bytes(value) else "float32"
    return q.graph.for_each_image(_tokens(q, value), rows, dtype)


def _prepend(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    (x,) = op.inputs
    found = q.graph.node("Concat", _rows_of(q, x, tensors["rows"]), _tokens(q, x), axis=1)
    return Real(name=found, is_bytes=q.is_bytes(x))


def _gather(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    graph, (name,), index = q.graph, op.inputs, tensors["index"]
    x, tokens = q.values[name], _tokens(q, name)
    if (index < 0).any():
        tokens = graph.node("Concat", tokens, _rows_of(q, name, np.zeros((1, x.channels))), axis=1)
    rows = np.where(index < 0, x.rows, index).reshape(-1)
    found = graph.node("Gather", tokens, graph.constant(rows, "int64"), axis=1)
    shape = q.values[op.output].shape
    found = found if shape == (len(rows), x.channels) else graph.reshape(found, 0, *shape)
    return Real(name=found, is_bytes=q.is_bytes(name))


def _mean(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    graph, (x,) = q.graph, op.inputs
    sums = graph.node("ReduceSum", q.real(x, _tokens(q, x)), graph.constant(np.array([1]), "int64"), keepdims=0)
    return Real(name=graph.node("Mul", sums, graph.constant(_step(tensors), "float32")), is_bytes=False)


def _attention(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    graph, x = q.graph, q.values[op.inputs[0]]
    windows, heads, qk_dim, v_dim = (op.attributes[key] for key in ("windows", "heads", "qk_dim", "v_dim"))
    length = x.rows // windows
    split = graph.constant(np.array([heads * qk_dim, heads * qk_dim, heads * v_dim]), "int64")
    held = graph.reshape(q.held(op.inputs[0]), 0, windows, length, x.channels)
    orders = ((0, 1, 3, 2, 4), (0, 1, 3, 4, 2), (0, 1, 3, 2, 4))
    parts = zip(graph.node("Split", held, split, outputs=3, axis=-1), (qk_dim, qk_dim, v_dim), orders, strict=True)
    query, key, value = (
        q.real(op.inputs[0], graph.transpose(graph.reshape(part, 0, windows, length, heads, dim), *order))
        for part, dim, order in parts
    )
    # steps of 1/32 of an octave, as natural logarithms
    unit = _step(tensors, "exp_mult", "exp_shift")[:, None, None] * math.log(2) / EXP_STEPS
    logits = graph.node("Mul", graph.node("MatMul", query, key), graph.constant(unit, "float32"))
    if "bias_table" in tensors:
        bias = tensors["bias_table"][:, tensors["bias_index"]] * unit
        logits = graph.node("Add", logits, graph.constant(bias, "float32"))
    if "region" in tensors:
        region = tensors["region"]
        other = np.where(region[:, :, None] == region[:, None, :], 0.0, -1e9)[:, None]
        logits = graph.node("Add", logits, graph.constant(other, "float32"))
    weights = q.quantized(graph.node("Softmax", logits, axis=-1), _PROBABILITY_STEP, "uint8")
    found = graph.node("MatMul", q.dequantized(weights, _PROBABILITY_STEP, "uint8"), value)
    step = _step(tensors, "out_mult", "out_shift")[:, None, None]
    found = graph.transpose(graph.node("Mul", found, graph.constant(step, "float32")), 0, 1, 3, 2, 4)
    return Real(name=graph.reshape(found, 0, *q.values[op.output].shape), is_bytes=False)


def _requantize(q: QdqGraph, op: spec.Operation, tensors: Mapping[str, Array]) -> Real:
    step = q.graph.constant(_step(tensors), "float32")
    return Real(name=q.graph.node("Mul", q.real(op.inputs[0]), step), is_bytes=False)


def _block_sum(q: QdqGraph, op: spec.Operation, _: Mapping[str, Array]) -> Real:
    graph, (name,), x = q.graph, op.inputs, q.values[op.inputs[0]]
    rows, channels = op.attributes["rows"], op.attributes["channels"]
    blocks = graph.reshape(q.real(name), 0, rows, x.rows // rows, channels, x.channels // channels)
    sums = graph.node("ReduceSum", blocks, graph.constant(np.array([2, 4]), "int64"), keepdims=0)
    return Real(name=graph.reshape(sums, 0, *q.values[op.output].shape), is_bytes=False)


def _spike_attention(q: QdqGraph, op: spec.Operation, _: Mapping[str, Array]) -> Real:
    graph, windows, heads = q.graph, op.attributes["windows"], op.attributes["heads"]
    length = q.values[op.inputs[0]].rows // windows
    dims = [q.values[name].channels // heads for name in op.inputs]
    query, key, value = (
        q.real(name, graph.transpose(graph.reshape(q.held(name), 0, windows, length, heads, dim), 0, 1, 3, 2, 4))
        for name, dim in zip(op.inputs, dims, strict=True)
    )
    found = graph.transpose(product_of_counts(graph, query, key, value, length, dims), 0, 1, 3, 2, 4)
    return Real(name=graph.reshape(found, 0, *q.values[op.output].shape), is_bytes=False)


_KINDS: dict[str, Callable[[QdqGraph, spec.Operation, Mapping[str, Array]], Real]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "table": _table,
    "add": _add,
    "add_constant": _add_constant,
    "prepend": _prepend,
    "gather": _gather,
    "mean": _mean,
    "attention": _attention,
    "requantize": _requantize,
    "block_sum": _block_sum,
    "spike_attention": _spike_attention,
}
