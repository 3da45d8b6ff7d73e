"""Types below 8 bits: their ranges, what takes them, and the bounds that they loosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.program_cases import MAKERS, small_program

from swincompress_pl.spec import LIMITS, STORAGE, Operation, Program, ProgramError, Value, check, run
from swincompress_pl.spec.integer import ITEMSIZE, SIGNED_BYTES, UNSIGNED_BYTES, requantize, saturate
from swincompress_pl.spec.kinds import KINDS, check_operation


def test_ranges_are_symmetric_or_start_at_zero() -> None:
    assert [LIMITS[dtype] for dtype in SIGNED_BYTES] == [(-m, m) for m in (1, 3, 7, 15, 31, 63, 127)]
    assert [LIMITS[dtype] for dtype in UNSIGNED_BYTES] == [(0, m) for m in (1, 3, 7, 15, 31, 63, 127, 255)]
    for dtype, (low, high) in LIMITS.items():
        held = np.iinfo(STORAGE[dtype])
        assert held.min <= low <= 0 < high <= held.max
        assert ITEMSIZE[dtype] == held.bits // 8


@pytest.mark.parametrize("dtype", [*SIGNED_BYTES, *UNSIGNED_BYTES])
def test_saturation_is_to_the_narrow_range(dtype: str) -> None:
    low, high = LIMITS[dtype]
    given_values = np.array([-(2**31) + 1, low - 1, low, 0, high, high + 1, 2**31 - 1])
    expected = [low, low, low, 0, high, high, high]
    assert saturate(given_values, dtype).tolist() == expected
    assert saturate(given_values, dtype).dtype == STORAGE[dtype]
    one = (np.array([2**21]), np.array([21], np.uint8))
    assert requantize(given_values[:, None], *one, dtype)[:, 0].tolist() == expected


@given(st.integers(0, 2**32 - 1), st.sampled_from([maker.__name__ for maker in MAKERS]), st.booleans())
@settings(max_examples=300)
def test_outputs_stay_in_their_range(seed: int, maker: str, corners: bool) -> None:
    make = next(candidate for candidate in MAKERS if candidate.__name__ == maker)
    op, inputs, tensors, value = make(np.random.default_rng(seed), corners)
    declared = check_operation(op, [value] * len(inputs), tensors)
    result = KINDS[op.kind].run(inputs, tensors, op.attributes, op.dtype)
    low, high = LIMITS[declared.dtype]
    assert low <= result.min() <= result.max() <= high
    assert result.dtype == STORAGE[declared.dtype]


@pytest.mark.parametrize("byte", SIGNED_BYTES)
def test_programs_of_every_width_check_and_survive_their_description(byte: str) -> None:
    program = small_program(3, byte=byte, weight="int4")
    assert {value.dtype for value in check(program).values()} == {"uint8", byte, "int16", "int32"}
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    again = Program.from_description(program.describe(), program.tensors)
    assert np.array_equal(run(again, images), run(program, images))
    assert len({tuple(row) for row in run(program, images)}) > (1 if byte == "int2" else 3)


def linear(dtype: str, attributes: dict[str, Any] | None = None) -> Operation:
    return Operation(kind="linear", name="l", inputs=("x",), output="y", dtype=dtype, attributes=attributes or {})


@pytest.mark.parametrize(("source", "reach"), [("int8", 127), ("int4", 7), ("uint4", 15), ("int2", 1), ("uint2", 3)])
def test_the_accumulator_bound_follows_the_input(source: str, reach: int) -> None:
    weight = np.full((1, 1000), 127, np.int8)
    room = 2**31 - 1 - reach * 127 * 1000
    tensors = {"weight": weight, "mult": np.ones(1, np.int32), "shift": np.ones(1, np.uint8)}
    value = Value(dtype=source, shape=(2, 1000))
    op = linear("int4", {"channels": 1})
    assert check_operation(op, [value], {**tensors, "bias": np.array([room], np.int32)}).dtype == "int4"
    with pytest.raises(ProgramError, match=f"accumulator may reach {2**31}"):
        check_operation(op, [value], {**tensors, "bias": np.array([room + 1], np.int64).astype(np.int32)})


@pytest.mark.parametrize(("source", "reach"), [("int8", 127), ("int5", 15), ("int2", 1)])
def test_the_bound_of_attention_follows_the_input(source: str, reach: int) -> None:
    pair = {"mult": np.ones(1, np.int32), "shift": np.ones(1, np.uint8)}
    tensors = {f"{name}_{key}": array for name in ("exp", "out") for key, array in pair.items()}
    tensors["bias_index"] = np.zeros((2, 2), np.int32)
    attributes = {"windows": 1, "heads": 1, "qk_dim": 64, "v_dim": 1, "biases": 1}
    op = dataclasses.replace(linear("int3", attributes), kind="attention")
    value = Value(dtype=source, shape=(2, 129))
    room = 2**30 - 1 - reach * reach * 64
    check_operation(op, [value], {**tensors, "bias_table": np.array([[room]], np.int32)})
    with pytest.raises(ProgramError, match=f"logits may differ by {2**31}"):
        check_operation(op, [value], {**tensors, "bias_table": np.array([[room + 1]], np.int32)})


def retyped(program: Program, name: str, dtype: str) -> Program:
    operations = [dataclasses.replace(op, dtype=dtype) if op.name == name else op for op in program.operations]
    return dataclasses.replace(program, operations=tuple(operations))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("fc1", "int9", "fc1.*output is int9; it must be int2 to int8 or uint1 to uint8 or int16 or int32"),
        ("fc1", "int1", "fc1.*output is int1"),
        ("fc1", "uint01", "fc1.*output is uint01"),
        ("fc1", "int04", "fc1.*output is int04"),
        ("gelu", "int3", r"gelu.*'values' holds values in \[-7, 7\]; they must lie in \[-3, 3\]"),
        ("gelu", "uint4", "gelu.*'values' is int8; it must be uint8"),
        ("norm1", "uint4", "norm1.*output is uint4; it must be int2 to int8 or int16"),
        ("windows", "int5", "windows.*output is int5; it must be int4"),
        ("fc1", "uint4", "gelu.*input 0 is uint4; it must be int2 to int8"),
        ("qkv", "uint4", "attention.*input 0 is uint4"),
        ("add1", "int4", "add1.*adds int16 and int16 into int4"),
    ],
)
def test_types_that_do_not_fit_are_refused_by_name(name: str, dtype: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check(retyped(small_program(byte="int4"), name, dtype))


@pytest.mark.parametrize("dtype", ["int1", "int9", "uint0", "uint16", "float32", ""])
def test_unknown_values_are_refused(dtype: str) -> None:
    with pytest.raises(ProgramError, match="types are int2"):
        Value(dtype=dtype, shape=(1, 1))


@pytest.mark.parametrize(("kind", "role"), [("add_constant", "constant"), ("prepend", "rows")])
def test_constants_lie_in_the_narrow_range(kind: str, role: str) -> None:
    attributes = {"rows": 2} if kind == "prepend" else {}
    op = dataclasses.replace(linear("int4", attributes), kind=kind)
    value = Value(dtype="int4", shape=(2, 3))
    assert check_operation(op, [value], {role: np.full((2, 3), -7, np.int8)}).dtype == "int4"
    with pytest.raises(ProgramError, match=rf"'{role}' holds values in \[8, 8\]"):
        check_operation(op, [value], {role: np.full((2, 3), 8, np.int8)})


def test_narrow_sums_saturate() -> None:
    x = np.array([[[7, -7, 5, 0]]], np.int8)
    assert KINDS["add"].run([x, x], {}, {}, "int4").tolist() == [[[7, -7, 7, 0]]]
    assert KINDS["add"].run([x, x], {}, {}, "int5").tolist() == [[[14, -14, 10, 0]]]
