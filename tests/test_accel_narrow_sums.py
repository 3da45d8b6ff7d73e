"""Layers whose products are added in 16 bits: what does not fit there is multiplied on its own, to the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_operations import Case
from support.whole_programs import ProgramBuilder, images_of

from swincompress_pl import accel, spec
from swincompress_pl.accel.core import operation_engine

Array = npt.NDArray[Any]


def full_scale(rng: np.random.Generator, channels: int, depth: int, largest: int = 127) -> Array:
    """Weights as training leaves them, every row scaled to the largest integer."""
    weight = rng.standard_normal((channels, depth))
    return np.rint(weight / np.abs(weight).max(axis=1, keepdims=True) * largest).astype(np.int8)


def alternating(rng: np.random.Generator, channels: int, depth: int) -> Array:
    return np.where(np.arange(channels * depth).reshape(channels, depth) // 2 % 2, 127, -127).astype(np.int8)


def one_heavy_column(rng: np.random.Generator, channels: int, depth: int) -> Array:
    weight = rng.integers(-20, 21, (channels, depth))
    weight[channels // 2] = rng.choice([-127, 127], depth)
    return weight.astype(np.int8)


def heavy_after_the_first_panel(rng: np.random.Generator, channels: int, depth: int) -> Array:
    weight = rng.choice([-127, 127], (channels, depth))
    weight[:16] //= 8
    return weight.astype(np.int8)


def single_weights(rng: np.random.Generator, channels: int, depth: int) -> Array:
    return (rng.choice([-127, 0, 127], (channels, depth), p=[0.02, 0.96, 0.02])).astype(np.int8)


def seven_bits(rng: np.random.Generator, channels: int, depth: int) -> Array:
    return full_scale(rng, channels, depth, 63)


WEIGHTS = (full_scale, alternating, one_heavy_column, heavy_after_the_first_panel, single_weights, seven_bits)


def layer_case(rng: np.random.Generator, x: Array, weight: Array) -> Case:
    channels = len(weight)
    tensors = {
        "weight": weight,
        "bias": rng.integers(-1000, 1000, channels).astype(np.int32),
        "mult": np.full(channels, 2**21, dtype=np.int32),  # the result is the sum itself
        "shift": np.full(channels, 21, dtype=np.uint8),
    }
    return Case(kind="linear", dtype="int32", arrays=(x,), attributes={"channels": channels}, tensors=tensors)


def inputs(rng: np.random.Generator, dtype: str, rows: int, depth: int) -> Array:
    low, high = (-127, 127) if dtype == "int8" else (0, 255)
    x = rng.integers(low, high + 1, (1, rows, depth))
    x[0, ::3] = rng.choice([low, high], (len(x[0, ::3]), depth))  # where sums are as large as they can be
    x[0, 1::5] = high
    return x.astype(dtype)


def assert_equal_everywhere(case: Case, threads: int) -> None:
    expected = case.expected()
    for implementation in accel.implementations():
        engine = operation_engine(
            case.operation, case.inputs, case.tensors, implementation=implementation, threads=threads
        )
        np.testing.assert_array_equal(engine.run(case.arrays).reshape(expected.shape), expected, implementation)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 100),
    channels=st.integers(1, 70),
    depth=st.integers(1, 200),
    threads=st.sampled_from([1, 2]),
)
def test_any_weights_and_shapes(
    weights: Any, dtype: str, seed: int, rows: int, channels: int, depth: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    x = inputs(rng, dtype, rows, depth)
    assert_equal_everywhere(layer_case(rng, x, weights(rng, channels, depth)), threads)


@pytest.mark.parametrize("depth", [65535, 65536, 65537, 70001])
def test_as_many_inputs_as_16_bits_name_and_more(depth: int) -> None:
    rng = np.random.default_rng(depth)
    for weights in (single_weights, seven_bits):
        assert_equal_everywhere(layer_case(rng, inputs(rng, "int8", 3, depth), weights(rng, 20, depth)), 1)


@pytest.mark.parametrize("lowest", [0, -1, -5, -126, -127])
@pytest.mark.parametrize("implementation", accel.implementations())
def test_a_table_says_how_low_its_results_reach(implementation: str, lowest: int) -> None:
    # The layer behind it shifts its inputs by no more than that.
    rng = np.random.default_rng(-lowest)
    b = ProgramBuilder(-lowest, 8, 8)
    hidden = b.conv("images", 3, 48, 2, "int8")
    values = rng.integers(lowest, 128, 256).astype(np.int8)
    values[::7] = lowest
    bent = b.add("table", (hidden,), "int8", {"values": values})
    y = b.linear(bent, 48, 40)
    b.tensors[f"{y}.weight"] = full_scale(rng, 40, 48)
    mean = b.add("mean", (y,), "int8", dict(zip(("mult", "shift"), spec.multiplier(np.full(40, 1 / 4)), strict=True)))
    program = b.classifier(mean, 40, 7)
    np.testing.assert_array_equal(
        accel.Engine(program, threads=1, implementation=implementation).run_integer(images_of(program, 5)),
        spec.run(program, images_of(program, 5)),
    )
