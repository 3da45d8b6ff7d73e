"""The kinds of operation of spiking networks; see `kinds.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from swincompress_pl.spec import spiking as ops
from swincompress_pl.spec.integer import UNSIGNED_BYTES, IntArray
from swincompress_pl.spec.kind import BYTES, Call, Kind, Tensors
from swincompress_pl.spec.program import Value

_FRACTION_BITS_MAX = 15


def _check_lif(call: Call) -> Value:
    x = call.source(0, "int32")
    steps, repeated = call.integer("steps", 1, 2**16), call.integer("repeated", 0, 1)
    call.require(bool(repeated) or x.rows % steps == 0, f"{x.rows} rows do not split into {steps} time steps")
    call.integer("decay", 0, 2**ops.DECAY_BITS)
    call.integer("input_decay", 0, 1)
    soft = call.integer("soft_reset", 0, 1)
    call.integer("fraction_bits", 0, _FRACTION_BITS_MAX)
    limits = {
        "threshold": (1, ops.THRESHOLD_MAX),
        "reset": (0, 0) if soft else (-ops.THRESHOLD_MAX, ops.THRESHOLD_MAX),
        "bias": (-ops.CURRENT_MAX, ops.CURRENT_MAX),
    }
    for role, (low, high) in limits.items():
        call.in_range(role, call.tensor(role, "int32", (x.channels,)), low, high)
    return call.counts((steps, *x.shape) if repeated else x.shape, "a spike", 1, "uint1")


def _check_max_pool(call: Call) -> Value:
    x = call.source(0, *BYTES, "int16", "int32")
    height, width = call.positions(x, call.pair("kernel", 1, 1024))
    return replace(call.output((*x.shape[:-3], height, width, x.channels), x.dtype), largest=x.largest)


def _check_block_sum(call: Call) -> Value:
    x = call.source(0, *UNSIGNED_BYTES, "int32")
    rows, channels = call.integer("rows", 1, 2**24), call.integer("channels", 1, 2**20)
    call.require(
        x.rows % rows == 0 and x.channels % channels == 0,
        f"input of {x.rows} rows and {x.channels} channels does not split into {rows} x {channels} blocks",
    )
    shape = (*x.shape[:-1], channels) if rows == x.rows else (rows, channels)
    if x.dtype == "int32":
        return call.output(shape, "int32")
    reach = x.reach * (x.rows // rows) * (x.channels // channels)
    return call.counts(shape, "a sum", reach, *UNSIGNED_BYTES, "int32")


def _check_multiply(call: Call) -> Value:
    a, b = call.source(0, *UNSIGNED_BYTES), call.source(1, *UNSIGNED_BYTES)
    call.require(
        a.rows % b.rows == 0 and a.channels % b.channels == 0,
        f"shapes {a.shape} and {b.shape}; the second's rows and channels must divide the first's",
    )
    return call.counts(a.shape, "a product", a.reach * b.reach, *UNSIGNED_BYTES)


def _check_spike_attention(call: Call) -> Value:
    q, k, v = (call.source(number, *UNSIGNED_BYTES) for number in range(3))
    windows, heads = call.integer("windows", 1, 2**20), call.integer("heads", 1, 2**12)
    call.require(
        q.rows == k.rows == v.rows and q.rows % windows == 0,
        f"q, k and v of {q.rows}, {k.rows} and {v.rows} tokens; they must agree and split into {windows} windows",
    )
    call.require(
        q.channels == k.channels and q.channels % heads == 0 and v.channels % heads == 0,
        f"q, k and v of {q.channels}, {k.channels} and {v.channels} channels; q and k must agree, and all split into "
        f"{heads} heads",
    )
    reach = (q.rows // windows) * (q.channels // heads) * q.reach * k.reach * v.reach
    return call.counts(v.shape, "a count", reach, "int32")


def _check_requantize(call: Call) -> Value:
    x = call.source(0, "int16", "int32")
    call.requantization(x.channels)
    return call.bounded(x.shape, *BYTES, "int16", "int32")


def _check_integrate(call: Call) -> Value:
    x = call.source(0, *UNSIGNED_BYTES, "int32")
    steps = call.integer("steps", 1, ops.STEPS_MAX)
    call.require(
        len(x.shape) > 1 and x.shape[0] == steps,
        f"input has shape {x.shape}; its first axis must be {steps} time steps",
    )
    call.tensor("bias", "int32", (x.channels,))
    call.requantization(x.channels)
    return call.bounded(x.shape[1:], *BYTES, "int16", "int32")


def _check_fire(call: Call) -> Value:
    x = call.source(0, "int16", "int32")
    steps = call.integer("steps", 1, ops.STEPS_MAX)
    call.requantization(x.channels)
    return call.counts((steps, *x.shape), "a spike", 1, "uint1")


def _spike_attention_macs(inputs: Sequence[Value], _: Value, attributes: Mapping[str, Any], __: Tensors) -> int:
    """The count of the cheaper of the two orders."""
    q, _, v = inputs
    windows, heads = int(attributes["windows"]), int(attributes["heads"])
    length, qk_dim, v_dim = q.rows // windows, q.channels // heads, v.channels // heads
    return windows * heads * length * min(length * (qk_dim + v_dim), 2 * qk_dim * v_dim)


def _tokens(x: IntArray) -> IntArray:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def at_most(result: IntArray, attributes: Mapping[str, Any]) -> IntArray:
    """A result without a sign, saturated at the attribute `largest` if there is one."""
    return np.minimum(result, result.dtype.type(attributes["largest"])) if "largest" in attributes else result


def _run_lif(inputs: Sequence[IntArray], tensors: Tensors, attributes: Mapping[str, Any], _: str) -> IntArray:
    options: dict[str, Any] = {**tensors, **attributes}
    return ops.lif(inputs[0], **options)


SPIKING_KINDS: dict[str, Kind] = {
    "lif": Kind(1, _check_lif, _run_lif),
    "max_pool": Kind(
        1, _check_max_pool, lambda x, t, a, dtype: ops.max_pool(x[0], **{key: tuple(a[key]) for key in a})
    ),
    "block_sum": Kind(1, _check_block_sum, lambda x, t, a, dtype: ops.block_sum(_tokens(x[0]), **a, dtype=dtype)),
    "multiply": Kind(
        2,
        _check_multiply,
        lambda x, t, a, dtype: ops.multiply(_tokens(x[0]), _tokens(x[1]), dtype=dtype).reshape(x[0].shape),
    ),
    "spike_attention": Kind(
        3,
        _check_spike_attention,
        lambda x, t, a, dtype: ops.spike_attention(*map(_tokens, x), **a).reshape(x[2].shape),
        _spike_attention_macs,
    ),
    "requantize": Kind(
        1, _check_requantize, lambda x, t, a, dtype: at_most(ops.requantize_channels(x[0], **t, dtype=dtype), a)
    ),
    "integrate": Kind(1, _check_integrate, lambda x, t, a, dtype: at_most(ops.integrate(x[0], **t, dtype=dtype), a)),
    "fire": Kind(1, _check_fire, lambda x, t, a, _: ops.fire(x[0], **t, steps=a["steps"])),
}
