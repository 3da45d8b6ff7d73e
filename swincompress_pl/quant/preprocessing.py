"""How images are normalized: where it is stated, whether given images fit it, and what the images themselves tell.

The engine takes raw pixels, and the network takes normalized ones, `(pixel / 255 - mean) / std` per channel. A wrong
mean or std causes no error anywhere, only wrong answers. So what is stated or assumed is compared with the images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swincompress_pl.arguments import as_float, integer, shown, text
from swincompress_pl.pictures import resolved

# How far values may lie outside [0, 255]: by rounding; and by bicubic overshoot at sharp edges, if images were resized
# after they were normalized, in pixel steps and as a share of all values.
_SLACK, _OVERSHOOT, _OVERSHOOT_SHARE = 2.0, 64.0, 0.05
# How near to a whole pixel value most values have to be (half precision may have rounded them), and which share is
# "most"; and how near all values have to be if mean and std are derived from them.
_NEAR, _WHOLE_SHARE, _WHOLE = 0.125, 0.9, 0.02
_LEVELS = 256
LOOKED_AT = 32  # images, enough to see how they are normalized
_SPAN_SHARE = 0.6  # resized images cover most of the range
_EVENTS = "; counts of events, in two channels, have {'mean': [0.0, 0.0], 'std': [1 / 255, 1 / 255], 'time_steps': T}"
_SIZES, _NAMES = ("height", "width", "time_steps"), ("interpolation", "crop_mode")  # the other known keys, but "resize"


def find_preprocessing(*sources: Any) -> dict[str, Any]:
    """Finds the first source that says how images are normalized.

    Args:
        *sources: Mappings with "mean" and "std", objects with `to_dict` such as `data.Preprocessing`, or anything else,
            which is passed over.

    Returns:
        The plain data of the source.

    Raises:
        ValueError: If no source says it.
    """
    for source in sources:
        as_dict: Any = source.to_dict() if hasattr(source, "to_dict") else source
        if isinstance(as_dict, Mapping) and (source is sources[0] or (as_dict.get("mean") and as_dict.get("std"))):
            return {
                key: value
                for key, value in as_dict.items()
                if isinstance(value, str | int | float | list | tuple) or (key == "resize" and value is None)
            }
    raise ValueError(
        "nothing says how the images are normalized; pass preprocessing={'mean': (...), 'std': (...)} in [0, 1] units"
    )


def preprocessing_of(network: Any, given: Any = None) -> tuple[dict[str, Any], bool]:
    """Finds how a network's images are normalized.

    Args:
        network: The network. Its `preprocessing` counts if `given` says nothing, and then timm's `pretrained_cfg`.
        given: What the caller says; None for nothing.

    Returns:
        The preprocessing as plain data, and whether it is only assumed, because it comes from `pretrained_cfg`.

    Raises:
        ValueError: If nothing says it, or `given` is not a mapping and has no `to_dict`.
    """
    if given is not None and not (isinstance(given, Mapping) or hasattr(given, "to_dict")):
        raise ValueError(f"preprocessing is {shown(given)}; it must be a mapping with 'mean' and 'std'")
    stated = (given, getattr(network, "preprocessing", None))
    found = find_preprocessing(*stated, getattr(network, "pretrained_cfg", None))
    return found, all(source is None for source in stated)


def checked_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a preprocessing.

    Args:
        preprocessing: Mapping with "mean" and "std", one number per channel for pixels in [0, 1].

    Returns:
        A copy with lists in place of tuples.

    Raises:
        ValueError: If mean or std is missing or out of range, or they have different lengths; the message names it.
    """
    if not isinstance(preprocessing, Mapping):
        raise ValueError(f"preprocessing is {shown(preprocessing)}; it must be a mapping with 'mean' and 'std'")
    for key in ("mean", "std"):
        values = preprocessing.get(key)
        listed = [as_float(value) for value in values] if isinstance(values, list | tuple) else []
        finite = [value for value in listed if value is not None and math.isfinite(value)]
        if not listed or len(finite) < len(listed):
            raise ValueError(
                f"preprocessing[{key!r}] is {values!r}; it must list one number per image channel{_EVENTS}"
            )
        low, high = min(finite), max(finite)
        if not (low >= 0 and high <= 1) or (key == "std" and low <= 0):
            raise ValueError(
                f"preprocessing[{key!r}] is {values!r}; it is given in [0, 1] units (pixel / 255), std above 0"
            )
    means, stds = len(preprocessing["mean"]), len(preprocessing["std"])
    if means != stds:
        raise ValueError(
            f"preprocessing['mean'] has length {means} and preprocessing['std'] has length {stds}; each lists one "
            "number per image channel"
        )
    return {key: list(value) if isinstance(value, tuple) else value for key, value in preprocessing.items()}


def described_preprocessing(preprocessing: Any) -> dict[str, Any]:
    """Checks the preprocessing that a datamodule describes.

    Args:
        preprocessing: Object with `to_dict`, such as `data.Preprocessing`, or a mapping with "mean" and "std", one
            number per channel for pixels in [0, 1]. The mapping may hold the other fields of `data.Preprocessing`, and
            "time_steps". It may also be a data config of timm, with "input_size".

    Returns:
        The plain data.

    Raises:
        ValueError: If it is neither, or a key is missing, unknown or has a value out of range; the message names it.
    """
    if not isinstance(preprocessing, Mapping) and hasattr(preprocessing, "to_dict"):
        return dict(preprocessing.to_dict())
    plain = checked_preprocessing(preprocessing)
    if "input_size" in plain:
        return _of_timm(plain)
    known = ("mean", "std", "resize", *_NAMES, *_SIZES)
    unknown = [shown(key) for key in plain if key not in known]
    if unknown:
        raise ValueError(f"preprocessing has unknown keys: {', '.join(unknown)}; there are {', '.join(known)}")
    return {key: value if value is None else _checked_field(key, value) for key, value in plain.items()}


def _checked_field(key: str, value: Any) -> Any:
    """The value of a known key, in its type; a ValueError that names the key otherwise."""
    name = f"preprocessing[{key!r}]"
    if key in ("mean", "std"):
        return [float(each) for each in value]
    if key in _NAMES:
        return text(name, value, "a name")
    if key == "resize" and isinstance(value, list) and len(value) == 2:
        return [integer(name, each, least=1) for each in value]
    return integer(name, value, least=1)


def _of_timm(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a data config of timm, for its own input size."""
    size = plain["input_size"]
    if not isinstance(size, list) or len(size) != 3:
        raise ValueError(f"preprocessing['input_size'] is {shown(size)}; it must list channels, height and width")
    _, height, width = (integer("preprocessing['input_size']", each, least=1) for each in size)
    return resolved(plain, height=height, width=width)


def real_pixels(images: Tensor, preprocessing: Mapping[str, Any]) -> Tensor:
    """Normalized images (N, ..., C, H, W) in pixel steps, float32 and not rounded."""
    mean, std = (
        torch.tensor(preprocessing[key], device=images.device, dtype=torch.float32)[:, None, None]
        for key in ("mean", "std")
    )
    return (images.float() * std + mean) * 255


def pixels_of(images: Tensor, preprocessing: Mapping[str, Any], *, events: bool = False) -> Tensor:
    """The uint8 pixels (N, ..., H, W, C) of normalized images (N, ..., C, H, W), rounded.

    Overshoot of resizing beyond black and white is cut off. A ValueError is raised for values that cannot be pixels.
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
    """Checks whether normalized images are 8-bit pixels with this mean and std.

    It warns of images that do not fit a stated preprocessing, and of values between whole pixels, as in images that
    were resized after they were normalized.

    Args:
        images: Normalized float images (N, ..., C, H, W).
        preprocessing: Mapping with "mean" and "std".
        assumed: Whether nobody stated them, so that they are the network's defaults.

    Raises:
        ValueError: If the images look normalized in another way than was assumed.
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
    """Tells whether normalized images are pixels with this mean and std.

    Args:
        images: Normalized float images (N, ..., C, H, W).
        preprocessing: Mapping with "mean" and "std".
        resized: Whether images that were resized after they were normalized count, too.

    Returns:
        Whether most values are whole pixel values in range, or could come from resizing.
    """
    found = _PixelFit.of(images, preprocessing)
    reach = _OVERSHOOT if resized else _SLACK
    whole = found.whole_share >= _WHOLE_SHARE or (resized and not found.looks_normalized_otherwise)
    return whole and found.low >= -reach and found.high <= 255 + reach


@dataclass(frozen=True)
class _PixelFit:
    """How images look in pixel steps.

    `whole_share` is the share of values near a whole pixel value, or 1 if the precision of the images cannot tell it.
    `low` and `high` are the extremes, and `levels` is the largest number of different values in a channel.
    """

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
    """Finds the mean and std that turn a loader's pixels into the network's input.

    Args:
        raw: The images as the loader returned them: uint8, or whole pixel values from 0 to 255 or divided by 255,
            channels first or last.
        images: The same images as the network takes them, (N, C, H, W).

    Returns:
        The preprocessing {"mean": ..., "std": ...}; None if none fits.
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
    """(slope, offset) of y over x if all points lie on one rising line, otherwise None."""
    centred = x - x.mean()
    spread = float(centred.square().sum())
    if spread == 0:
        return None
    slope = float((centred * y).sum()) / spread
    offset = float(y.mean()) - slope * float(x.mean())
    error = float((slope * x + offset - y).abs().max())
    return (slope, offset) if slope > 0 and error < _WHOLE * slope else None


def normalization_in(images: Tensor) -> dict[str, list[float]] | None:
    """Derives mean and std from images that were 8-bit pixels from black to white.

    The values of every channel have to lie on a grid of 256 steps, and the first and the last step have to occur.

    Args:
        images: Normalized float images (N, ..., C, H, W).

    Returns:
        The preprocessing {"mean": ..., "std": ...}; None if the images do not tell it.
    """
    found = [_grid(channel) for channel in _by_channel(_few(images).double())] if images.numel() else []
    return _normalization([line for line in found if line is not None], len(found))


def _grid(values: Tensor) -> tuple[float, float] | None:
    """(slope, offset) of values over the pixels 0 to 255, if the first, the last and enough others occur."""
    levels = values.unique()
    if not bool(torch.isfinite(levels).all()):
        return None
    slope = float(levels[-1] - levels[0]) / 255
    offset = float(levels[0])
    if slope <= 0 or not bool(((levels - offset) / slope - ((levels - offset) / slope).round()).abs().max() < _WHOLE):
        return None
    # Steps of one pixel have to occur; otherwise it could be another grid.
    neighbours = levels.diff().min() / slope
    return (slope, offset) if len(levels) >= 32 and float(neighbours) < 1.5 else None


def _normalization(lines: Sequence[tuple[float, float]], channels: int) -> dict[str, list[float]] | None:
    """The mean and std that follow from (slope, offset) per channel, if all are known and in range."""
    if len(lines) < channels or not lines:
        return None
    std = [1 / (255 * slope) for slope, _ in lines]
    mean = [-offset * deviation for (_, offset), deviation in zip(lines, std, strict=True)]
    if not all(-1e-4 <= value <= 1 + 1e-4 for value in (*mean, *std)):
        return None
    return {"mean": [_tidy(value) for value in mean], "std": [_tidy(value) for value in std]}


def _tidy(value: float) -> float:
    """The nearest short number, as written in a configuration before float32 rounded it."""
    short = next((round(value, digits) for digits in (1, 2, 3, 4) if abs(round(value, digits) - value) < 2e-6), value)
    return abs(min(max(short, 0.0), 1.0))  # and not -0.0


def _as_pixels(raw: Tensor) -> Tensor | None:
    """The pixel values 0 to 255, float64, of what a loader returned; None if these are not pixels."""
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
    """Some images, which are enough to see how they are normalized."""
    return images[:LOOKED_AT]
