"""The two readings of counts of spikes, in one step and in binary time steps, give the same integers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counting_programs import SIZE, counting_program
from support.spiking_programs import grouped_conv_case, pictures, requantize_case, spike_linear_case, spiking_program

from swincompress_pl.quant.twin import TorchTwin, run_operation
from swincompress_pl.spec import Operation, Program, ProgramError, Value, binary_steps, check, run, steps
from swincompress_pl.spec import spiking as ops
from swincompress_pl.spec.integer import SHIFT_MAX, requantize
from swincompress_pl.spec.kinds import KINDS, check_operation

Array = npt.NDArray[Any]
INT32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-100, 100), st.sampled_from([-(2**31), 0, 2**31 - 1]))
MULT = st.one_of(st.integers(0, 2**22 - 1), st.sampled_from([0, 1, 2**21, 2**22 - 1]))
SHIFT = st.one_of(st.integers(1, SHIFT_MAX), st.sampled_from([1, 21, SHIFT_MAX]))


def images(count: int, seed: int = 7) -> npt.NDArray[np.uint8]:
    return pictures(np.random.default_rng(seed), count, (SIZE, SIZE, 3))


def twin_of(op: Operation, inputs: list[Array], tensors: dict[str, Array]) -> Array:
    moved = {role: torch.from_numpy(np.array(tensor)) for role, tensor in tensors.items()}
    found: Array = run_operation(op, [torch.from_numpy(np.array(x)) for x in inputs], moved).numpy()
    return found


# The operations


@given(st.lists(INT32, min_size=1, max_size=8), MULT, SHIFT, st.integers(1, 40))
@settings(max_examples=150)
def test_spikes_that_fire_are_the_counts_in_unary(x: list[int], mult: int, shift: int, most: int) -> None:
    """They sum up to the clamped requantization, the first steps first."""
    charges = np.array([x], np.int32)
    tensors = {"mult": np.full(len(x), mult, np.int32), "shift": np.full(len(x), shift, np.uint8)}
    spikes = ops.fire(charges, **tensors, steps=most)
    assert spikes.shape == (1, most, len(x))
    assert set(np.unique(spikes)) <= {0, 1}
    assert (spikes[:, :-1] >= spikes[:, 1:]).all()
    expected = np.clip(requantize(charges, **tensors, dtype="int32"), 0, most)
    assert np.array_equal(spikes.sum(1), expected)
    assert expected.tolist() == [[min(max((v * mult + 2 ** (shift - 1)) >> shift, 0), most) for v in x]]
    op = Operation(kind="fire", name="n", inputs=("x",), output="y", dtype="uint1", attributes={"steps": most})
    assert np.array_equal(twin_of(op, [charges], tensors), spikes)


@given(st.lists(st.integers(-900, 900), min_size=1, max_size=8), st.integers(2**21, 2**22 - 1), st.integers(21, 31))
@settings(max_examples=50)
def test_they_are_the_spikes_of_integrate_and_fire_neurons(x: list[int], mult: int, shift: int) -> None:
    """Of threshold 1, in rational numbers: an initial potential of 1/2, one charge, soft reset."""
    most = 6
    spikes = ops.fire(np.array([x], np.int32), np.full(len(x), mult), np.full(len(x), shift, np.uint8), steps=most)
    for number, charge in enumerate(x):
        membrane = Fraction(1, 2) + Fraction(charge * mult, 2**shift)
        for step in range(most):
            fired = membrane >= 1
            assert spikes[0, step, number] == fired
            membrane -= fired


def test_halves_are_rounded_up_and_by_the_published_network_to_even() -> None:
    """docs/explanation/spec.md names the difference: 0.5 and 2.5, not 1.5 and 3.5."""
    halves = np.arange(-3, 12, dtype=np.int32)[None]
    tensors = {"mult": np.full(15, 2**21, np.int32), "shift": np.full(15, 22, np.uint8)}
    ours = KINDS["requantize"].run([halves], tensors, {"largest": 4}, "uint3")[0]
    theirs = torch.from_numpy(halves[0] / 2).clamp(0, 4).round().numpy()
    assert {n / 2: (a, b) for n, a, b in zip(halves[0], ours, theirs, strict=True) if a != b} == {
        0.5: (1, 0),
        2.5: (3, 2),
    }
    assert np.array_equal(ops.fire(halves, **tensors, steps=4).sum(1)[0], ours)


@given(st.integers(1, 255), st.sampled_from(["uint1", "uint8", "int32"]), INT32, MULT, SHIFT, st.booleans())
@settings(max_examples=100)
def test_integration_is_exact(most: int, source: str, bias: int, mult: int, shift: int, corners: bool) -> None:
    rng = np.random.default_rng(most)
    low, high = {"uint1": (0, 1), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}[source]
    x = np.full((1, most, 2, 3), high) if corners else rng.integers(low, high, (1, most, 2, 3), endpoint=True)
    x = x.astype(np.int32 if source == "int32" else np.uint8)
    tensors = {
        "bias": np.full(3, bias, np.int32),
        "mult": np.full(3, mult, np.int32),
        "shift": np.full(3, shift, np.uint8),
    }
    sums = [[sum(int(v) for v in x[0, :, row, channel]) for channel in range(3)] for row in range(2)]
    wanted = [[min(max(((s + bias) * mult + 2 ** (shift - 1)) >> shift, 0), 200) for s in row] for row in sums]
    attributes = {"steps": most, "largest": 200}
    op = Operation(kind="integrate", name="n", inputs=("x",), output="y", dtype="uint8", attributes=attributes)
    value = check_operation(op, [Value(dtype=source, shape=(most, 2, 3))], tensors)
    assert (value.shape, value.dtype, value.reach) == ((2, 3), "uint8", 200)
    found = KINDS["integrate"].run([x], tensors, attributes, "uint8")
    assert found[0].tolist() == wanted
    assert np.array_equal(twin_of(op, [x], tensors), found)


@given(st.integers(0, 2**32 - 1), st.sampled_from([grouped_conv_case, requantize_case, spike_linear_case]), st.data())
@settings(max_examples=60)
def test_results_saturate_at_the_largest_count(seed: int, make: Any, data: st.DataObject) -> None:
    case = replace(make(np.random.default_rng(seed)), dtype=data.draw(st.sampled_from(["uint2", "uint5", "uint8"])))
    largest = data.draw(st.integers(1, {"uint2": 3, "uint5": 31, "uint8": 255}[case.dtype]))
    case = replace(case, attributes={key: value for key, value in case.attributes.items() if key != "largest"})
    bounded = replace(case, attributes=case.attributes | {"largest": largest})
    assert check_operation(bounded.operation, bounded.values, bounded.tensors).reach == largest
    expected = np.minimum(case.expected(), largest)
    assert np.array_equal(bounded.expected(), expected)
    assert np.array_equal(twin_of(bounded.operation, list(case.arrays), case.tensors).reshape(expected.shape), expected)


# Programs


@given(st.integers(0, 2**32 - 1), st.integers(1, 16))
@settings(max_examples=25)
def test_binary_steps_give_the_same_integers(seed: int, most: int) -> None:
    """Every value, not the logits alone."""
    program, pixels = counting_program(seed, most), images(3)
    binary = binary_steps(program)
    types, counts = check(program), check(binary)
    assert (program.time_steps, binary.time_steps) == (None, most)
    found = {op.output: value for op, value in steps(binary, pixels)}
    spiking = 0
    for op, expected in steps(program, pixels):
        value = found[op.output]
        if "largest" in op.attributes:
            assert counts[op.output].dtype == "uint1"
            assert value.shape[1] == most
            assert (value[:, :-1] >= value[:, 1:]).all()
            value, spiking = value.sum(1), spiking + 1
        else:
            assert types[op.output] == counts[op.output], op.name
        assert np.array_equal(value, expected), op.name
    assert spiking == sum(op.kind == "fire" for op in binary.operations) > 10
    assert {op.attributes["steps"] for op in binary.operations if op.kind in ("integrate", "fire")} == {most}
    twin = torch.device("cpu")
    for reading in (program, binary):
        assert np.array_equal(TorchTwin(reading, twin)(torch.from_numpy(pixels)).numpy(), run(program, pixels))


def test_every_count_occurs() -> None:
    """Or the tests of random programs would see nothing."""
    seen = [value for op, value in steps(counting_program(0, 4), images(8)) if "largest" in op.attributes]
    assert all(len(np.unique(value)) > 2 for value in seen)
    assert sum(set(np.unique(value)) == {0, 1, 2, 3, 4} for value in seen) > len(seen) / 2
    assert len(np.unique(run(counting_program(0, 4), images(8)))) > 12


def test_layers_read_spikes_and_only_what_reads_numbers_reads_counts() -> None:
    binary = binary_steps(counting_program(1, 3))
    types = check(binary)
    readers = [op for op in binary.operations if any(types.get(x) and types[x].dtype == "uint1" for x in op.inputs)]
    assert {op.kind for op in readers} == {"linear", "conv2d", "integrate"}
    assert {op.kind for op in binary.operations if "largest" in op.attributes} == {"integrate"}
    assert all(types[op.output].shape[0] == 3 for op in readers if op.kind != "integrate")
    assert all(not binary.tensors[op.tensors["bias"]].any() for op in readers if op.kind != "integrate")
    sums = [op.output for op in binary.operations if op.output.endswith(".counts")]
    assert len(sums) == len(set(sums)) > 3, "the counts of a value are summed up once, whoever reads them"


def test_both_readings_survive_their_description() -> None:
    program, pixels = counting_program(2, 5), images(2)
    for reading in (program, binary_steps(program)):
        again = Program.from_description(reading.describe(), reading.tensors)
        assert again.operations == reading.operations
        assert np.array_equal(run(again, pixels), run(program, pixels))


def test_weights_are_shared_with_the_other_reading() -> None:
    program = counting_program(2, 5)
    binary = binary_steps(program)
    for op in program.operations:
        if "weight" in op.tensors:
            assert binary.tensors[op.tensors["weight"]] is program.tensors[op.tensors["weight"]]


def test_operations_may_have_one_name() -> None:
    """It is for messages alone; values are what a Program has once."""
    program, pixels = counting_program(), images(2)
    same = replace(program, operations=tuple(replace(op, name="same") for op in program.operations))
    check(binary_steps(same))
    assert np.array_equal(run(binary_steps(same), pixels), run(program, pixels))


# What is refused


def test_a_program_without_counts_has_one_reading() -> None:
    with pytest.raises(ProgramError, match=r"has no counts of spikes, so it has only one reading; .* E-SpikeFormer"):
        binary_steps(spiking_program())


def test_a_broken_program_is_refused_as_by_check() -> None:
    program = counting_program()
    with pytest.raises(ProgramError, match="reads 'conv2d0', which no earlier operation writes"):
        binary_steps(replace(program, operations=program.operations[1:]))
    missing = {key: tensor for key, tensor in program.tensors.items() if key != "conv2d0.weight"}
    with pytest.raises(ProgramError, match=r"tensor 'conv2d0.weight' is not in the program"):
        binary_steps(replace(program, tensors=missing))


def test_a_bias_that_differs_by_position_has_no_binary_steps() -> None:
    program = counting_program(3)
    conv = next(op for op in program.operations if op.kind == "conv2d" and "groups" in op.attributes)
    shape = check(program)[conv.output].shape
    tensors = {**program.tensors, conv.tensors["bias"]: np.ones(shape, np.int32)}
    mapped = replace(program, tensors=tensors)
    check(mapped)
    with pytest.raises(
        ProgramError, match=rf"conv2d '{conv.name}': its bias differs by position; binary steps add one"
    ):
        binary_steps(mapped)


def test_counts_of_another_operation_have_no_binary_steps() -> None:
    program = counting_program(3)
    unscaled = {"bias": np.zeros(6, np.int32), "mult": np.ones(6, np.int32), "shift": np.ones(6, np.uint8)}
    counts = next(op for op in program.operations if op.kind == "requantize")
    again = Operation(
        kind="integrate", name="more", inputs=(counts.output,), output="more", dtype="uint8",
        attributes={"steps": SIZE, "largest": 9}, tensors={role: f"more.{role}" for role in unscaled},
    )  # fmt: skip
    place = program.operations.index(counts) + 1
    operations = (*program.operations[:place], again, *program.operations[place:])
    more = {f"more.{role}": tensor for role, tensor in unscaled.items()}
    with pytest.raises(ProgramError, match="integrate 'more': gives counts, which has no form in binary steps"):
        binary_steps(replace(program, operations=operations, tensors={**program.tensors, **more}))


def _op(kind: str, dtype: str, **attributes: Any) -> Operation:
    roles = {"integrate": ("bias", "mult", "shift"), "fire": ("mult", "shift"), "requantize": ("mult", "shift")}[kind]
    return Operation(
        kind=kind, name="case", inputs=("x",), output="y", dtype=dtype, attributes=attributes,
        tensors={role: role for role in roles},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("op", "source", "message"),
    [
        (_op("requantize", "int8", largest=4), "int32", "output is int8; attribute largest is for uint1 to uint8"),
        (_op("requantize", "int32", largest=4), "int32", "output is int32; attribute largest is for uint1 to uint8"),
        (_op("requantize", "uint3", largest=8), "int32", r"attribute largest is 8; it must be an integer in \[1, 7\]"),
        (
            _op("requantize", "uint8", largest=0),
            "int32",
            r"attribute largest is 0; it must be an integer in \[1, 255\]",
        ),
        (_op("requantize", "uint8", largest=True), "int32", "attribute largest is True; it must be an integer"),
        (_op("integrate", "int16", steps=3, largest=4), "uint1", "output is int16; attribute largest is for"),
        (_op("integrate", "int32", steps=0), "uint1", r"attribute steps is 0; it must be an integer in \[1, 255\]"),
        (_op("integrate", "int32", steps=256), "uint1", r"attribute steps is 256; it must be an integer in \[1, 255\]"),
        (_op("integrate", "int32"), "uint1", "attribute steps is missing"),
        (
            _op("integrate", "int32", steps=4),
            "uint1",
            r"input has shape \(3, 5, 6\); its first axis must be 4 time steps",
        ),
        (_op("integrate", "int32", steps=3), "int8", "input 0 is int8; it must be uint1 to uint8 or int32"),
        (_op("integrate", "uint1", steps=3, threshold=1), "uint1", "unknown attribute 'threshold'"),
        (_op("fire", "uint1", steps=0), "int32", r"attribute steps is 0; it must be an integer in \[1, 255\]"),
        (_op("fire", "uint1", steps=256), "int32", r"attribute steps is 256; it must be an integer in \[1, 255\]"),
        (_op("fire", "uint8", steps=4), "int32", "output is uint8; it must be uint1"),
        (_op("fire", "uint1", steps=4), "uint8", "input 0 is uint8; it must be"),
        (_op("fire", "uint1", steps=4, largest=4), "int32", "unknown attribute 'largest'"),
    ],
)
def test_what_contradicts_itself_is_refused(op: Operation, source: str, message: str) -> None:
    tensors = {"bias": np.zeros(6, np.int32), "mult": np.ones(6, np.int32), "shift": np.ones(6, np.uint8)}
    with pytest.raises(ProgramError, match=f"{op.kind} 'case': {message}"):
        check_operation(op, [Value(dtype=source, shape=(3, 5, 6))], {role: tensors[role] for role in op.tensors})


def test_a_step_without_rows_is_none() -> None:
    op = _op("integrate", "int32", steps=6)
    tensors = {"bias": np.zeros(6, np.int32), "mult": np.ones(6, np.int32), "shift": np.ones(6, np.uint8)}
    with pytest.raises(ProgramError, match=r"input has shape \(6,\); its first axis must be 6 time steps"):
        check_operation(op, [Value(dtype="uint1", shape=(6,))], tensors)
