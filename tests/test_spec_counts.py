"""Neurons that give counts: what docs/explanation/spec.md derives of them, and the two readings of a network."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.count_programs import counting_program
from support.program_cases import small_program
from support.whole_programs import images_of

from swincompress_pl import spec
from swincompress_pl.spec import ProgramError
from swincompress_pl.spec.spiking import fire
from swincompress_pl.spec.spiking_kinds import SPIKING_KINDS


def counts(x: list[int], mult: int, shift: int, largest: int) -> Any:
    """The counts of a `requantize`."""
    tensors = {"mult": np.array([mult], np.int32), "shift": np.array([shift], np.uint8)}
    numbers = [np.array(x, np.int32)[:, None]]
    return SPIKING_KINDS["requantize"].run(numbers, tensors, {"largest": largest}, "uint8")[:, 0]


@given(
    st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=20),
    st.integers(0, 2**22 - 1),
    st.integers(1, 52),
    st.integers(1, 255),
    st.booleans(),
)
def test_the_requantization_is_the_neuron(x: list[int], mult: int, shift: int, steps: int, near: bool) -> None:
    """In exact rational numbers: threshold 1, an initial potential of 1/2, one charge, soft reset."""
    if near and mult:  # currents up to about twice the most spikes
        x = [(n << shift + 1) * steps // mult >> 31 for n in x]
        x = [min(max(n, -(2**31) + 1), 2**31 - 1) for n in x]
    spikes = fire(np.array(x, np.int32)[:, None], np.array([mult]), np.array([shift], np.uint8), steps=steps)[..., 0]
    for number, charge in enumerate(x):
        membrane = Fraction(charge * mult, 2**shift) + Fraction(1, 2)
        for step in range(steps):
            fired = membrane >= 1
            assert spikes[number, step] == fired
            membrane -= fired
    assert np.array_equal(spikes.sum(axis=1), counts(x, mult, shift, steps))
    assert np.array_equal(spikes, -np.sort(-spikes.astype(np.int8), axis=1)), "spikes come first"


def test_ties_are_rounded_up_and_by_the_published_network_to_even() -> None:
    halves = list(range(-3, 12))  # of the threshold
    ours = counts(halves, 2**21, 22, 4)
    theirs = torch.tensor([n / 2 for n in halves]).clamp(0, 4).round().int().numpy()
    assert dict(zip(halves, ours.tolist(), strict=True)) | {1: 0, 5: 2} == dict(
        zip(halves, theirs.tolist(), strict=True)
    )
    assert (ours[halves.index(1)], ours[halves.index(5)]) == (1, 3)


def test_both_readings_have_the_same_counts_and_logits() -> None:
    program = counting_program()
    binary, images = spec.binary_steps(program), images_of(program, 3)
    spec.check(binary)
    assert (program.time_steps, binary.time_steps) == (None, 4)
    found = {op.output: value for op, value in spec.steps(binary, images)}
    checked = 0
    for op, value in spec.steps(program, images):
        if "largest" in op.attributes:
            spikes = found[op.output]
            assert spikes.max() <= 1
            assert np.array_equal(spikes.sum(axis=1), value)
            checked += len(np.unique(value)) > 2
    assert checked > 10
    assert np.array_equal(spec.run(binary, images), spec.run(program, images))
    assert {"integrate", "fire"} <= {op.kind for op in binary.operations}


def test_what_has_no_second_reading_is_named() -> None:
    with pytest.raises(ProgramError, match="the program has no counts of spikes, so it has only one reading"):
        spec.binary_steps(small_program())
    program = counting_program()
    layer = next(op for op in program.operations if op.kind == "conv2d" and op.inputs[0] != spec.INPUT_VALUE)
    bias = program.tensors[layer.tensors["bias"]]
    height, width = spec.check(program)[layer.output].shape[:2]
    maps = {layer.tensors["bias"]: np.broadcast_to(bias, (height, width, len(bias))).copy()}
    with_map = replace(program, tensors=dict(program.tensors) | maps)
    spec.check(with_map)
    with pytest.raises(ProgramError, match=f"conv2d '{layer.name}': its bias differs by position"):
        spec.binary_steps(with_map)
    binary = spec.binary_steps(program)
    summed = next(op for op in binary.operations if op.kind == "integrate" and "largest" in op.attributes)
    with pytest.raises(ProgramError, match=f"integrate '{summed.name}': gives counts, which has no form in binary"):
        spec.binary_steps(binary)


@pytest.mark.parametrize(
    ("largest", "dtype", "message"),
    [
        (0, "uint3", r"attribute largest is 0; it must be an integer in \[1, 7\]"),
        (8, "uint3", r"attribute largest is 8; it must be an integer in \[1, 7\]"),
        (4.0, "uint3", r"attribute largest is 4.0"),
        (4, "int8", "output is int8; attribute largest is for uint1 to uint8"),
        (4, "int32", "output is int32; attribute largest is for uint1 to uint8"),
    ],
)
def test_a_wrong_ceiling_is_named(largest: Any, dtype: str, message: str) -> None:
    program = counting_program()
    operations = [
        replace(op, dtype=dtype, attributes={**op.attributes, "largest": largest}) if "largest" in op.attributes else op
        for op in program.operations
    ]
    with pytest.raises(ProgramError, match=f"requantize '.*': {message}"):
        spec.check(replace(program, operations=tuple(operations)))
