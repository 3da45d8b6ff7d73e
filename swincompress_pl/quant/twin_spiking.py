"""The spiking operations of the torch twin (`twin.py`): the integers of `spec/spiking.py`, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swincompress_pl.spec.integer import LIMITS
from swincompress_pl.spec.spiking import CURRENT_MAX, DECAY_BITS, MEMBRANE_MAX

_HALF = 2 ** (DECAY_BITS - 1)


def lif(x: Tensor, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Tensor:
    """The spikes (N, T, rows..., C), uint8, for currents (N, T, rows..., C), int32, or without T if `repeated`."""
    fraction_bits, steps, repeated = attributes["fraction_bits"], attributes["steps"], attributes["repeated"]
    threshold, reset = tensors["threshold"], tensors["reset"]
    shape = (x.shape[0], steps, *x.shape[1:]) if repeated else x.shape
    limit = CURRENT_MAX >> fraction_bits

    def current_of(part: Tensor) -> Tensor:
        current: Tensor = (part.clamp(-limit, limit) << fraction_bits) + tensors["bias"]
        return current

    rows = x.reshape(x.shape[0], 1 if repeated else steps, -1, x.shape[-1])
    current = current_of(rows[:, 0])
    membrane = reset.expand_as(current)
    spikes = torch.empty((rows.shape[0], steps, *rows.shape[2:]), dtype=torch.uint8, device=x.device)
    for step in range(steps):
        if step and not repeated:
            current = current_of(rows[:, step])
        charged = _charged(membrane, current, reset, attributes)
        fired = charged >= threshold
        membrane = torch.where(fired, charged - threshold if attributes["soft_reset"] else reset, charged)
        spikes[:, step] = fired
    return spikes.reshape(shape)


def _charged(membrane: Tensor, current: Tensor, reset: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """The charged membranes, in int32, except for the product with a decay that is not one half."""
    pulled = reset - membrane
    if attributes["input_decay"]:
        pulled = pulled + current
    decay = attributes["decay"]
    charged = membrane + (pulled >> 1 if decay == _HALF else ((pulled.long() * decay) >> DECAY_BITS).int())
    if not attributes["input_decay"]:
        charged = charged + current
    return charged.clamp(-MEMBRANE_MAX, MEMBRANE_MAX)


def at_most(result: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """A result without a sign, saturated at the attribute `largest` if there is one."""
    return result.clamp(max=attributes["largest"]) if "largest" in attributes else result


def fire(x: Tensor, mult: Tensor, shift: Tensor, steps: int) -> Tensor:
    """The spikes (N, steps, rows..., C), uint8, of neurons that are charged with x (N, rows..., C) once."""
    threshold = torch.bitwise_left_shift(torch.ones_like(shift), shift)
    membrane = x.long() * mult + (threshold >> 1)
    spikes = []
    for _ in range(steps):
        fired = membrane >= threshold
        membrane = membrane - threshold * fired
        spikes.append(fired.to(torch.uint8))
    return torch.stack(spikes, dim=1)


def max_pool(x: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """The maxima of x (N, H, W, C), or (N, T, H, W, C), of any integer type."""
    (kh, kw), (sh, sw), (ph, pw) = attributes["kernel"], attributes["stride"], attributes["padding"]
    images = x.reshape(-1, *x.shape[-3:])
    padded = torch.nn.functional.pad(images, (0, 0, pw, pw, ph, ph), value=torch.iinfo(x.dtype).min)
    height, width = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    result: Tensor | None = None
    for row in range(kh):
        for column in range(kw):
            part = padded[:, row : row + sh * height : sh, column : column + sw * width : sw][:, :height, :width]
            result = part if result is None else torch.maximum(result, part)
    assert result is not None
    return result.reshape(*x.shape[:-3], height, width, x.shape[-1])


def block_sum(x: Tensor, attributes: Mapping[str, Any], dtype: str) -> Tensor:
    """The sums (N, rows, channels) of x (N, R, C), in int64, clamped to the range of `dtype`."""
    rows, channels = attributes["rows"], attributes["channels"]
    blocks = x.reshape(x.shape[0], rows, -1, channels, x.shape[-1] // channels)
    return blocks.sum(dim=(2, 4), dtype=torch.int64).clamp(*LIMITS[dtype])


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of a (N, R, C) and b (N, R / r, C / c), uint8; `spec.check` has proved that it fits a byte."""
    batch, rows, channels = b.shape
    blocks = a.reshape(batch, rows, -1, channels, a.shape[-1] // channels)
    return (blocks * b[:, :, None, :, None]).reshape(a.shape)


def spike_attention(q: Tensor, k: Tensor, v: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """The int32 counts q (k^T v), of the shape of v, for uint8 (N, windows * L, channels); float64 holds all sums."""
    windows, heads = attributes["windows"], attributes["heads"]
    batch, rows, _ = q.shape
    q64, k64, v64 = (x.reshape(batch, windows, rows // windows, heads, -1).transpose(2, 3).double() for x in (q, k, v))
    return (q64 @ (k64.transpose(-1, -2) @ v64)).transpose(2, 3).reshape(v.shape).int()
