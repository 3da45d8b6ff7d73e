"""The kinds of operation: for each, what it computes, what it accepts, and what it costs.

The checker, the reference interpreter, the torch twin, the exporter and the engine all follow the one list `KINDS`. A
kind proves its bounds from the tensors themselves, so a Program that passes `check` cannot overflow on any input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from swincompress_pl.spec import operations as ops
from swincompress_pl.spec.integer import (
    ACCUMULATOR_BOUND,
    LAYER_NORM_CHANNELS_MAX,
    LIMITS,
    MULTIPLIER_BITS,
    RECIPROCAL_BITS,
    SHIFT_MAX,
    SIGNED_BYTES,
    STORAGE,
    UNSIGNED_BYTES,
    IntArray,
)
from swincompress_pl.spec.kind import BYTES, Call, Kind, Tensors
from swincompress_pl.spec.program import Operation, ProgramError, Value
from swincompress_pl.spec.spiking_kinds import SPIKING_KINDS, at_most


def _weight_in_range(call: Call, weight: IntArray) -> None:
    call.in_range("weight", weight, -127, 127)


def _check_linear(call: Call) -> Value:
    x = call.source(0, *BYTES)
    channels = call.integer("channels", 1, 2**20)
    weight = call.tensor("weight", "int8", (channels, x.channels))
    _weight_in_range(call, weight)
    call.accumulator(x, weight, call.tensor("bias", "int32", (channels,)))
    call.requantization(channels)
    return call.bounded((*x.shape[:-1], channels), *BYTES, "int16", "int32")


def _check_conv2d(call: Call) -> Value:
    x = call.source(0, *BYTES)
    channels, groups = call.integer("channels", 1, 2**20), call.integer("groups", 1, 2**20, default=1)
    call.require(
        x.channels % groups == 0 and channels % groups == 0,
        f"{x.channels} inputs and {channels} outputs do not split into {groups} groups",
    )
    kernel = call.pair("kernel", 1, 1024)
    height, width = call.positions(x, kernel)
    weight = call.tensor("weight", "int8", (channels, *kernel, x.channels // groups))
    _weight_in_range(call, weight)
    bias = call.tensor("bias", "int32", (channels,), (height, width, channels))
    call.accumulator(x, weight.reshape(channels, -1), bias)
    call.requantization(channels)
    return call.bounded((*x.shape[:-3], height, width, channels), *BYTES, "int16", "int32")


def _check_layer_norm(call: Call) -> Value:
    x = call.source(0, *SIGNED_BYTES, "int16")
    call.require(
        x.channels <= LAYER_NORM_CHANNELS_MAX,
        f"{x.channels} channels; at most {LAYER_NORM_CHANNELS_MAX} keep the bounds",
    )
    call.integer("epsilon", 0, 2**58)
    call.integer("shift", 1, SHIFT_MAX)
    limit = 2**MULTIPLIER_BITS - 1
    call.in_range("gain", call.tensor("gain", "int32", (x.channels,)), -limit, limit)
    call.in_range("offset", call.tensor("offset", "int64", (x.channels,)), -(2**60), 2**60)
    return call.output(x.shape, *SIGNED_BYTES, "int16")


def _check_softmax(call: Call) -> Value:
    x = call.source(0, *BYTES, "int16", "int32")
    call.require(x.channels <= 2**16, f"{x.channels} channels; at most {2**16} keep the bounds")
    call.integer("mult", 0, 2**MULTIPLIER_BITS - 1)
    call.integer("shift", 1, SHIFT_MAX)
    return call.output(x.shape, "uint8")


def _check_table(call: Call) -> Value:
    x = call.source(0, *SIGNED_BYTES)
    output = call.output(x.shape, *BYTES, "int16")
    # A narrower input also needs 256 entries, because its codes are stored as bytes.
    call.in_range("values", call.tensor("values", STORAGE[output.dtype], (256,)), *LIMITS[output.dtype])
    return output


def _check_add(call: Call) -> Value:
    a, b = call.source(0, *BYTES, "int16", "int32"), call.inputs[1]
    call.require(
        a.rows % b.rows == 0 and a.channels == b.channels,
        f"adds shapes {a.shape} and {b.shape}; rows and channels must agree, or the second's rows divide the first's",
    )
    if all(dtype in UNSIGNED_BYTES for dtype in (a.dtype, b.dtype, call.op.dtype)):
        return call.counts(a.shape, "the sum", a.reach + b.reach, *UNSIGNED_BYTES)
    call.require(
        a.dtype == b.dtype == call.op.dtype, f"adds {a.dtype} and {b.dtype} into {call.op.dtype}; they must agree"
    )
    return call.output(a.shape, a.dtype)


def _check_add_constant(call: Call) -> Value:
    x = call.source(0, *SIGNED_BYTES, "int16")
    constant = call.tensor("constant", STORAGE[x.dtype], (x.rows, x.channels))
    call.in_range("constant", constant, *LIMITS[x.dtype])
    return call.output((x.rows, x.channels), x.dtype)


def _check_prepend(call: Call) -> Value:
    x = call.source(0, *SIGNED_BYTES, "int16")
    count = call.integer("rows", 1, 2**16)
    call.in_range("rows", call.tensor("rows", STORAGE[x.dtype], (count, x.channels)), *LIMITS[x.dtype])
    return call.output((count + x.rows, x.channels), x.dtype)


def _check_gather(call: Call) -> Value:
    x = call.source(0, *BYTES, "int16")
    rows, joined = call.integer("rows", 1, 2**24), call.integer("joined", 1, 2**10)
    call.in_range("index", call.tensor("index", "int32", (rows, joined)), -1, x.rows - 1)
    return replace(call.output((rows, joined * x.channels), x.dtype), largest=x.largest)


def _check_mean(call: Call) -> Value:
    x = call.source(0, *BYTES, "int16")
    reach = x.rows * x.reach
    call.require(reach < ACCUMULATOR_BOUND, f"the sum over {x.rows} tokens may reach {reach}, beyond int32")
    call.requantization(x.channels)
    return call.output((x.channels,), *BYTES, "int16")


def _check_attention(call: Call) -> Value:
    x = call.source(0, *SIGNED_BYTES)
    windows, heads = call.integer("windows", 1, 2**20), call.integer("heads", 1, 2**12)
    qk_dim, v_dim = call.integer("qk_dim", 1, 2**12), call.integer("v_dim", 1, 2**12)
    call.require(x.rows % windows == 0, f"{x.rows} tokens do not split into {windows} windows")
    length, channels = x.rows // windows, heads * (2 * qk_dim + v_dim)
    call.require(x.channels == channels, f"input has {x.channels} channels; {heads} heads need {channels}")
    # Sums of e, at most 255 * length, and sums of e * v must stay in int32.
    call.require(length <= 2**16, f"windows of {length} tokens; at most {2**16} keep the bounds")
    reach = LIMITS[x.dtype][1] ** 2 * qk_dim
    if call.has("bias_table"):
        bias_table = call.tensor("bias_table", "int32", (heads, call.integer("biases", 1, 2**24)))
        reach += int(np.abs(bias_table.astype(np.int64)).max())
        call.in_range("bias_index", call.tensor("bias_index", "int32", (length, length)), 0, bias_table.shape[1] - 1)
    call.require(2 * reach < ACCUMULATOR_BOUND, f"logits may differ by {2 * reach}, beyond int32")
    if call.has("region"):
        call.tensor("region", "uint8", (windows, length))
    call.requantization(heads, "exp_mult", "exp_shift")
    call.requantization(heads, "out_mult", "out_shift", shift_max=62 - RECIPROCAL_BITS)
    return call.output((x.rows, heads * v_dim), *SIGNED_BYTES)


def _tokens(x: IntArray) -> IntArray:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _run_attention(inputs: Sequence[IntArray], tensors: Tensors, attributes: Mapping[str, Any], dtype: str) -> IntArray:
    options: dict[str, Any] = {key: attributes[key] for key in ("windows", "heads", "qk_dim", "v_dim")}
    return ops.attention(_tokens(inputs[0]), dtype=dtype, **options | dict(tensors))


def _attention_macs(inputs: Sequence[Value], _: Value, attributes: Mapping[str, Any], __: Tensors) -> int:
    rows, windows = inputs[0].rows, int(attributes["windows"])
    return rows * (rows // windows) * int(attributes["heads"]) * int(attributes["qk_dim"] + attributes["v_dim"])


def _conv_macs(_: Sequence[Value], output: Value, __: Mapping[str, Any], tensors: Tensors) -> int:
    return output.rows * int(tensors["weight"].size)


KINDS: dict[str, Kind] = {
    "linear": Kind(
        1,
        _check_linear,
        lambda x, t, a, dtype: at_most(ops.linear(x[0], **t, dtype=dtype), a),
        lambda inputs, output, a, t: output.rows * int(t["weight"].size),
    ),
    "conv2d": Kind(
        1,
        _check_conv2d,
        lambda x, t, a, dtype: at_most(
            ops.conv2d(
                x[0],
                **t,
                stride=tuple(a["stride"]),
                padding=tuple(a["padding"]),
                groups=a.get("groups", 1),
                dtype=dtype,
            ),
            a,
        ),
        _conv_macs,
    ),
    "layer_norm": Kind(
        1,
        _check_layer_norm,
        lambda x, t, a, dtype: ops.layer_norm(x[0], **t, epsilon=a["epsilon"], shift=a["shift"], dtype=dtype),
    ),
    "softmax": Kind(1, _check_softmax, lambda x, t, a, dtype: ops.softmax(x[0], mult=a["mult"], shift=a["shift"])),
    "table": Kind(1, _check_table, lambda x, t, a, dtype: ops.table(x[0], t["values"])),
    "add": Kind(2, _check_add, lambda x, t, a, dtype: ops.add_values(x[0], x[1], dtype=dtype)),
    "add_constant": Kind(
        1, _check_add_constant, lambda x, t, a, dtype: ops.add(_tokens(x[0]), t["constant"], dtype=dtype)
    ),
    "prepend": Kind(1, _check_prepend, lambda x, t, a, dtype: ops.prepend(_tokens(x[0]), t["rows"])),
    "gather": Kind(1, _check_gather, lambda x, t, a, dtype: ops.gather(_tokens(x[0]), t["index"])),
    "mean": Kind(1, _check_mean, lambda x, t, a, dtype: ops.mean(_tokens(x[0]), **t, dtype=dtype)),
    "attention": Kind(1, _check_attention, _run_attention, _attention_macs),
    **SPIKING_KINDS,
}


def check_operation(op: Operation, inputs: Sequence[Value], tensors: Tensors) -> Value:
    """The output value of `op`; a ProgramError names the operation, the entry and the bound that it breaks."""
    return prove_operation(op, inputs, tensors)[0]


def prove_operation(op: Operation, inputs: Sequence[Value], tensors: Tensors) -> tuple[Value, int | None]:
    """The result of `check_operation`, and the largest magnitude of the accumulators, None where none is proved."""
    if op.kind not in KINDS:
        raise ProgramError(f"operation {op.name!r}: unknown kind {op.kind!r}; kinds are {', '.join(KINDS)}")
    kind = KINDS[op.kind]
    call = Call(op, inputs, tensors)
    call.require(len(inputs) == kind.arity, f"takes {kind.arity} inputs, got {len(inputs)}")
    output = kind.check(call)
    call.nothing_else()
    return output, call.accumulator_reach
