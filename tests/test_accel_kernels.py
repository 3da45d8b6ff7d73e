"""Every kernel of every implementation equals the specification, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from support.random_operations import Case, attention_case, random_cases

from swincompress_pl import accel, spec
from swincompress_pl.accel.core import operation_engine

IMPLEMENTATIONS = accel.implementations()


def assert_equals_norm(case: Case, threads: int = 1) -> None:
    expected = case.expected()
    for implementation in IMPLEMENTATIONS:
        engine = operation_engine(
            case.operation, case.inputs, case.tensors, implementation=implementation, threads=threads
        )
        given = engine.run(case.arrays)
        assert given.dtype == expected.dtype
        wrong = np.count_nonzero(given.reshape(expected.shape) != expected)
        assert wrong == 0, f"{implementation}, {threads} threads: {wrong} of {expected.size} values differ: {case}"


@pytest.mark.parametrize("seed", range(4))
def test_random_cases_equal_norm(seed: int) -> None:
    for case in random_cases(seed, 500):
        assert_equals_norm(case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_40000_random_cases_equal_norm(seed: int) -> None:
    for case in random_cases(seed, 1000):
        assert_equals_norm(case)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_nothing(threads: int) -> None:
    for case in random_cases(threads, 100):
        assert_equals_norm(case, threads)


@pytest.mark.parametrize("threads", [2, 3, 7, 16])
def test_threads_share_a_head_or_have_nothing_to_do(threads: int) -> None:
    rng = np.random.default_rng(threads)
    for _ in range(100):
        assert_equals_norm(attention_case(rng), threads)


def product_case(x: int, weight: int, depth: int, x_dtype: str, mult: int, shift: int, bias: int = 0) -> Case:
    channels, rows = 50, 37  # two tiles of 16 rows, and one that begins inside them
    return Case(
        kind="linear",
        dtype="int32",
        arrays=(np.full((1, rows, depth), x, dtype=x_dtype),),
        attributes={"channels": channels},
        tensors={
            "weight": np.full((channels, depth), weight, dtype=np.int8),
            "bias": np.full(channels, bias, dtype=np.int32),
            "mult": np.full(channels, mult, dtype=np.int32),
            "shift": np.full(channels, shift, dtype=np.uint8),
        },
    )


@pytest.mark.parametrize("weight", [-127, 127])
@pytest.mark.parametrize("x", [-127, 127, 255])
@pytest.mark.parametrize("depth", [1, 4, 7, 64, 66000])
def test_corner_products(x: int, weight: int, depth: int) -> None:
    dtype = "uint8" if x == 255 else "int8"
    largest = 2**22 - 1
    for mult, shift in [(largest, 22), (2**21, 21), (largest, 1), (largest, 52), (0, 1), (0, 33), (0, 52), (1, 1)]:
        assert_equals_norm(product_case(x, weight, depth, dtype, mult, shift))


@pytest.mark.parametrize("shift", range(1, 53))
def test_every_shift_rounds_half_up(shift: int) -> None:
    # accumulators around multiples of half a step of the result, both signs, and the ends of int32
    near = np.arange(-40, 40)
    half = 2 ** max(shift - 22, 0)
    accumulators = np.concatenate([near, near * half, near * half + 1, near * half - 1, [2**31 - 1, -(2**31) + 1]])
    accumulators = np.clip(accumulators, -(2**31) + 1, 2**31 - 1)
    channels = len(accumulators)
    for mult in (2**21, 2**22 - 1, 3 * 2**20):
        for dtype in ("int8", "uint8", "int16", "int32"):
            case = Case(
                kind="linear",
                dtype=dtype,
                arrays=(np.zeros((1, 3, 1), dtype=np.int8),),
                attributes={"channels": channels},
                tensors={
                    "weight": np.zeros((channels, 1), dtype=np.int8),
                    "bias": accumulators.astype(np.int32),
                    "mult": np.full(channels, mult, dtype=np.int32),
                    "shift": np.full(channels, shift, dtype=np.uint8),
                },
            )
            assert_equals_norm(case)


def test_exponential_over_its_whole_range() -> None:
    # two tokens, one window: logit differences from 0 to the bound, through the bias table
    distances = np.unique(np.concatenate([np.arange(700), np.geomspace(1, 2**30 - 2**15, 500).astype(np.int64)]))
    for mult, shift in [(2**21, 21), (2**22 - 1, 30), (2**21, 24), (2**21, 43), (2**21, 1), (0, 1), (5, 3)]:
        length = len(distances)
        case = Case(
            kind="attention",
            dtype="int8",
            arrays=(np.full((1, length, 3), 1, dtype=np.int8) * np.array([1, 1, 127], dtype=np.int8),),
            attributes={"windows": 1, "heads": 1, "qk_dim": 1, "v_dim": 1, "biases": length},
            tensors={
                "exp_mult": np.array([mult], dtype=np.int32),
                "exp_shift": np.array([shift], dtype=np.uint8),
                "out_mult": np.array([2**21], dtype=np.int32),
                "out_shift": np.array([21], dtype=np.uint8),
                "bias_table": -distances[None].astype(np.int32),
                "bias_index": (np.add.outer(np.arange(length), np.arange(length)) % length).astype(np.int32),
            },
        )
        case.arrays[0][0, ::3, 2] = -77  # a weighted mean that every exponential moves
        assert_equals_norm(case)


def test_reciprocal_root_over_its_whole_range() -> None:
    # epsilon alone sets the variance of a constant row; with it every power of two and its neighbours
    x = np.zeros((1, 2, 4), dtype=np.int16)
    x[0, 1] = [32767, -32767, 1, 0]
    for bit in range(59):
        for epsilon in {max(2**bit + off, 0) for off in (-1, 0, 1)}:
            if epsilon > 2**58:
                continue
            case = Case(
                kind="layer_norm",
                dtype="int16",
                arrays=(x,),
                attributes={"epsilon": epsilon, "shift": 8},
                tensors={"gain": np.array([1, 2, -3, 4], dtype=np.int32), "offset": np.zeros(4, dtype=np.int64)},
            )
            assert_equals_norm(case)


@pytest.mark.parametrize("shift", range(1, 53))
def test_layer_norm_at_the_limits_of_gain_and_offset(shift: int) -> None:
    channels = 21
    sign = np.where(np.arange(channels) % 3 == 0, -1, 1)
    for dtype in ("int8", "int16"):
        for limit in (2**60, 2 ** max(shift - 1, 1), 2 ** min(shift + 14, 60)):
            case = Case(
                kind="layer_norm",
                dtype=dtype,
                arrays=(np.random.default_rng(shift).integers(-32767, 32768, (1, 3, channels)).astype(np.int16),),
                attributes={"epsilon": 0, "shift": shift},
                tensors={
                    "gain": ((2**22 - 1) * np.roll(sign, 1)).astype(np.int32),
                    "offset": (limit * sign).astype(np.int64),
                },
            )
            assert_equals_norm(case)


def test_extension_refuses_what_contradicts_itself() -> None:
    case = next(c for c in random_cases(0, 1) if c.kind == "linear")
    with pytest.raises(spec.ProgramError, match="accumulator"):
        operation_engine(
            case.operation,
            [spec.Value(dtype="uint8", shape=(70000,))],
            {**case.tensors, "weight": np.full((case.attributes["channels"], 70000), 127, dtype=np.int8)},
        )
