"""How images are normalized: what says so, whether given images fit it, and what can be found out from them.

The engine takes raw pixels, the network normalized ones: `(pixel / 255 - mean) / std` per channel. A wrong mean or
deviation gives no error anywhere, only wrong answers, so what is stated or assumed is compared with the images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swincompress_pl.arguments import as_float, shown

# How far values may lie outside [0, 255] pixels: rounding; and what sharp edges give when images were resized after
# they were normalized (bicubic overshoot), in pixels and as a share of all values.
_SLACK, _OVERSHOOT, _OVERSHOOT_SHARE = 2.0, 64.0, 0.05
# How near to a whole pixel value most values have to be (half precision may have been between), and how many are most;
# and how near all have to be where mean and std are taken from them.
_NEAR, _WHOLE_SHARE, _WHOLE = 0.125, 0.9, 0.02
_LEVELS = 256
LOOKED_AT = 32  # images, enough to see how they are normalized
_SPAN_SHARE = 0.6  # resized images cover most of the range


def find_preprocessing(*sources: Any) -> dict[str, Any]:
    """The plain data of the first source that says how images are normalized (a mapping, or an object with `to_dict`).

    Raises ValueError where none does; the sources that are None are passed over.
    """
    for source in sources:
        as_dict: Any = source.to_dict() if hasattr(source, "to_dict") else source
        if isinstance(as_dict, Mapping) and (source is sources[0] or (as_dict.get("mean") and as_dict.get("std"))):
            return {key: value for key, value in as_dict.items() if isinstance(value, str | int | float | list | tuple)}
    raise ValueError(
        "nothing says how the images are normalized; pass preprocessing={'mean': (...), 'std': (...)} in [0, 1] units"
    )


def preprocessing_of(network: Any, given: Any = None) -> tuple[dict[str, Any], bool]:
    """How a network's images are normalized, and whether that is only assumed: its defaults, because nobody said more.

    given: what a caller says, which counts most; then `network.preprocessing`, then timm's `pretrained_cfg`.
    """
    stated = (given, getattr(network, "preprocessing", None))
    found = find_preprocessing(*stated, getattr(network, "pretrained_cfg", None))
    return found, all(source is None for source in stated)


def checked_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy; ValueError naming what is missing or out of range."""
    if not isinstance(preprocessing, Mapping):
        raise ValueError(f"preprocessing is {shown(preprocessing)}; it must be a mapping with 'mean' and 'std'")
    for key in ("mean", "std"):
        values = preprocessing.get(key)
        listed = [as_float(value) for value in values] if isinstance(values, list | tuple) else []
        finite = [value for value in listed if value is not None and math.isfinite(value)]
        if not listed or len(finite) < len(listed):
            raise ValueError(f"preprocessing[{key!r}] is {values!r}; it must list one number per image channel")
        low, high = min(finite), max(finite)
        if not (low >= 0 and high <= 1) or (key == "std" and low <= 0):
            raise ValueError(
                f"preprocessing[{key!r}] is {values!r}; it is given in [0, 1] units (pixel / 255), std above 0"
            )
    return {key: list(value) if isinstance(value, tuple) else value for key, value in preprocessing.items()}


def real_pixels(images: Tensor, preprocessing: Mapping[str, Any]) -> Tensor:
    """Normalized images (N, ..., C, H, W) in pixel steps, not rounded; float32."""
    mean, std = (
        torch.tensor(preprocessing[key], device=images.device, dtype=torch.float32)[:, None, None]
        for key in ("mean", "std")
    )
    return (images.float() * std + mean) * 255


def pixels_of(images: Tensor, preprocessing: Mapping[str, Any], *, events: bool = False) -> Tensor:
    """The uint8 pixels (N, ..., H, W, C) of normalized images (N, ..., C, H, W), rounded.

    What resizing added beyond black and white is cut off. Raises ValueError for values that cannot be pixels.
    """
    real = real_pixels(images, preprocessing)
    low, high = (real.min().item(), real.max().item()) if real.numel() else (0.0, 0.0)
    if not (low >= -_SLACK and high <= 255 + _SLACK):
        outside = ((real < -_SLACK) | (real > 255 + _SLACK)).float().mean().item()
        beyond = max(-low, high - 255)
        if events or not (outside <= _OVERSHOOT_SHARE and beyond <= _OVERSHOOT):  # NaN is neither
            raise ValueError(_out_of_range(low, high, preprocessing, events=events))
    return real.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def _out_of_range(low: float, high: float, preprocessing: Mapping[str, Any], *, events: bool) -> str:
    mean, std = preprocessing["mean"], preprocessing["std"]
    if events:
        return (
            f"event counts reach from {low:.1f} to {high:.1f} in steps of mean {mean} and std {std}; 8 bits hold the "
            "counts 0 to 255: clip them (frames.clamp(max=255)) in training and here, or count over shorter time steps"
        )
    return (
        f"images reach from {low:.1f} to {high:.1f} in pixel steps; pass images normalized with mean {mean} and std "
        f"{std}, without NaN, or preprocessing= with the mean and std that they are normalized with"
    )


def check_fit(images: Tensor, preprocessing: Mapping[str, Any], *, assumed: bool) -> None:
    """Look whether normalized images (N, ..., C, H, W) are pixels of this mean and deviation.

    assumed: nobody stated them, they are the network's defaults. Raises ValueError where images of 8 bits, or of a part
    of the range, do not fit what was assumed; where it was stated that is a warning. Images that were resized after
    they were normalized have values between the pixels', which is a warning too.
    """
    found = _PixelFit.of(images, preprocessing)
    if found.whole_share >= _WHOLE_SHARE:
        return
    mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
    seen = (
        f"under mean {mean} and std {std} {found.whole_share:.0%} of the images' values are whole pixel values, and "
        f"they reach from {found.low:.1f} to {found.high:.1f} of 0 to 255"
    )
    if not found.looks_normalized_otherwise:
        warnings.warn(
            f"{seen}: the images were changed after they were normalized (resized, jittered?). The integers see whole "
            "pixels; if the mean or std is wrong, pass preprocessing={'mean': ..., 'std': ...}",
            stacklevel=3,
        )
        return
    guess = normalization_in(images)
    remedy = "pass preprocessing={'mean': ..., 'std': ...} as the images are normalized" + (
        "" if guess is None else f"; they look like preprocessing={guess}"
    )
    if assumed:
        raise ValueError(
            f"nothing says how the images are normalized, so the network's mean and std were assumed, and the images "
            f"do not fit: {seen}. Integers on raw pixels would see other images than the network: {remedy}"
        )
    warnings.warn(f"the images do not look normalized as preprocessing says: {seen}; {remedy}", stacklevel=3)


def fits(images: Tensor, preprocessing: Mapping[str, Any], *, resized: bool = False) -> bool:
    """Whether most values of normalized images (N, ..., C, H, W) are whole pixel values of this mean and deviation;
    resized: or could be what resizing makes of such."""
    found = _PixelFit.of(images, preprocessing)
    reach = _OVERSHOOT if resized else _SLACK
    whole = found.whole_share >= _WHOLE_SHARE or (resized and not found.looks_normalized_otherwise)
    return whole and found.low >= -reach and found.high <= 255 + reach


@dataclass(frozen=True)
class _PixelFit:
    """whole_share: of the values, near a whole pixel value; 1 where the images' precision cannot tell. low, high: in
    pixels. levels: the most different values of a channel."""

    whole_share: float
    low: float
    high: float
    levels: int

    @property
    def looks_normalized_otherwise(self) -> bool:
        return self.levels <= _LEVELS or self.high - self.low < _SPAN_SHARE * 255

    @classmethod
    def of(cls, images: Tensor, preprocessing: Mapping[str, Any]) -> _PixelFit:
        few = _few(images)
        real = real_pixels(few, preprocessing)
        low, high = (float(real.min()), float(real.max())) if real.numel() else (0.0, 0.0)
        finest = torch.finfo(few.dtype).eps * 2 * max(abs(low - 127), abs(high - 127), 127.0)
        if finest > 2 * _NEAR or not real.numel():
            return cls(1.0, low, high, 0)
        near = (real - real.round()).abs() <= max(_NEAR, finest)
        rounded = (real / _NEAR).round()
        levels = max(len(channel.unique()) for channel in _by_channel(rounded))
        return cls(float(near.float().mean()), low, high, levels)


def normalization_between(raw: Tensor, images: Tensor) -> dict[str, list[float]] | None:
    """mean and std that turn the pixels `raw` into the network's input `images` (N, C, H, W), None where none do.

    raw: the same images as a loader gave them, uint8 or whole pixel values in 0 .. 255 or [0, 1], channels first or
    last.
    """
    pixels = _as_pixels(raw)
    if pixels is None or images.ndim < 4:
        return None
    if pixels.shape != images.shape and pixels.ndim == images.ndim and pixels.shape[-3] != 1:
        pixels = pixels.movedim(-1, -3)
    if pixels.ndim == images.ndim and pixels.shape[-3] == 1:  # gray, repeated
        pixels = pixels.expand(*pixels.shape[:-3], images.shape[-3], *pixels.shape[-2:])
    if pixels.shape != images.shape or not images.numel():
        return None
    wide = images.double().to(pixels.device)
    found = [_line(x, y) for x, y in zip(_by_channel(pixels), _by_channel(wide), strict=True)]
    return _normalization([line for line in found if line is not None], len(found))


def _line(x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """(slope, offset) of y over x where all points lie on it."""
    centred = x - x.mean()
    spread = float(centred.square().sum())
    if spread == 0:
        return None
    slope = float((centred * y).sum()) / spread
    offset = float(y.mean()) - slope * float(x.mean())
    error = float((slope * x + offset - y).abs().max())
    return (slope, offset) if slope > 0 and error < _WHOLE * slope else None


def normalization_in(images: Tensor) -> dict[str, list[float]] | None:
    """mean and std of images (N, ..., C, H, W) that were 8-bit pixels from black to white, None where they do not tell.

    The values of every channel have to lie on a grid of 256 steps, of which the first and the last are there.
    """
    found = [_grid(channel) for channel in _by_channel(_few(images).double())] if images.numel() else []
    return _normalization([line for line in found if line is not None], len(found))


def _grid(values: Tensor) -> tuple[float, float] | None:
    """(slope, offset) of values over the pixels 0 to 255 where the first and the last are there, and enough between."""
    levels = values.unique()
    if not bool(torch.isfinite(levels).all()):
        return None
    slope = float(levels[-1] - levels[0]) / 255
    offset = float(levels[0])
    if slope <= 0 or not bool(((levels - offset) / slope - ((levels - offset) / slope).round()).abs().max() < _WHOLE):
        return None
    # Steps of one pixel have to be there, or it could as well be another grid.
    neighbours = levels.diff().min() / slope
    return (slope, offset) if len(levels) >= 32 and float(neighbours) < 1.5 else None


def _normalization(lines: Sequence[tuple[float, float]], channels: int) -> dict[str, list[float]] | None:
    """mean and std from (slope, offset) per channel, where all are known and in range."""
    if len(lines) < channels or not lines:
        return None
    std = [1 / (255 * slope) for slope, _ in lines]
    mean = [-offset * deviation for (_, offset), deviation in zip(lines, std, strict=True)]
    if not all(-1e-4 <= value <= 1 + 1e-4 for value in (*mean, *std)):
        return None
    return {"mean": [_tidy(value) for value in mean], "std": [_tidy(value) for value in std]}


def _tidy(value: float) -> float:
    """The nearest short number: what was written in a configuration, and not what float32 made of it."""
    short = next((round(value, digits) for digits in (1, 2, 3, 4) if abs(round(value, digits) - value) < 2e-6), value)
    return abs(min(max(short, 0.0), 1.0))  # and not -0.0


def _as_pixels(raw: Tensor) -> Tensor | None:
    """float64 pixel values 0 .. 255 of what a loader gave, None where it gave something else."""
    if raw.dtype == torch.uint8:
        return raw.double()
    if not raw.is_floating_point() or not raw.numel():
        return None
    few = _few(raw).double()
    for scale in (1.0, 255.0):
        real = few * scale
        whole = (real - real.round()).abs().max() <= _WHOLE
        if bool(whole) and float(real.min()) >= 0 and float(real.max()) <= 255 and float(real.max()) > 1:
            return raw.double() * scale
    return None


def _by_channel(images: Tensor) -> tuple[Tensor, ...]:
    return images.movedim(-3, 0).flatten(1).unbind(0)


def _few(images: Tensor) -> Tensor:
    return images[:LOOKED_AT]
