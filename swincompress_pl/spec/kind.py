"""What a kind of operation is, and how a call of it is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from swincompress_pl.spec.integer import (
    ACCUMULATOR_BOUND,
    LIMITS,
    MULTIPLIER_BITS,
    SHIFT_MAX,
    SIGNED_BYTES,
    UNSIGNED_BYTES,
    IntArray,
)
from swincompress_pl.spec.program import Operation, ProgramError, Value

Tensors = Mapping[str, IntArray]
_MISSING = object()
BYTES = (*SIGNED_BYTES, *UNSIGNED_BYTES)


def _listed(dtypes: Sequence[str]) -> str:
    """The types in words; a run of byte types is named by its ends, as in `int2 to int8 or int16`."""
    text = " or ".join(dtypes)
    for run in (SIGNED_BYTES, UNSIGNED_BYTES):
        text = text.replace(" or ".join(run), f"{run[0]} to {run[-1]}")
    return text


class Call:
    """One operation under check; its attributes, tensors and input values are checked when they are asked for."""

    def __init__(self, op: Operation, inputs: Sequence[Value], tensors: Tensors) -> None:
        self.op, self.inputs, self._tensors = op, inputs, tensors
        self._asked: set[str] = set()
        self._asked_attributes: set[str] = set()
        self.accumulator_reach: int | None = None  # largest magnitude of the accumulators, where it was proved

    def fail(self, message: str) -> ProgramError:
        """An error that names the operation."""
        return ProgramError(f"{self.op.kind} {self.op.name!r}: {message}")

    def require(self, condition: bool, message: str) -> None:
        """Raises `fail(message)` unless `condition` holds."""
        if not condition:
            raise self.fail(message)

    def source(self, number: int, *dtypes: str) -> Value:
        """Input `number`, which must be of one of `dtypes`."""
        value = self.inputs[number]
        self.require(value.dtype in dtypes, f"input {number} is {value.dtype}; it must be {_listed(dtypes)}")
        return value

    def output(self, shape: tuple[int, ...], *dtypes: str) -> Value:
        """The output value, whose type must be one of `dtypes`."""
        self.require(self.op.dtype in dtypes, f"output is {self.op.dtype}; it must be {_listed(dtypes)}")
        return Value(dtype=self.op.dtype, shape=shape)

    def bounded(self, shape: tuple[int, ...], *dtypes: str) -> Value:
        """The output value, which saturates to its type, or at the attribute `largest` if it has no sign."""
        value = self.output(shape, *dtypes)
        if "largest" not in self.op.attributes:
            return value
        self.require(value.dtype in UNSIGNED_BYTES, f"output is {value.dtype}; attribute largest is for uint1 to uint8")
        return replace(value, largest=self.integer("largest", 1, LIMITS[value.dtype][1]))

    def counts(self, shape: tuple[int, ...], what: str, reach: int, *dtypes: str) -> Value:
        """An output of sums of spikes, none of which exceeds `reach`; `what` names one of them in the error."""
        value = self.output(shape, *dtypes)
        self.require(reach <= LIMITS[value.dtype][1], f"{what} may reach {reach}, beyond {value.dtype}")
        return Value(dtype=value.dtype, shape=shape, largest=reach)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """The integer attribute `key` in [low, high]; `default` if it is absent, or an error without a default."""
        self._asked_attributes.add(key)
        value = self.op.attributes.get(key, _MISSING if default is None else default)
        if type(value) is not int or not low <= value <= high:
            shown = "missing" if value is _MISSING else repr(value)
            raise self.fail(f"attribute {key} is {shown}; it must be an integer in [{low}, {high}]")
        return value

    def pair(self, key: str, low: int, high: int) -> tuple[int, int]:
        """The attribute `key`, two integers in [low, high]."""
        self._asked_attributes.add(key)
        value = self.op.attributes.get(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 2
            or not all(type(v) is int and low <= v <= high for v in value)
        ):
            raise self.fail(f"attribute {key} is {value!r}; it must be two integers in [{low}, {high}]")
        return (value[0], value[1])

    def positions(self, x: Value, kernel: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the places of a sliding window, by the attributes stride and padding.

        Images are (H, W, C) or (T, H, W, C).
        """
        self.require(
            len(x.shape) in (3, 4), f"input has shape {x.shape}; a window slides over (height, width, channels)"
        )
        stride, padding = self.pair("stride", 1, 1024), self.pair("padding", 0, 1024)
        self.require(
            all(p < k for p, k in zip(padding, kernel, strict=True)), f"padding {padding} reaches kernel {kernel}"
        )
        height, width = (
            (size + 2 * p - k) // s + 1 for size, p, k, s in zip(x.shape[-3:-1], padding, kernel, stride, strict=True)
        )
        self.require(height > 0 and width > 0, f"kernel {kernel} is larger than the padded input {x.shape[-3:-1]}")
        return height, width

    def tensor(self, role: str, dtype: str, *shapes: tuple[int, ...]) -> IntArray:
        """The tensor of a role, which must have that type and one of the shapes."""
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
        """Whether the operation has a tensor of this role."""
        return role in self._tensors

    def in_range(self, role: str, tensor: IntArray, low: int, high: int) -> None:
        """Requires all values of a tensor to lie in [low, high]."""
        smallest, largest = int(tensor.min()), int(tensor.max())
        self.require(
            low <= smallest and largest <= high,
            f"tensor {role!r} holds values in [{smallest}, {largest}]; they must lie in [{low}, {high}]",
        )

    def requantization(
        self, channels: int, mult: str = "mult", shift: str = "shift", shift_max: int = SHIFT_MAX
    ) -> None:
        """Requires the tensors of a requantization per channel."""
        self.in_range(mult, self.tensor(mult, "int32", (channels,)), 0, 2**MULTIPLIER_BITS - 1)
        self.in_range(shift, self.tensor(shift, "uint8", (channels,)), 1, shift_max)

    def accumulator(self, value: Value, weight: IntArray, bias: IntArray) -> None:
        """Proves |bias| + a_max * sum |w| < 2**31 for every output channel of the weight (M, K)."""
        reach = value.reach * np.abs(weight.astype(np.int64)).sum(axis=1)
        peak = np.abs(bias.astype(np.int64)).reshape(-1, weight.shape[0]).max(axis=0)
        self.accumulator_reach = int((reach + peak).max())
        self.require(
            self.accumulator_reach < ACCUMULATOR_BOUND,
            f"accumulator may reach {self.accumulator_reach}, beyond int32; the layer is too wide or its bias too "
            "large for its scale",
        )

    def nothing_else(self) -> None:
        """Requires that every tensor and attribute was asked for."""
        for what, extra in (
            ("tensor", set(self._tensors) - self._asked),
            ("attribute", set(self.op.attributes) - self._asked_attributes),
        ):
            self.require(not extra, f"unknown {what} {', '.join(map(repr, sorted(extra)))}")


@dataclass(frozen=True)
class Kind:
    """What one kind of operation is.

    Attributes:
        arity: Number of inputs.
        check: Proves a call and returns its output value.
        run: Computes (inputs, tensors, attributes, output type) -> output, with the batch as first axis.
        macs: Counts the multiply-accumulates per image.
    """

    arity: int
    check: Callable[[Call], Value]
    run: Callable[[Sequence[IntArray], Tensors, Mapping[str, Any], str], IntArray]
    macs: Callable[[Sequence[Value], Value, Mapping[str, Any], Tensors], int] = lambda *_: 0
