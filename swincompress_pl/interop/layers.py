"""The exact forms of the operations of vision transformers; spiking.py has those of spiking networks."""

from __future__ import annotations

import numpy as np

from swincompress_pl import spec
from swincompress_pl.interop.arithmetic import (
    OFFSET,
    Wide,
    floor,
    held,
    held_type,
    requantized,
    shifted,
    stored,
    widened,
    zero_point,
)
from swincompress_pl.interop.exact import Call
from swincompress_pl.interop.graph import Array, OnnxGraph
from swincompress_pl.spec.integer import (
    EXP_STEPS,
    EXP_TABLE,
    EXP_ZERO,
    FINE_EXP_ZERO,
    NORMALIZED_FRACTION_BITS,
    RECIPROCAL_BITS,
    SOFTMAX_BITS,
)


def byte_product(graph: OnnxGraph, a: str, a_zero: int, b: str, b_zero: int) -> str:
    """The int32 product of matrices of uint8, from whose elements the zero points are taken."""
    name: str = graph.node("MatMulInteger", a, b, graph.constant(a_zero, "uint8"), graph.constant(b_zero, "uint8"))
    return name


def _held_weight(weight: Array) -> Array:
    return (weight.astype(np.int64) + OFFSET).astype(np.uint8)


def _sum_reach(x: spec.Value, weight: Array) -> Array:
    """The largest magnitude of each channel's sums without its bias; weight (M, K)."""
    reach: Array = x.reach * np.abs(weight.astype(np.int64)).sum(axis=1)
    return reach


def linear(call: Call) -> str:
    """The product of bytes, the bias, and one rounding."""
    graph, x, weight = call.graph, call.inputs[0], call.tensors["weight"]
    rows = graph.constant(_held_weight(weight.T), "uint8")
    sums = byte_product(graph, call.names[0], zero_point(x.dtype), rows, OFFSET)
    return rounded(call, Wide(name=sums, dtype="int32"), _sum_reach(x, weight))


def rounded(call: Call, sums: Wide, reach: Array | int) -> str:
    """The result of an operation from its sums, of at most `reach` without the bias, if it has one."""
    tensors, largest = call.tensors, call.op.attributes.get("largest")
    return requantized(
        call.graph, sums, tensors["mult"], tensors["shift"], reach, call.op.dtype,
        bias=tensors.get("bias"), largest=largest,
    )  # fmt: skip


def conv2d(call: Call) -> str:
    """ConvInteger reads channels first; time steps are images of their own."""
    graph, x, weight = call.graph, call.inputs[0], call.tensors["weight"]
    height, width, channels = x.shape[-3:]
    image = call.names[0] if len(x.shape) == 3 else graph.reshape(call.names[0], -1, height, width, channels)
    top, left = call.attribute("padding")
    sums = graph.node(
        "ConvInteger",
        graph.transpose(image, 0, 3, 1, 2),
        graph.constant(_held_weight(weight.transpose(0, 3, 1, 2)), "uint8"),
        graph.constant(zero_point(x.dtype), "uint8"),
        graph.constant(OFFSET, "uint8"),
        group=call.op.attributes.get("groups", 1),
        kernel_shape=list(weight.shape[1:3]),
        pads=[top, left, top, left],
        strides=list(call.attribute("stride")),
    )
    reach = _sum_reach(x, weight.reshape(len(weight), -1))
    found = rounded(call, Wide(name=graph.transpose(sums, 0, 2, 3, 1), dtype="int32"), reach)
    return found if len(x.shape) == 3 else graph.reshape(found, -1, *call.output.shape)


def table(call: Call) -> str:
    """Entry i is that of the byte i; what holds a code is 128 more than it."""
    values = held(np.roll(call.tensors["values"], 128), call.op.dtype)
    index = call.graph.cast(call.names[0], "int32")
    return call.graph.look_up(values, held_type(call.op.dtype), index, *call.output.shape)


def add(call: Call) -> str:
    """In int64 where two int32 may pass its range."""
    graph, (a, b) = call.graph, call.inputs
    wide = "int64" if call.op.dtype == "int32" else "int32"
    first, second = (
        widened(graph, name, value.dtype, wide) for name, value in zip(call.names, call.inputs, strict=True)
    )
    if a.rows != b.rows:  # the second's rows repeat
        first = graph.reshape(first, 0, a.rows // b.rows, b.rows, a.channels)
        second = graph.reshape(second, 0, 1, b.rows, b.channels)
    elif a.shape != b.shape:
        second = graph.reshape(second, 0, *a.shape)
    total = stored(graph, Wide(name=graph.node("Add", first, second), dtype=wide), call.op.dtype)
    return call.shaped(total, *(a.shape if a.rows == b.rows else ()))


def add_constant(call: Call) -> str:
    """Held constants would be sums of offsets, so the numbers are added."""
    graph, x = call.graph, call.inputs[0]
    numbers = widened(graph, call.tokens(), x.dtype, "int32")
    total = graph.node("Add", numbers, graph.constant(call.tensors["constant"], "int32"))
    return call.shaped(stored(graph, Wide(name=total, dtype="int32"), call.op.dtype), x.rows, x.channels)


def prepend(call: Call) -> str:
    """The constant rows of every image come first."""
    graph, x, rows = call.graph, call.inputs[0], call.tensors["rows"]
    tokens = call.tokens()
    name: str = graph.node(
        "Concat", graph.for_each_image(tokens, held(rows, x.dtype), held_type(x.dtype)), tokens, axis=1
    )
    return name


def gather(call: Call) -> str:
    """Index -1 is a row of zeros, which is put behind the others."""
    graph, x, index = call.graph, call.inputs[0], call.tensors["index"]
    tokens = call.tokens()
    if (index < 0).any():
        zeros = np.zeros((1, x.channels), np.int64)
        tokens = graph.node(
            "Concat", tokens, graph.for_each_image(tokens, held(zeros, x.dtype), held_type(x.dtype)), axis=1
        )
    rows = np.where(index < 0, x.rows, index).reshape(-1)
    found = graph.node("Gather", tokens, graph.constant(rows, "int64"), axis=1)
    return call.shaped(found, len(rows), x.channels)


def mean(call: Call) -> str:
    """The sum over the rows, and one rounding."""
    graph, x = call.graph, call.inputs[0]
    sums = sum_over(graph, widened(graph, call.tokens(), x.dtype, "int32"), 1, keep=False)
    return rounded(call, Wide(name=sums, dtype="int32"), x.rows * x.reach)


def sum_over(graph: OnnxGraph, x: str, axis: int, *, keep: bool = True) -> str:
    """Sums along one axis, in the type of x."""
    name: str = graph.node("ReduceSum", x, graph.constant(np.array([axis]), "int64"), keepdims=int(keep))
    return name


def _highest(graph: OnnxGraph, x: str) -> str:
    name: str = graph.node("ReduceMax", x, graph.constant(np.array([-1]), "int64"), keepdims=1)
    return name


def requantize(call: Call) -> str:
    """One rounding for each channel of a stream."""
    return rounded(call, Wide(name=call.names[0], dtype="int32"), call.inputs[0].reach)


def layer_norm(call: Call) -> str:
    """Sums, centered numbers and the normalized ones are exact in float64, the variance in int64."""
    graph, x = call.graph, call.inputs[0]
    numbers = widened(graph, call.names[0], x.dtype, "float64")
    channels = graph.constant(x.channels, "float64")
    total = sum_over(graph, numbers, -1)  # below 2^27, and the squares below 2^42
    squares = sum_over(graph, graph.node("Mul", numbers, numbers), -1)
    scaled = [graph.node("Mul", graph.cast(part, "int64"), other) for part, other in (
        (squares, graph.constant(x.channels, "int64")), (total, graph.cast(total, "int64")))]  # fmt: skip
    variance = graph.node("Add", graph.node("Sub", *scaled), graph.constant(call.attribute("epsilon"), "int64"))
    factor = _reciprocal_root(graph, graph.node("Max", variance, graph.constant(1, "int64")))
    centered = graph.node("Sub", graph.node("Mul", numbers, channels), total)  # below 2^28, times 2^24
    normalized = floor(graph, graph.node("Mul", centered, factor))
    return stored(graph, _scaled(call, normalized), call.op.dtype)


def _scaled(call: Call, normalized: Wide) -> Wide:
    """floor((z gain + offset + 2^(shift-1)) / 2^shift)."""
    tensors, reach = call.tensors, int(call.inputs[0].channels ** 0.5 + 1) << NORMALIZED_FRACTION_BITS
    return shifted(
        call.graph, normalized, tensors["gain"], call.attribute("shift"), reach,
        added=tensors["offset"].astype(object), raised=zero_point(call.op.dtype),
    )  # fmt: skip


def _reciprocal_root(graph: OnnxGraph, variance: str) -> str:
    """The reciprocal root r 2^(t - 38) as float64 for int64 variances in [1, 2^62).

    r and t are those of `spec.integer.reciprocal_sqrt`. The root's guess from float64 is at most one off on either
    side, and is corrected in int64.
    """

    def whole(value: int) -> str:
        return graph.constant(value, "int64")

    # t is the number of k from 1 on with V 4^k < 2^62
    bounds = np.array([2 ** (62 - 2 * k) for k in range(1, 31)], np.int64)
    below = graph.cast(graph.node("Less", variance, graph.constant(bounds, "int64")), "int64")
    t, steps = sum_over(graph, below, -1), np.arange(31)
    variance = graph.node("Mul", variance, graph.node("Gather", graph.constant(4**steps, "int64"), t))
    powers = graph.constant(np.exp2(steps - 54.0 + NORMALIZED_FRACTION_BITS), "float64")
    power = graph.node("Gather", powers, t)
    root = graph.cast(graph.node("Floor", graph.node("Sqrt", graph.cast(variance, "float64"))), "int64")
    above = graph.node("Greater", graph.node("Mul", root, root), variance)
    root = graph.node("Sub", root, graph.cast(above, "int64"))
    next_root = graph.node("Add", root, whole(1))
    fits = graph.node("LessOrEqual", graph.node("Mul", next_root, next_root), variance)
    root = graph.node("Add", root, graph.cast(fits, "int64"))
    mantissa = graph.node("Div", whole(2**54 - 1), root)
    name: str = graph.node("Mul", graph.cast(mantissa, "float64"), power)
    return name


def _exponents(steps_max: int, dtype: str) -> Array:
    """The exponential of every number of 32nds of an octave up to the last, which is 0."""
    steps = np.arange(steps_max + 1)
    mantissa = EXP_TABLE[steps % EXP_STEPS].astype(np.int64) >> (steps // EXP_STEPS)
    return (mantissa if dtype == "int32" else (mantissa + 128) >> 8).astype(dtype)


def _exponential(
    graph: OnnxGraph, distance: Wide, mult: Array, shift: Array, reach: int, dtype: str, shape: tuple[int, ...]
) -> str:
    steps_max = EXP_ZERO if dtype == "uint8" else FINE_EXP_ZERO
    steps = shifted(graph, distance, mult, shift, reach)
    bounded = graph.node("Clip", steps.name, graph.constant(0, steps.dtype), graph.constant(steps_max, steps.dtype))
    return graph.look_up(_exponents(steps_max, dtype), dtype, graph.cast(bounded, "int32"), *shape)


def softmax(call: Call) -> str:
    """In int64: differences of int32 pass its range."""
    graph, x = call.graph, call.inputs[0]
    numbers = widened(graph, call.names[0], x.dtype, "int64")
    distance = Wide(name=graph.node("Sub", _highest(graph, numbers), numbers), dtype="int64")
    mult, shift = (np.array(call.attribute(key)) for key in ("mult", "shift"))
    e = graph.cast(_exponential(graph, distance, mult, shift, 2 * x.reach, "int32", x.shape), "int64")
    reciprocal = graph.node("Div", graph.constant(255 << SOFTMAX_BITS, "int64"), sum_over(graph, e, -1))
    product = Wide(name=graph.node("Mul", e, reciprocal), dtype="int64")
    return stored(graph, shifted(graph, product, 1, SOFTMAX_BITS, 255 << SOFTMAX_BITS), "uint8")


def attention(call: Call) -> str:
    """Logits, exponentials by a table, and one rounding after the product with the values."""
    graph, x, tensors = call.graph, call.inputs[0], call.tensors
    windows, heads, qk_dim, v_dim = (call.attribute(key) for key in ("windows", "heads", "qk_dim", "v_dim"))
    length, zero = x.rows // windows, zero_point(x.dtype)
    split = graph.constant(np.array([heads * qk_dim, heads * qk_dim, heads * v_dim]), "int64")
    parts = graph.node("Split", graph.reshape(call.names[0], 0, windows, length, x.channels), split, outputs=3, axis=-1)
    q, k, v = (
        graph.transpose(graph.reshape(part, 0, windows, length, heads, dim), *order)
        for part, dim, order in zip(
            parts, (qk_dim, qk_dim, v_dim), ((0, 1, 3, 2, 4), (0, 1, 3, 4, 2), (0, 1, 3, 2, 4)), strict=True
        )
    )
    logits, reach = byte_product(graph, q, zero, k, zero), x.reach**2 * qk_dim
    if "bias_table" in tensors:
        bias = tensors["bias_table"][:, tensors["bias_index"]]
        logits, reach = graph.node("Add", logits, graph.constant(bias, "int32")), reach + int(np.abs(bias).max())
    e = _attention_exponentials(call, logits, reach)
    total = sum_over(graph, graph.cast(e, "int32"), -1)
    out_mult, out_shift = (tensors[key].astype(np.int64)[:, None, None] for key in ("out_mult", "out_shift"))
    reciprocal = graph.node("Div", graph.constant(out_mult << RECIPROCAL_BITS, "int64"), graph.cast(total, "int64"))
    sums = byte_product(graph, e, 0, v, zero)
    product = Wide(
        name=graph.node("Mul", graph.cast(sums, "float64"), graph.cast(reciprocal, "float64")), dtype="float64"
    )
    # |sum e v| <= x_max sum e, so the product stays below x_max out_mult 2^24
    bound = x.reach * (out_mult << RECIPROCAL_BITS)
    rounded = shifted(graph, product, 1, out_shift + RECIPROCAL_BITS, bound, raised=zero_point(call.op.dtype))
    found = stored(graph, rounded, call.op.dtype)
    return call.shaped(graph.transpose(found, 0, 1, 3, 2, 4))


def _attention_exponentials(call: Call, logits: str, reach: int) -> str:
    """uint8 (N, windows, heads, L, L); tokens of other regions have 0."""
    graph, region = call.graph, call.tensors.get("region")
    compared, allowed = logits, ""
    if region is not None:
        same = (region[:, :, None] == region[:, None, :])[:, None]
        allowed = graph.constant(same, "bool")
        compared = graph.node("Where", allowed, logits, graph.constant(-(2**31) + 1, "int32"))
    distance = Wide(name=graph.node("Sub", _highest(graph, compared), logits), dtype="int32")
    mult, shift = (call.tensors[key].astype(np.int64)[:, None, None] for key in ("exp_mult", "exp_shift"))
    windows, length = call.attribute("windows"), call.inputs[0].rows // call.attribute("windows")
    shape = (windows, call.attribute("heads"), length, length)
    e = _exponential(graph, distance, mult, shift, 2 * reach, "uint8", shape)
    if region is None:
        return e
    name: str = graph.node("Where", allowed, e, graph.constant(0, "uint8"))
    return name


LAYERS = {
    "linear": linear,
    "conv2d": conv2d,
    "table": table,
    "add": add,
    "add_constant": add_constant,
    "prepend": prepend,
    "gather": gather,
    "mean": mean,
    "requantize": requantize,
    "layer_norm": layer_norm,
    "softmax": softmax,
    "attention": attention,
}
