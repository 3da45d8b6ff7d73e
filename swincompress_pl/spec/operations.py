"""Every operation of the specification in plain NumPy; the torch twin and the C++ kernels equal these to the bit.

The batch is the first axis: a value of shape `(rows..., channels)` per image comes as `(N, rows..., channels)`.
Operations that work on tokens see `(N, rows, channels)`. The narrower signed (unsigned) types come as arrays of int8
(uint8), and `dtype` may name one of them: results saturate to its range. `spec.md` derives the rules, and `kinds.py`
proves shapes and bounds.
"""

from __future__ import annotations

import numpy as np

from swincompress_pl.spec.integer import (
    ACCUMULATOR_BOUND,
    NORMALIZED_FRACTION_BITS,
    RECIPROCAL_BITS,
    SOFTMAX_BITS,
    IntArray,
    exponential,
    fine_exponential,
    integer_matmul,
    reciprocal_sqrt,
    requantize,
    saturate,
    shift_right_rounded,
)


def linear(x: IntArray, weight: IntArray, bias: IntArray, mult: IntArray, shift: IntArray, *, dtype: str) -> IntArray:
    """Computes y = requantize(x @ weight.T + bias).

    x: (..., K) int8 or uint8; weight: (M, K) int8; bias: (M,) int32; mult, shift: (M,) -> (..., M) of `dtype`.
    """
    return requantize(integer_matmul(x, weight.T) + bias, mult, shift, dtype)


def patches(x: IntArray, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> IntArray:
    """The receptive fields of a convolution: (N, H, W, C) -> (N, Ho, Wo, kh * kw, C), zeros outside the image."""
    padded = np.pad(x, ((0, 0), (padding[0], padding[0]), (padding[1], padding[1]), (0, 0)))
    fields = sliding(padded, kernel, stride)
    return fields.reshape(*fields.shape[:3], -1, x.shape[-1])


def sliding(x: IntArray, kernel: tuple[int, int], stride: tuple[int, int]) -> IntArray:
    """The windows of an image: (N, H, W, C) -> (N, Ho, Wo, kh, kw, C)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))[:, :: stride[0], :: stride[1]]
    return windows.transpose(0, 1, 2, 4, 5, 3)


def conv2d(
    x: IntArray,
    weight: IntArray,
    bias: IntArray,
    mult: IntArray,
    shift: IntArray,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int = 1,
    dtype: str,
) -> IntArray:
    """A convolution as a linear map of its receptive fields.

    x: (N, H, W, C), or (N, T, H, W, C) with time steps, int8 or uint8; weight: (M, kh, kw, C / groups) int8; bias:
    (M,), or a map (Ho, Wo, M), int32 -> (N, Ho, Wo, M) or (N, T, Ho, Wo, M). The map carries what differs by position:
    the border of an image that is padded with zeros after its normalization was folded into the weights. Each of
    `groups` equal runs of output channels reads one run of input channels.
    """
    outputs = weight.shape[0]
    fields = patches(x.reshape(-1, *x.shape[-3:]), (weight.shape[1], weight.shape[2]), stride, padding)
    grouped = fields.reshape(*fields.shape[:-1], groups, -1)
    columns = np.moveaxis(grouped, -2, 0).reshape(groups, *fields.shape[:3], -1)  # (groups, N, Ho, Wo, kh * kw * C)
    rows = weight.reshape(groups, outputs // groups, -1)
    sums = np.stack([integer_matmul(columns[group], rows[group].T) for group in range(groups)], axis=-2)
    sums = sums.reshape(*fields.shape[:3], outputs)
    return requantize(sums + bias, mult, shift, dtype).reshape(*x.shape[:-3], *sums.shape[1:])


def layer_norm(x: IntArray, gain: IntArray, offset: IntArray, *, epsilon: int, shift: int, dtype: str) -> IntArray:
    """Computes y_c = ((C x_c - S) / sqrt(C sum x^2 - S^2 + epsilon)) * gain_c + offset_c, rounded once.

    x: (..., C) int8 or int16, C <= 4096; gain: (C,) int32, |gain| < 2**22; offset: (C,) int64, |offset| <= 2**60.
    Widths: |C x - S| < 2**28, the reciprocal root has 24 bits, and their product is below 2**52. The normalized value
    has 16 fractional bits and at most 23 bits in all (|.| <= sqrt(C)); times the gain it is below 2**45.
    """
    wide = x.astype(np.int64)
    channels = np.int64(x.shape[-1])
    total = wide.sum(axis=-1, keepdims=True)
    variance = channels * (wide * wide).sum(axis=-1, keepdims=True) - total * total + np.int64(epsilon)
    r, t = reciprocal_sqrt(np.maximum(variance, 1))
    normalized = ((channels * wide - total) * r) >> (54 - NORMALIZED_FRACTION_BITS - t)
    return saturate(shift_right_rounded(normalized * gain.astype(np.int64) + offset, shift), dtype)


def softmax(x: IntArray, *, mult: int, shift: int) -> IntArray:
    """Computes y_c = round(255 exp(x_c) / sum exp(x)) over the last axis, with exponentials of 16 bits.

    x: (..., C) of at most 32 bits, C <= 2**16 -> (..., C) uint8 probabilities in units of 1/255. (mult, shift) turn
    differences of x into 32nds of an octave. e = fine_exponential(row maximum - x), which is 65280 at the maximum;
    y = e * floor(255 * 2**40 / sum e), shifted and rounded once. Widths: a difference is below 2**32, times mult below
    2**54; 65280 <= sum e < 2**32; e <= sum e, so e * reciprocal <= 255 * 2**40 and y <= 255 without saturation.
    """
    wide = x.astype(np.int64)
    e = fine_exponential(wide.max(axis=-1, keepdims=True) - wide, mult, shift).astype(np.int64)
    reciprocal = np.int64(255 << SOFTMAX_BITS) // e.sum(axis=-1, keepdims=True)
    return shift_right_rounded(e * reciprocal, SOFTMAX_BITS).astype(np.uint8)


def table(x: IntArray, values: IntArray) -> IntArray:
    """Computes y = values[x], any function of an int8 input; `values` (256,) has entry i for the byte i."""
    return values[x.view(np.uint8)]


def add(a: IntArray, b: IntArray, *, dtype: str) -> IntArray:
    """The saturating sum of two values in the same unit; a constant b has no batch axis."""
    return saturate(a.astype(np.int64) + b, dtype)


def add_values(a: IntArray, b: IntArray, *, dtype: str) -> IntArray:
    """`add` of a (N, rows..., C) and b, whose rows repeat if they are fewer: the same value at every time step."""
    return add(a.reshape(b.shape[0], -1, *b.shape[1:]), b[:, None], dtype=dtype).reshape(a.shape)


def prepend(x: IntArray, rows: IntArray) -> IntArray:
    """Puts constant tokens before the others: x (N, L, C), rows (R, C) -> (N, R + L, C)."""
    return np.concatenate([np.broadcast_to(rows, (x.shape[0], *rows.shape)), x], axis=1)


def gather(x: IntArray, index: IntArray) -> IntArray:
    """Moves, repeats, drops or joins rows: out[m] = concat(x[index[m, 0]], x[index[m, 1]], ...).

    x: (N, L, C); index: (M, G) int32 in [-1, L) -> (N, M, G * C). Index -1 gives zeros. Windows, shifts, padding, patch
    merging and the choice of the class token are all of this form.
    """
    padded = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)  # row -1 is the zero row
    picked = padded[:, index]
    return picked.reshape(x.shape[0], index.shape[0], -1)


def mean(x: IntArray, mult: IntArray, shift: IntArray, *, dtype: str) -> IntArray:
    """The sum over tokens, requantized once: x (N, L, C) -> (N, C); 1/L is part of the multiplier."""
    return requantize(x.astype(np.int64).sum(axis=1), mult, shift, dtype)


def attention(
    qkv: IntArray,
    exp_mult: IntArray,
    exp_shift: IntArray,
    out_mult: IntArray,
    out_shift: IntArray,
    bias_table: IntArray | None = None,
    bias_index: IntArray | None = None,
    region: IntArray | None = None,
    *,
    windows: int,
    heads: int,
    qk_dim: int,
    v_dim: int,
    dtype: str,
) -> IntArray:
    """Computes softmax(q k^T + bias) v inside each window, normalized after the product.

    qkv: (N, windows * L, heads * (2 * qk_dim + v_dim)) int8, channels ordered q | k | v, then head, then dimension ->
    (N, windows * L, heads * v_dim). exp_mult, exp_shift, out_mult, out_shift: (heads,). bias_table: (heads, T) int32 in
    units of the accumulator; bias_index: (L, L) into it. region: (windows, L) uint8; a token attends only to tokens of
    its own region, and the others have probability 0. e = exponential(row maximum - logit); out = (sum e v) *
    floor(out_mult * 2**24 / sum e), shifted and rounded once. |sum e v| <= 127 sum e, so the product stays below 2**53.
    """
    batch, rows = qkv.shape[:2]
    length = rows // windows
    split = qkv.reshape(batch, windows, length, -1)
    q, k, v = np.split(split, [heads * qk_dim, 2 * heads * qk_dim], axis=-1)
    q, k, v = (part.reshape(batch, windows, length, heads, -1).transpose(0, 1, 3, 2, 4) for part in (q, k, v))

    logits = integer_matmul(q, k.swapaxes(-1, -2))
    if bias_table is not None and bias_index is not None:
        logits = logits + bias_table[:, bias_index]
    if region is None:
        allowed = np.ones((1, 1, 1, 1, 1), dtype=bool)
    else:
        allowed = (region[:, :, None] == region[:, None, :])[None, :, None]
    row_maximum = np.where(allowed, logits, -ACCUMULATOR_BOUND).max(axis=-1, keepdims=True)
    distance = np.where(allowed, row_maximum - logits, 0)
    e = exponential(distance, exp_mult[:, None, None], exp_shift[:, None, None]) * allowed

    total = e.astype(np.int64).sum(axis=-1, keepdims=True)
    reciprocal = (out_mult.astype(np.int64)[:, None, None] << RECIPROCAL_BITS) // total
    product = integer_matmul(e, v) * reciprocal
    out = shift_right_rounded(product, out_shift.astype(np.int64)[:, None, None] + RECIPROCAL_BITS)
    return saturate(out, dtype).transpose(0, 1, 3, 2, 4).reshape(batch, rows, heads * v_dim)
