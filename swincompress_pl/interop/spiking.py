"""The exact forms of the operations of spiking networks.

Time is unrolled where neurons have a memory (`lif`): they have few operators per step. Neurons that are charged once
(`fire`) have few for all steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swincompress_pl.interop.arithmetic import Wide, held_type, shifted, stored, widened
from swincompress_pl.interop.exact import Call
from swincompress_pl.interop.graph import OnnxGraph
from swincompress_pl.interop.layers import rounded, sum_over
from swincompress_pl.spec.integer import ACCUMULATOR_BOUND
from swincompress_pl.spec.spiking import CURRENT_MAX, DECAY_BITS, MEMBRANE_MAX


def lif(call: Call) -> str:
    """In float64, which holds the product with the decay, below 2^47."""
    graph, x, steps = call.graph, call.inputs[0], call.attribute("steps")
    bits, decay = call.attribute("fraction_bits"), call.attribute("decay") / 2**DECAY_BITS
    threshold, reset, bias = (graph.constant(call.tensors[key], "float64") for key in ("threshold", "reset", "bias"))
    limit = CURRENT_MAX >> bits
    clipped = graph.node("Clip", call.names[0], *(graph.constant(end, "int32") for end in (-limit, limit)))
    scaled = graph.node("Mul", graph.cast(clipped, "float64"), graph.constant(2.0**bits, "float64"))
    currents = graph.node("Add", scaled, bias)
    repeated, rows = bool(call.attribute("repeated")), x.rows if call.attribute("repeated") else x.rows // steps
    if not repeated:
        currents = graph.reshape(currents, 0, steps, rows, x.channels)
    parts = [currents] * steps if repeated else _split(graph, currents, steps)
    membrane, spikes = reset, []
    for current in parts:
        pull = graph.node("Sub", reset, membrane)
        if call.attribute("input_decay"):
            pull = graph.node("Add", pull, current)
        pulled = graph.node("Floor", graph.node("Mul", pull, graph.constant(decay, "float64")))
        charged = graph.node("Add", membrane, pulled)
        if not call.attribute("input_decay"):
            charged = graph.node("Add", charged, current)
        charged = graph.node("Clip", charged, *(graph.constant(e, "float64") for e in (-MEMBRANE_MAX, MEMBRANE_MAX)))
        fired = graph.node("GreaterOrEqual", charged, threshold)
        after = graph.node("Sub", charged, threshold) if call.attribute("soft_reset") else reset
        membrane = graph.node("Where", fired, after, charged)
        spikes.append(graph.reshape(graph.cast(fired, "uint8"), 0, 1, rows, x.channels))
    found = graph.node("Concat", *spikes, axis=1) if steps > 1 else spikes[0]
    return call.shaped(found)


def _split(graph: OnnxGraph, x: str, steps: int) -> list[str]:
    """(N, T, ...) as T values (N, ...)."""
    axis = graph.constant(np.array([1]), "int64")
    if steps == 1:
        return [graph.node("Squeeze", x, axis)]
    parts = graph.node("Split", x, graph.constant(np.ones(steps), "int64"), outputs=steps, axis=1)
    return [graph.node("Squeeze", part, axis) for part in parts]


def max_pool(call: Call) -> str:
    """What is held keeps the order of the numbers, and int32 goes through float64, which MaxPool takes.

    The padding comes before it, as onnx's evaluator has another idea of MaxPool's own.
    """
    graph, x = call.graph, call.inputs[0]
    height, width, channels = x.shape[-3:]
    image = call.names[0] if len(x.shape) == 3 else graph.reshape(call.names[0], -1, height, width, channels)
    wide = held_type(x.dtype) == "int32"
    top, left = call.attribute("padding")
    channels_first = graph.transpose(graph.cast(image, "float64") if wide else image, 0, 3, 1, 2)
    if top or left:
        pads = graph.constant(np.array([0, 0, top, left, 0, 0, top, left]), "int64")
        lowest = graph.constant(-(2.0**31), "float64") if wide else graph.constant(0, "uint8")
        channels_first = graph.node("Pad", channels_first, pads, lowest)
    pooled = graph.node(
        "MaxPool", channels_first, kernel_shape=list(call.attribute("kernel")), strides=list(call.attribute("stride"))
    )
    found = graph.transpose(pooled, 0, 2, 3, 1)
    found = graph.cast(found, "int32") if wide else found
    return found if len(x.shape) == 3 else graph.reshape(found, -1, *call.output.shape)


def block_sum(call: Call) -> str:
    """Sums of int32 may pass its range before they are saturated."""
    graph, x = call.graph, call.inputs[0]
    rows, channels = call.attribute("rows"), call.attribute("channels")
    dtype = "int64" if x.dtype == "int32" else "int32"
    numbers = widened(graph, call.names[0], x.dtype, dtype)
    blocks = graph.reshape(numbers, 0, rows, x.rows // rows, channels, x.channels // channels)
    sums = sum_over(graph, sum_over(graph, blocks, 4, keep=False), 2, keep=False)
    return call.shaped(stored(graph, Wide(name=sums, dtype=dtype), call.op.dtype), rows, channels)


def multiply(call: Call) -> str:
    """Each number of the second multiplies a block of the first."""
    graph, (a, b) = call.graph, call.inputs
    left = widened(graph, call.names[0], a.dtype, "int32")
    right = widened(graph, call.names[1], b.dtype, "int32")
    left = graph.reshape(left, 0, b.rows, a.rows // b.rows, b.channels, a.channels // b.channels)
    right = graph.reshape(right, 0, b.rows, 1, b.channels, 1)
    product = Wide(name=graph.node("Mul", left, right), dtype="int32")
    return call.shaped(stored(graph, product, call.op.dtype))


def spike_attention(call: Call) -> str:
    """Products of counts below 2^31 in float64."""
    graph, windows, heads = call.graph, call.attribute("windows"), call.attribute("heads")
    length = call.inputs[0].rows // windows
    dims = [value.channels // heads for value in call.inputs]
    q, k, v = (
        graph.transpose(
            graph.reshape(widened(graph, name, value.dtype, "float64"), 0, windows, length, heads, dim), 0, 1, 3, 2, 4
        )
        for name, value, dim in zip(call.names, call.inputs, dims, strict=True)
    )
    product = product_of_counts(graph, q, k, v, length, dims)
    return call.shaped(graph.cast(graph.transpose(product, 0, 1, 3, 2, 4), "int32"))


def product_of_counts(graph: OnnxGraph, q: str, k: str, v: str, length: int, dims: Sequence[int]) -> str:
    """The product q (k^T v) of (N, windows, heads, length, dims of each), in the order that takes fewer products."""
    turned = graph.transpose(k, 0, 1, 2, 4, 3)
    if length * (dims[0] + dims[2]) < 2 * dims[0] * dims[2]:
        name: str = graph.node("MatMul", graph.node("MatMul", q, turned), v)
    else:
        name = graph.node("MatMul", q, graph.node("MatMul", turned, v))
    return name


def integrate(call: Call) -> str:
    """The sum over time, in int64 where it may pass int32, and one rounding."""
    graph, x = call.graph, call.inputs[0]
    reach = call.attribute("steps") * x.reach
    peak = int(np.abs(call.tensors["bias"].astype(np.int64)).max())
    dtype = "int32" if reach + peak < ACCUMULATOR_BOUND else "int64"
    sums = sum_over(graph, widened(graph, call.names[0], x.dtype, dtype), 1, keep=False)
    return rounded(call, Wide(name=sums, dtype=dtype), reach)


def fire(call: Call) -> str:
    """Charged once and without a leak, a neuron spikes at step n, from 1 on, where its count is n or more."""
    graph, x, tensors = call.graph, call.inputs[0], call.tensors
    charge = Wide(name=call.names[0], dtype="int32")
    counts = shifted(graph, charge, tensors["mult"], tensors["shift"], x.reach)
    numbers = np.arange(1, call.attribute("steps") + 1).reshape(-1, *(1 for _ in x.shape))
    one_step = graph.reshape(counts.name, 0, 1, *x.shape)
    return graph.cast(graph.node("GreaterOrEqual", one_step, graph.constant(numbers, counts.dtype)), "uint8")


SPIKING = {
    "lif": lif,
    "max_pool": max_pool,
    "block_sum": block_sum,
    "multiply": multiply,
    "spike_attention": spike_attention,
    "integrate": integrate,
    "fire": fire,
}
