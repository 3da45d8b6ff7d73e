"""The operations of spiking networks in plain NumPy, by the conventions of `operations.py`.

A value with time has it as first axis: (T, rows..., channels) per image, (N, T, rows..., channels) per batch. Spikes
are uint1. Sums of spikes ("counts") are wider unsigned bytes, whose range they cannot leave. `spec.md` derives why no
rounding is needed between a convolution and the spikes that it causes.
"""

from __future__ import annotations

import numpy as np

from swincompress_pl.spec.integer import IntArray, integer_matmul, requantize, saturate
from swincompress_pl.spec.operations import sliding

DECAY_BITS = 16
# Largest magnitudes, so that no sum in a neuron leaves int32: of a bias and of the current before it is added; of a
# threshold and of the reset value; of a membrane potential.
CURRENT_MAX = 2**27
THRESHOLD_MAX = 2**28
MEMBRANE_MAX = 2**29
STEPS_MAX = 255  # binary time steps that stand for a count, which is a byte
# A multiplier and a shift that leave an accumulator as it is.
AS_IT_IS = (2**21, 21)


def lif(
    x: IntArray,
    threshold: IntArray,
    reset: IntArray,
    bias: IntArray,
    *,
    steps: int,
    repeated: int,
    decay: int,
    input_decay: int,
    soft_reset: int,
    fraction_bits: int,
) -> IntArray:
    """The spikes of leaky integrate-and-fire neurons, or of integrate-and-fire neurons with decay 0.

    x: (N, T, rows..., C) int32. If `repeated`, x has no T, and each of the `steps` steps gets the same current.
    threshold, reset, bias: (C,) int32, in units of 2**-fraction_bits of x's unit. One step, in integers only:

        i = (clamp(x) << fraction_bits) + bias           |x << fraction_bits| clamped to 2**27
        v = v + ((reset - v + i) * decay >> 16)          with input_decay; tau = 2 is decay 2**15 and exact
        v = v + ((reset - v) * decay >> 16) + i          without it
        spike = v >= threshold;  after a spike, v = v - threshold (soft_reset) or v = reset

    The shift is a floor. v begins at `reset` and is clamped to 2**29. -> (N, T, rows..., C) uint1.
    """
    currents = x.astype(np.int64)
    limit = CURRENT_MAX >> fraction_bits
    currents = (np.clip(currents, -limit, limit) << fraction_bits) + bias
    if repeated:
        currents = np.repeat(currents[:, None], steps, axis=1)
    shape = currents.shape
    currents = currents.reshape(shape[0], steps, -1, shape[-1])
    membrane = np.broadcast_to(reset.astype(np.int64), currents[:, 0].shape)
    spikes = np.empty(currents.shape, dtype=np.uint8)
    for step in range(steps):
        current = currents[:, step]
        pulled = reset - membrane + current * input_decay
        charged = membrane + ((pulled * decay) >> DECAY_BITS) + current * (1 - input_decay)
        charged = np.clip(charged, -MEMBRANE_MAX, MEMBRANE_MAX)
        fired = charged >= threshold
        membrane = np.where(fired, charged - threshold if soft_reset else reset, charged)
        spikes[:, step] = fired
    return spikes.reshape(shape)


def max_pool(x: IntArray, *, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> IntArray:
    """The largest value under each window of (N, H, W, C) or (N, T, H, W, C); padding is less than any value."""
    images = x.reshape(-1, *x.shape[-3:])
    pads = ((0, 0), (padding[0], padding[0]), (padding[1], padding[1]), (0, 0))
    windows = sliding(np.pad(images, pads, constant_values=np.iinfo(x.dtype).min), kernel, stride)
    pooled: IntArray = windows.max(axis=(3, 4))
    return pooled.reshape(*x.shape[:-3], *pooled.shape[1:])


def block_sum(x: IntArray, *, rows: int, channels: int, dtype: str) -> IntArray:
    """Sums over equal runs of rows and of channels: (N, R, C) -> (N, rows, channels), saturated to `dtype`.

    A run is all tokens of a time step, the channels of a head, or both.
    """
    batch = x.shape[0]
    blocks = x.reshape(batch, rows, -1, channels, x.shape[-1] // channels)
    return saturate(blocks.sum(axis=(2, 4), dtype=np.int64), dtype)


def multiply(a: IntArray, b: IntArray, *, dtype: str) -> IntArray:
    """Products of counts; each value of b (N, R / r, C / c) multiplies a run of r rows and c channels of a."""
    batch, rows, channels = b.shape
    blocks = a.reshape(batch, rows, -1, channels, a.shape[-1] // channels).astype(np.int64)
    return saturate(blocks * b[:, :, None, :, None], dtype).reshape(a.shape)


def spike_attention(q: IntArray, k: IntArray, v: IntArray, *, windows: int, heads: int) -> IntArray:
    """Computes q (k^T v) for each head of each window (a time step), in counts, without softmax and scale.

    q, k: (N, windows * L, heads * d); v: (N, windows * L, heads * e), all unsigned bytes -> int32 of the shape of v.
    The order of the products does not change the result.
    """
    batch, rows, _ = q.shape

    def split(x: IntArray) -> IntArray:
        return x.reshape(batch, windows, rows // windows, heads, -1).transpose(0, 1, 3, 2, 4)

    product = integer_matmul(split(q), integer_matmul(split(k).swapaxes(-1, -2), split(v)))
    return product.transpose(0, 1, 3, 2, 4).reshape(v.shape).astype(np.int32)


def integrate(x: IntArray, bias: IntArray, mult: IntArray, shift: IntArray, *, dtype: str) -> IntArray:
    """Computes y = requantize(sum of x over time + bias), what a neuron or a stream is charged with by D binary steps.

    x: (N, T, rows..., C) spikes, counts or int32, T <= 255; bias: (C,) int32 -> (N, rows..., C) of `dtype`. Widths: the
    sum stays below 2**39 + 2**31, and times mult below 2**62.
    """
    return requantize(x.astype(np.int64).sum(axis=1) + bias, mult, shift, dtype)


def fire(x: IntArray, mult: IntArray, shift: IntArray, *, steps: int) -> IntArray:
    """The spikes of integrate-and-fire neurons without leak that are charged once and fire in `steps` time steps.

    x: (N, rows..., C) int16 or int32; mult, shift: (C,). The membrane potential has `shift` fractional bits, and begins
    at half of the threshold, 2**shift:

        v = x * mult + 2**(shift - 1)
        at each step: spike = v >= 2**shift;  after a spike, v = v - 2**shift

    So the number of spikes is requantize(x), clamped to [0, steps]. -> (N, steps, rows..., C) uint1.
    """
    wide = shift.astype(np.int64)
    threshold = np.int64(1) << wide
    membrane = x.astype(np.int64) * mult + (threshold >> 1)
    spikes = np.empty((x.shape[0], steps, *x.shape[1:]), dtype=np.uint8)
    for step in range(steps):
        fired = membrane >= threshold
        membrane = membrane - threshold * fired
        spikes[:, step] = fired
    return spikes


def requantize_channels(x: IntArray, mult: IntArray, shift: IntArray, *, dtype: str) -> IntArray:
    """Converts each channel of a stream to another unit; x: (..., C) int16 or int32; mult, shift: (C,)."""
    return requantize(x, mult, shift, dtype)
