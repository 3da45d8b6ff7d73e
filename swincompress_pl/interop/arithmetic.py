"""Exact integer arithmetic out of ONNX operators: how values are held, how a rounding shift is computed.

Values: the signed types of a byte are held as uint8 with 128 added, the unsigned ones as uint8, int16 and int32 as
int32. Products of uint8 by uint8 are exact in onnxruntime on every CPU; those of uint8 by int8 saturate at 16 bits on a
CPU without VNNI.

A shift with one rounding, floor((x mult + 2^(shift-1)) / 2^shift), is computed in float64 wherever the Program's proved
bounds allow it: mult / 2^shift is a float64, its product with x has at most 53 bits if |x| mult < 2^53, and adding 1/2
to it is exact if |x| mult + 2^(shift-1) < 2^53. Floor is then the shift. A bias or an offset that joins the same
addition counts in that bound. Elsewhere it is computed in int64, whose
division truncates: 2^62 is added, a multiple of 2^shift, so that nothing negative is divided, and its own quotient is
taken off again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.interop.graph import Array, OnnxGraph

OFFSET = 128  # of signed bytes
_EXACT = 2**53  # float64 holds every integer up to it
_LIFT = 2**62


def is_signed_byte(dtype: str) -> bool:
    """Whether values of this type are held with the offset."""
    return spec.STORAGE[dtype] == "int8"


def held_type(dtype: str) -> str:
    """The type that holds values of a type of the specification."""
    return "uint8" if spec.STORAGE[dtype] in ("int8", "uint8") else "int32"


def zero_point(dtype: str) -> int:
    """What holds 0."""
    return OFFSET if is_signed_byte(dtype) else 0


@dataclass(frozen=True, kw_only=True)
class Wide:
    """A value that is not stored yet: whole numbers as float64, int64 or int32, with `raised` added to them."""

    name: str
    dtype: str
    raised: int = 0


def widened(graph: OnnxGraph, x: str, dtype: str, to: str) -> str:
    """A held value as its numbers, in a wider type."""
    found = x if held_type(dtype) == to else graph.cast(x, to)
    if not is_signed_byte(dtype):
        return found
    name: str = graph.node("Sub", found, graph.constant(OFFSET, to))
    return name


def shifted(
    graph: OnnxGraph,
    x: Wide,
    mult: Array | int,
    shift: Array | int,
    reach: Array | int,
    *,
    added: Array | int = 0,
    raised: int = 0,
) -> Wide:
    """floor((x mult + added + 2^(shift-1)) / 2^shift) for whole numbers x of at most `reach` in magnitude.

    `mult`, `shift`, `reach` and `added` broadcast against x. `raised` is added to the result in the same operator,
    where there is room for it.
    """
    mult, shift, reach, added = (np.asarray(part, dtype=object) for part in (mult, shift, reach, added))
    half = 2 ** (shift - 1)
    needed = abs(mult) * reach + abs(added) + half
    if not np.all(needed < _EXACT):
        product = graph.node("Mul", _as(graph, x, "int64"), graph.constant(mult, "int64"))
        return shifted_int64(graph, product, added, shift)
    raised = raised if np.all(needed + raised * 2**shift < _EXACT) else 0
    unit = np.exp2(-np.asarray(shift, np.float64))
    product = graph.node(
        "Mul", _as(graph, x, "float64"), graph.constant(np.asarray(mult, np.float64) * unit, "float64")
    )
    rest = np.asarray(added + half + raised * 2**shift, np.float64) * unit
    total = graph.node("Add", product, graph.constant(rest, "float64"))
    return Wide(name=graph.node("Floor", total), dtype="float64", raised=raised)


def shifted_int64(graph: OnnxGraph, product: str, offset: Array | int, shift: Array | int) -> Wide:
    """floor((product + offset + 2^(shift-1)) / 2^shift) of int64 numbers, whose sum stays below 2^62 in magnitude."""
    shift = np.asarray(shift, dtype=object)
    added = np.asarray(offset, dtype=object) + 2 ** (shift - 1) + _LIFT
    lifted = graph.node("Add", product, graph.constant(added, "int64"))
    quotient = graph.node("Div", lifted, graph.constant(2**shift, "int64"))
    name = graph.node("Sub", quotient, graph.constant(_LIFT // 2**shift, "int64"))
    return Wide(name=name, dtype="int64")


def floor(graph: OnnxGraph, x: str) -> Wide:
    """The whole numbers below float64 numbers."""
    return Wide(name=graph.node("Floor", x), dtype="float64")


def _as(graph: OnnxGraph, x: Wide, dtype: str) -> str:
    return x.name if x.dtype == dtype else graph.cast(x.name, dtype)


def stored(graph: OnnxGraph, x: Wide, dtype: str, largest: int | None = None) -> str:
    """Whole numbers, saturated to a type of the specification, or at `largest`, as it is held."""
    low, high = spec.LIMITS[dtype]
    ends = (graph.constant(end + x.raised, x.dtype) for end in (low, high if largest is None else largest))
    found = graph.node("Clip", x.name, *ends)
    if zero_point(dtype) != x.raised:
        found = graph.node("Add", found, graph.constant(zero_point(dtype) - x.raised, x.dtype))
    return found if x.dtype == held_type(dtype) else graph.cast(found, held_type(dtype))


def held(values: npt.NDArray[Any], dtype: str) -> Array:
    """Constant values of a type, as they are held."""
    return (values.astype(np.int64) + zero_point(dtype)).astype(held_type(dtype))


def requantized(
    graph: OnnxGraph,
    sums: Wide,
    mult: Array,
    shift: Array,
    reach: Array | int,
    dtype: str,
    *,
    bias: Array | None = None,
    largest: int | None = None,
) -> str:
    """clamp(((sums + bias) mult + 2^(shift-1)) >> shift), stored; the last axis of the sums has mult and shift.

    The sums without the bias are at most `reach` in magnitude. With it, int32 ones stay in int32, and int64 ones below
    2^39. The result saturates at `largest`, if it is given.
    """
    biases = bias if bias is not None and bias.any() else None
    if dtype == "int32" and np.all(mult.astype(np.int64) == 2 ** shift.astype(np.int64)):
        total = sums.name if biases is None else graph.node("Add", sums.name, graph.constant(biases, sums.dtype))
        return total if sums.dtype == dtype else stored(graph, Wide(name=total, dtype=sums.dtype), dtype)
    added = 0 if biases is None else biases.astype(object) * mult.astype(object)
    rounded = shifted(graph, sums, mult, shift, reach, added=added, raised=zero_point(dtype))
    return stored(graph, rounded, dtype, largest)
