"""The kinds of operation: for each, what it computes, what it accepts, and what it costs.

`KINDS` is the one list that the checker, the reference interpreter, the torch twin, the exporter and the engine go by.
A kind proves its bounds from the tensors themselves, so a Program that passes `check` cannot overflow on any input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swincompress_pl.norm import operations as ops
from swincompress_pl.norm.integer import (
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
from swincompress_pl.norm.program import Operation, ProgramError, Value

Tensors = Mapping[str, IntArray]
_MISSING = object()
_BYTES = (*SIGNED_BYTES, *UNSIGNED_BYTES)


def _listed(dtypes: Sequence[str]) -> str:
    """`int2 to int8 or int16`: the types in words, runs of byte types by their ends."""
    text = " or ".join(dtypes)
    for run in (SIGNED_BYTES, UNSIGNED_BYTES):
        text = text.replace(" or ".join(run), f"{run[0]} to {run[-1]}")
    return text


class _Call:
    """One operation under examination: its attributes, tensors and input values, each checked when asked for."""

    def __init__(self, op: Operation, inputs: Sequence[Value], tensors: Tensors) -> None:
        self.op, self.inputs, self._tensors = op, inputs, tensors
        self._asked: set[str] = set()
        self._asked_attributes: set[str] = set()

    def fail(self, message: str) -> ProgramError:
        return ProgramError(f"{self.op.kind} {self.op.name!r}: {message}")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise self.fail(message)

    def source(self, number: int, *dtypes: str) -> Value:
        value = self.inputs[number]
        self.require(value.dtype in dtypes, f"input {number} is {value.dtype}; it must be {_listed(dtypes)}")
        return value

    def output(self, shape: tuple[int, ...], *dtypes: str) -> Value:
        self.require(self.op.dtype in dtypes, f"output is {self.op.dtype}; it must be {_listed(dtypes)}")
        return Value(dtype=self.op.dtype, shape=shape)

    def integer(self, key: str, low: int, high: int) -> int:
        self._asked_attributes.add(key)
        value = self.op.attributes.get(key, _MISSING)
        if type(value) is not int or not low <= value <= high:
            shown = "missing" if value is _MISSING else repr(value)
            raise self.fail(f"attribute {key} is {shown}; it must be an integer in [{low}, {high}]")
        return value

    def pair(self, key: str, low: int, high: int) -> tuple[int, int]:
        self._asked_attributes.add(key)
        value = self.op.attributes.get(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 2
            or not all(type(v) is int and low <= v <= high for v in value)
        ):
            raise self.fail(f"attribute {key} is {value!r}; it must be two integers in [{low}, {high}]")
        return (value[0], value[1])

    def tensor(self, role: str, dtype: str, *shapes: tuple[int, ...]) -> IntArray:
        self._asked.add(role)
        if role not in self._tensors:
            raise self.fail(f"tensor {role!r} is missing")
        tensor = self._tensors[role]
        self.require(tensor.dtype == np.dtype(dtype), f"tensor {role!r} is {tensor.dtype}; it must be {dtype}")
        self.require(
            tensor.shape in shapes,
            f"tensor {role!r} has shape {tensor.shape}; it must be {' or '.join(map(str, shapes))}",
        )
        return tensor

    def has(self, role: str) -> bool:
        return role in self._tensors

    def in_range(self, role: str, tensor: IntArray, low: int, high: int) -> None:
        smallest, largest = int(tensor.min()), int(tensor.max())
        self.require(
            low <= smallest and largest <= high,
            f"tensor {role!r} holds values in [{smallest}, {largest}]; they must lie in [{low}, {high}]",
        )

    def requantization(
        self, channels: int, mult: str = "mult", shift: str = "shift", shift_max: int = SHIFT_MAX
    ) -> None:
        self.in_range(mult, self.tensor(mult, "int32", (channels,)), 0, 2**MULTIPLIER_BITS - 1)
        self.in_range(shift, self.tensor(shift, "uint8", (channels,)), 1, shift_max)

    def accumulator(self, value: Value, weight: IntArray, bias: IntArray) -> None:
        """Proves |bias| + a_max * sum |w| < 2**31 for every output channel. weight: (M, K)."""
        a_max = LIMITS[value.dtype][1]
        reach = a_max * np.abs(weight.astype(np.int64)).sum(axis=1)
        peak = np.abs(bias.astype(np.int64)).reshape(-1, weight.shape[0]).max(axis=0)
        worst = int((reach + peak).max())
        self.require(
            worst < ACCUMULATOR_BOUND,
            f"accumulator may reach {worst}, beyond int32; the layer is too wide or its bias too large for its scale",
        )

    def nothing_else(self) -> None:
        for what, extra in (
            ("tensor", set(self._tensors) - self._asked),
            ("attribute", set(self.op.attributes) - self._asked_attributes),
        ):
            self.require(not extra, f"unknown {what} {', '.join(map(repr, sorted(extra)))}")


@dataclass(frozen=True)
class Kind:
    """check: proves a call and gives its output value; run: arrays in, array out; macs: multiply-accumulates an
    image."""

    arity: int
    check: Callable[[_Call], Value]
    run: Callable[[Sequence[IntArray], Tensors, Mapping[str, Any], str], IntArray]
    macs: Callable[[Sequence[Value], Value, Mapping[str, Any], Tensors], int] = lambda *_: 0


def _weight_in_range(call: _Call, weight: IntArray) -> None:
    call.in_range("weight", weight, -127, 127)


def _check_linear(call: _Call) -> Value:
    x = call.source(0, *_BYTES)
    channels = call.integer("channels", 1, 2**20)
    weight = call.tensor("weight", "int8", (channels, x.channels))
    _weight_in_range(call, weight)
    call.accumulator(x, weight, call.tensor("bias", "int32", (channels,)))
    call.requantization(channels)
    return call.output((*x.shape[:-1], channels), *_BYTES, "int16", "int32")


def _check_conv2d(call: _Call) -> Value:
    x = call.source(0, *_BYTES)
    call.require(len(x.shape) == 3, f"input has shape {x.shape}; a convolution takes (height, width, channels)")
    channels = call.integer("channels", 1, 2**20)
    kernel, stride = call.pair("kernel", 1, 1024), call.pair("stride", 1, 1024)
    padding = call.pair("padding", 0, 1024)
    call.require(all(p < k for p, k in zip(padding, kernel, strict=True)), f"padding {padding} reaches kernel {kernel}")
    height, width = (
        (size + 2 * p - k) // s + 1 for size, p, k, s in zip(x.shape[:2], padding, kernel, stride, strict=True)
    )
    call.require(height > 0 and width > 0, f"kernel {kernel} is larger than the padded input {x.shape[:2]}")
    weight = call.tensor("weight", "int8", (channels, *kernel, x.channels))
    _weight_in_range(call, weight)
    bias = call.tensor("bias", "int32", (channels,), (height, width, channels))
    call.accumulator(x, weight.reshape(channels, -1), bias)
    call.requantization(channels)
    return call.output((height, width, channels), *_BYTES, "int16", "int32")


def _check_layer_norm(call: _Call) -> Value:
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


def _check_table(call: _Call) -> Value:
    x = call.source(0, *SIGNED_BYTES)
    output = call.output(x.shape, *_BYTES, "int16")
    # 256 entries for a narrower input too: its codes are bytes like any other
    call.in_range("values", call.tensor("values", STORAGE[output.dtype], (256,)), *LIMITS[output.dtype])
    return output


def _check_add(call: _Call) -> Value:
    a, b = call.source(0, *SIGNED_BYTES, "int16", "int32"), call.inputs[1]
    call.require(
        a.dtype == b.dtype == call.op.dtype, f"adds {a.dtype} and {b.dtype} into {call.op.dtype}; they must agree"
    )
    call.require(
        a.rows == b.rows and a.channels == b.channels,
        f"adds shapes {a.shape} and {b.shape}; rows and channels must agree",
    )
    return call.output(a.shape, a.dtype)


def _check_add_constant(call: _Call) -> Value:
    x = call.source(0, *SIGNED_BYTES, "int16")
    constant = call.tensor("constant", STORAGE[x.dtype], (x.rows, x.channels))
    call.in_range("constant", constant, *LIMITS[x.dtype])
    return call.output((x.rows, x.channels), x.dtype)


def _check_prepend(call: _Call) -> Value:
    x = call.source(0, *SIGNED_BYTES, "int16")
    count = call.integer("rows", 1, 2**16)
    call.in_range("rows", call.tensor("rows", STORAGE[x.dtype], (count, x.channels)), *LIMITS[x.dtype])
    return call.output((count + x.rows, x.channels), x.dtype)


def _check_gather(call: _Call) -> Value:
    x = call.source(0, *_BYTES, "int16")
    rows, joined = call.integer("rows", 1, 2**24), call.integer("joined", 1, 2**10)
    call.in_range("index", call.tensor("index", "int32", (rows, joined)), -1, x.rows - 1)
    return call.output((rows, joined * x.channels), x.dtype)


def _check_mean(call: _Call) -> Value:
    x = call.source(0, *_BYTES, "int16")
    reach = x.rows * LIMITS[x.dtype][1]
    call.require(reach < ACCUMULATOR_BOUND, f"the sum over {x.rows} tokens may reach {reach}, beyond int32")
    call.requantization(x.channels)
    return call.output((x.channels,), *_BYTES, "int16")


def _check_attention(call: _Call) -> Value:
    x = call.source(0, *SIGNED_BYTES)
    windows, heads = call.integer("windows", 1, 2**20), call.integer("heads", 1, 2**12)
    qk_dim, v_dim = call.integer("qk_dim", 1, 2**12), call.integer("v_dim", 1, 2**12)
    call.require(x.rows % windows == 0, f"{x.rows} tokens do not split into {windows} windows")
    length, channels = x.rows // windows, heads * (2 * qk_dim + v_dim)
    call.require(x.channels == channels, f"input has {x.channels} channels; {heads} heads need {channels}")
    # e sums of at most 255 * length and sums of e * v must stay in int32
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
        lambda x, t, a, dtype: ops.linear(x[0], **t, dtype=dtype),
        lambda inputs, output, a, t: output.rows * int(t["weight"].size),
    ),
    "conv2d": Kind(
        1,
        _check_conv2d,
        lambda x, t, a, dtype: ops.conv2d(
            x[0], **t, stride=tuple(a["stride"]), padding=tuple(a["padding"]), dtype=dtype
        ),
        _conv_macs,
    ),
    "layer_norm": Kind(
        1,
        _check_layer_norm,
        lambda x, t, a, dtype: ops.layer_norm(x[0], **t, epsilon=a["epsilon"], shift=a["shift"], dtype=dtype),
    ),
    "table": Kind(1, _check_table, lambda x, t, a, dtype: ops.table(x[0], t["values"])),
    "add": Kind(2, _check_add, lambda x, t, a, dtype: ops.add(x[0], x[1].reshape(x[0].shape), dtype=dtype)),
    "add_constant": Kind(
        1, _check_add_constant, lambda x, t, a, dtype: ops.add(_tokens(x[0]), t["constant"], dtype=dtype)
    ),
    "prepend": Kind(1, _check_prepend, lambda x, t, a, dtype: ops.prepend(_tokens(x[0]), t["rows"])),
    "gather": Kind(1, _check_gather, lambda x, t, a, dtype: ops.gather(_tokens(x[0]), t["index"])),
    "mean": Kind(1, _check_mean, lambda x, t, a, dtype: ops.mean(_tokens(x[0]), **t, dtype=dtype)),
    "attention": Kind(1, _check_attention, _run_attention, _attention_macs),
}


def check_operation(op: Operation, inputs: Sequence[Value], tensors: Tensors) -> Value:
    """The output value of `op`, or ProgramError naming the operation, the entry and the bound it breaks."""
    if op.kind not in KINDS:
        raise ProgramError(f"operation {op.name!r}: unknown kind {op.kind!r}; kinds are {', '.join(KINDS)}")
    kind = KINDS[op.kind]
    call = _Call(op, inputs, tensors)
    call.require(len(inputs) == kind.arity, f"takes {kind.arity} inputs, got {len(inputs)}")
    output = kind.check(call)
    call.nothing_else()
    return output
