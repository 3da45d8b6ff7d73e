"""The specification against exact rational arithmetic and against the real functions that it approximates."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swincompress_pl.spec import multiplier
from swincompress_pl.spec import operations as ops
from swincompress_pl.spec.integer import EXP_STEPS, EXP_TABLE, exponential, isqrt, reciprocal_sqrt, requantize

ACCUMULATORS = st.integers(-(2**31) + 1, 2**31 - 1)


@given(ACCUMULATORS, st.integers(2**21, 2**22 - 1), st.integers(1, 52), st.sampled_from(["int8", "uint8", "int16"]))
def test_requantize_rounds_the_exact_product_once_half_up(acc: int, mult: int, shift: int, dtype: str) -> None:
    exact = math.floor(Fraction(acc * mult, 2**shift) + Fraction(1, 2))
    low, high = {"int8": (-127, 127), "uint8": (0, 255), "int16": (-32767, 32767)}[dtype]
    result = requantize(np.array([acc]), np.array([mult], np.int32), np.array([shift], np.uint8), dtype)
    assert int(result[0]) == min(max(exact, low), high)


@given(st.floats(2.0**-31, 2.0**20, allow_nan=False))
def test_multiplier_is_within_half_a_22_bit_step(real: float) -> None:
    mult, shift = multiplier(real)
    assert 2**21 <= int(mult) < 2**22
    assert 1 <= int(shift) <= 52
    assert abs(Fraction(int(mult), 2 ** int(shift)) / Fraction(real) - 1) <= Fraction(1, 2**22)


@pytest.mark.parametrize("real", [-1.0, math.nan, math.inf, 2.0**22])
def test_multiplier_refuses_what_it_cannot_hold(real: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        multiplier(real)


def test_multiplier_of_nothing_is_zero() -> None:
    mult, shift = multiplier(np.array([0.0, 2.0**-40]))
    assert mult.tolist() == [0, 0]
    assert shift.tolist() == [1, 1]


@given(st.integers(0, 2**62 - 1))
def test_isqrt_is_exact(n: int) -> None:
    assert int(isqrt(np.array([n]))[0]) == math.isqrt(n)


@given(st.integers(0, 2**31 - 1))
def test_isqrt_is_exact_around_squares(root: int) -> None:
    around = [n for n in (root * root - 1, root * root, root * root + 1) if 0 <= n < 2**62]
    assert isqrt(np.array(around)).tolist() == [math.isqrt(n) for n in around]


@given(st.integers(1, 2**62 - 1))
def test_reciprocal_sqrt_is_close_over_the_whole_range(variance: int) -> None:
    r, t = reciprocal_sqrt(np.array([variance]))
    assert 2**23 <= int(r[0]) < 2**24
    square = Fraction(int(r[0])) ** 2 * Fraction(4) ** (int(t[0]) - 54) * variance  # should be 1
    assert abs(square - 1) < Fraction(1, 2**21)  # twice the relative error of the root, 2**-22


@given(st.integers(0, 2**31 - 1), st.integers(2**21, 2**22 - 1), st.integers(1, 52))
def test_exponential_is_one_rounding_of_its_table(distance: int, mult: int, shift: int) -> None:
    steps = math.floor(Fraction(distance * mult, 2**shift) + Fraction(1, 2))
    exact = Fraction(int(EXP_TABLE[steps % EXP_STEPS]), 2 ** (8 + min(steps // EXP_STEPS, 60)))
    result = exponential(np.array([distance]), np.array([mult]), np.array([shift], np.uint8))
    assert int(result[0]) == math.floor(exact + Fraction(1, 2))


def test_exponential_is_close_to_exp_and_starts_at_255() -> None:
    unit = 0.001
    mult, shift = multiplier(unit * math.log2(math.e) * EXP_STEPS)
    distance = np.arange(0, 9000)
    error = exponential(distance, mult, shift) - 255 * np.exp(-distance * unit)
    assert np.abs(error).max() < 255 * 0.5 * math.log(2) / EXP_STEPS + 0.51  # half a step of the exponent, one rounding
    assert exponential(np.array([0]), mult, shift)[0] == 255


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 8, 96, 768, 4096]), st.integers(1, 15))
def test_layer_norm_is_within_a_step_of_the_real_one(seed: int, channels: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-(2**bits) + 1, 2**bits, (4, channels)).astype(np.int16)
    gain, offset, shift = rng.uniform(-30, 30, channels), rng.uniform(-60, 60, channels), 16 + 17
    gain_q, offset_q = np.rint(gain * 2.0**17).astype(np.int32), np.rint(offset * 2.0**shift).astype(np.int64)
    result = ops.layer_norm(x, gain_q, offset_q, epsilon=channels**2, shift=shift, dtype="int8")
    centred = x - x.mean(axis=-1, keepdims=True)
    real = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1) * gain + offset
    assert np.abs(result - np.clip(real, -127, 127)).max() <= 0.51


@pytest.mark.parametrize("value", [-32767, 0, 32767])
def test_layer_norm_of_a_constant_row_is_its_offset(value: int) -> None:
    x = np.full((1, 8), value, np.int16)
    offset = (np.arange(8) << 33).astype(np.int64)
    result = ops.layer_norm(x, np.full(8, 2**21, np.int32), offset, epsilon=0, shift=33, dtype="int8")
    assert result.tolist() == [list(range(8))]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 49, 197]))
def test_attention_is_close_to_the_real_one(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    heads, dim, unit = 2, 8, 0.001
    qkv = rng.integers(-60, 61, (1, length, heads * 3 * dim)).astype(np.int8)
    exp_mult, exp_shift = multiplier(np.full(heads, unit * math.log2(math.e) * EXP_STEPS))
    out_mult, out_shift = multiplier(np.full(heads, 1.0))
    result = ops.attention(
        qkv, exp_mult, exp_shift, out_mult, out_shift, windows=1, heads=heads, qk_dim=dim, v_dim=dim, dtype="int8"
    )
    q, k, v = (
        part.reshape(length, heads, dim).transpose(1, 0, 2).astype(float) for part in np.split(qkv[0], 3, axis=-1)
    )
    logits = q @ k.transpose(0, 2, 1) * unit
    e = 255 * np.exp(logits - logits.max(-1, keepdims=True))
    real = e / e.sum(-1, keepdims=True) @ v
    # an exponential is off by half a step of its exponent and one rounding; the mean moves by that, weighed by how far
    # the values lie from it
    off = e * 0.5 * math.log(2) / EXP_STEPS * 1.02 + 0.51
    moved = np.einsum("hqk,hqkd->hqd", off, np.abs(v[:, None] - real[:, :, None]))
    bound = moved / (e - off).sum(-1, keepdims=True) + 0.51
    given_back = result[0].reshape(length, heads, dim).transpose(1, 0, 2)
    assert (np.abs(given_back - real) <= bound).all()


def test_attention_gives_other_regions_no_weight() -> None:
    rng = np.random.default_rng(0)
    qkv = rng.integers(-127, 128, (1, 8, 12)).astype(np.int8)
    region = np.array([[0, 0, 1, 1], [2, 0, 2, 0]], np.uint8)
    sizes = {"windows": 2, "heads": 1, "qk_dim": 4, "v_dim": 4, "dtype": "int8"}
    scale = (
        np.array([2**21], np.int32),
        np.array([30], np.uint8),
        np.array([2**21], np.int32),
        np.array([21], np.uint8),
    )
    result = ops.attention(qkv, *scale, region=region, **sizes)
    for tokens in ([0, 1], [2, 3], [4, 6], [5, 7]):
        alone = ops.attention(qkv[:, tokens], *scale, **{**sizes, "windows": 1})
        assert np.array_equal(result[:, tokens], alone)


def test_gather_joins_rows_and_pads_with_zeros() -> None:
    x = np.arange(1, 7, dtype=np.int8).reshape(1, 3, 2)
    result = ops.gather(x, np.array([[2, -1], [0, 0]], np.int32))
    assert result.tolist() == [[[5, 6, 0, 0], [1, 2, 1, 2]]]


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_conv2d_is_the_linear_map_of_a_direct_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, channels, m = (int(v) for v in rng.integers(3, 8, 4))
    stride, padding = (
        (int(rng.integers(1, 3)), int(rng.integers(1, 3))),
        (int(rng.integers(0, 2)), int(rng.integers(0, 2))),
    )
    x = rng.integers(0, 256, (1, height, width, channels)).astype(np.uint8)
    weight = rng.integers(-127, 128, (m, 2, 3, channels)).astype(np.int8)
    one = (np.full(m, 2**21, np.int32), np.full(m, 21, np.uint8))
    result = ops.conv2d(x, weight, np.zeros(m, np.int32), *one, stride=stride, padding=padding, dtype="int32")
    padded = np.pad(x[0].astype(np.int64), ((padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    for i in range(result.shape[1]):
        for j in range(result.shape[2]):
            field = padded[i * stride[0] : i * stride[0] + 2, j * stride[1] : j * stride[1] + 3]
            assert result[0, i, j].tolist() == [int((field * w).sum()) for w in weight.astype(np.int64)]
