"""How a picture becomes pixels: read, resized and cropped, in training and for the engine, as timm does it.

Importing this needs NumPy alone. Pillow is imported where a picture is read or resized.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "box", "hamming", "nearest")
CROP_MODES = ("center", "squash", "border")
GEOMETRY = ("height", "width", "resize", "crop_mode", "interpolation")
_KEYS = (*GEOMETRY, "mean", "std", "time_steps")
_TIMM_CROP_PCT = 0.875  # timm's default
_MODES = {1: "L", 3: "RGB"}

PixelArray = npt.NDArray[np.uint8]


def pillow() -> ModuleType:
    """Pillow's `Image` module; an ImportError says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"pictures are read by Pillow, which cannot be imported ({error}); install it by `pip install pillow`"
        ) from error
    return Image


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Resize and crop, as timm's transform for evaluation.

    Attributes:
        height: Height of the crop, in pixels.
        width: Width of the crop, in pixels.
        resize: What a picture is resized to before the crop, in pixels: one length for both sides, or (height, width);
            None for no resize.
        crop_mode: "center" scales the picture to cover `resize` (with one length, this is the length of the shorter
            side). "squash" stretches it to exactly `resize`. "border" scales it to fit into `resize`, and pads with the
            mean color. All crop the center.
        interpolation: One of `INTERPOLATIONS`, antialiased as in Pillow.

    Raises:
        ValueError: If a value is outside its range, or `resize` is smaller than the crop.
    """

    height: int
    width: int
    resize: int | tuple[int, int] | None = None
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("height", "width"):
            if not _is_size(getattr(self, name)):
                raise ValueError(f"{owner}.{name} is {getattr(self, name)!r}; give a size in pixels of at least 1.")
        for name, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{owner}.{name} is {getattr(self, name)!r}; choose from {', '.join(known)}.")
        self._check_resize(owner)

    def _check_resize(self, owner: str) -> None:
        if self.resize is None:
            if self.crop_mode != "center":
                raise ValueError(f"{owner}.crop_mode {self.crop_mode!r} needs a resize; give {owner}.resize in pixels.")
            return
        sides = tuple(self.resize) if isinstance(self.resize, list | tuple) else (self.resize, self.resize)
        if len(sides) != 2 or not all(map(_is_size, sides)):
            raise ValueError(f"{owner}.resize is {self.resize!r}; give pixels: a length, (height, width) or None.")
        least = max(self.height, self.width)
        if sides[0] == sides[1]:
            object.__setattr__(self, "resize", sides[0])
            if self.crop_mode == "center" and sides[0] < least:
                raise ValueError(
                    f"{owner}.resize is {sides[0]}, shorter than the crop of {self.height} x {self.width}; "
                    f"give at least {least}, or None to crop without a resize."
                )
        else:
            object.__setattr__(self, "resize", sides)
        if sides[0] < self.height or sides[1] < self.width:
            raise ValueError(
                f"{owner}.resize is {sides[0]} x {sides[1]}, smaller than the crop of {self.height} x {self.width}; "
                f"give at least ({self.height}, {self.width})."
            )

    def resized(self, image: Image) -> Image:
        """Resizes a picture as it is resized before the crop.

        Args:
            image: The picture.

        Returns:
            The resized picture, or the picture itself if nothing is to be done.

        Raises:
            ValueError: If the resized picture would be larger than Pillow reads.
        """
        size = self._size_of(image.width, image.height)
        if size == image.size:
            return image
        library = pillow()
        largest = library.MAX_IMAGE_PIXELS
        if largest is not None and size[0] * size[1] > 2 * largest:
            raise ValueError(
                f"a picture of {image.height} x {image.width} pixels would be resized to {size[1]} x {size[0]}, more "
                f"than {2 * largest} pixels; crop it first."
            )
        return image.resize(size, library.Resampling[self.interpolation.upper()])

    def _size_of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the resized picture, rounded as torchvision and timm do."""
        if self.resize is None:
            return width, height
        rows, columns = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if self.crop_mode == "squash":
            return columns, rows
        if self.crop_mode == "center" and rows == columns:
            longer = int(rows * max(width, height) / min(width, height))
            return (rows, longer) if width <= height else (longer, rows)
        ratio = (min if self.crop_mode == "center" else max)(height / rows, width / columns)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def framed(self, image: Image, *, channels: int = 3, mean: Sequence[float] = ()) -> PixelArray:
        """Converts, resizes and crops a picture.

        Args:
            image: The decoded picture, of any size and mode.
            channels: 3 for RGB, or 1 for gray.
            mean: The color of the border for crop mode "border", per channel and in [0, 1].

        Returns:
            (height, width, channels) uint8, writable.

        Raises:
            ValueError: If the picture has no 8-bit form, or is smaller than the crop and there is no resize.
        """
        image = self.resized(in_mode(image, _MODES[channels]))
        if self.crop_mode == "border":
            image = self._on_canvas(image, mean)
        elif image.width < self.width or image.height < self.height:
            raise ValueError(
                f"image of {image.height} x {image.width} pixels is smaller than the crop of {self.height} x "
                f"{self.width}; set {type(self).__name__}.resize to {max(self.height, self.width)} or more."
            )
        else:
            left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
            image = image.crop((left, top, left + self.width, top + self.height))
        pixels = np.array(image, dtype=np.uint8)  # a copy, which is writable, as torch needs it
        return pixels[..., None] if channels == 1 else pixels

    def _on_canvas(self, image: Image, mean: Sequence[float]) -> Image:
        """The picture on the center of a crop in the mean color."""
        color = tuple(round(255 * value) for value in mean)
        canvas: Image = pillow().new(image.mode, (self.width, self.height), color if len(color) > 1 else color[0])
        spaces = self.width - image.width, self.height - image.height
        left, top = (space // 2 if space > 0 else -round(-space / 2) for space in spaces)
        canvas.paste(image, (left, top))
        return canvas


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def in_mode(image: Image, mode: str) -> Image:
    """A picture as "RGB" or "L"; a ValueError for one that has no 8-bit form.

    16-bit gray keeps the upper 8 bits, as Pillow does for 16-bit RGB. (Its own conversion of 16-bit gray makes every
    value above 255 white.) Transparency is dropped, as timm drops it.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I" before Pillow 11
        values = np.asarray(image).astype(np.uint32) >> 8
        image = pillow().fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"the picture has mode {image.mode!r}, whose range of values is not known; scale it to 8 bits first, "
            "e.g. PIL.Image.fromarray(values.astype(numpy.uint8))"
        )
    if image.mode == "P" and "transparency" in image.info:  # the way around a warning
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def read_picture(source: str | os.PathLike[str] | bytes, *, exif: bool = False) -> Image:
    """Reads a picture whole.

    Args:
        source: A file, or its bytes.
        exif: Whether to turn the picture upright as its EXIF orientation says. timm does not.

    Returns:
        The decoded picture.

    Raises:
        OSError: If the file cannot be opened, such as FileNotFoundError and PermissionError; the message names it.
        ValueError: If it is no picture, or damaged or cut off; the message names it.
    """
    library = pillow()
    try:
        with library.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return upright(image) if exif else image
    except (OSError, SyntaxError, ValueError, EOFError, library.DecompressionBombError) as error:
        # SyntaxError is what Pillow raises for some broken PNG files. Only the system's errors have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
        raise ValueError(f"{name}: cannot be decoded as an image ({error}); replace or remove the file.") from error


def upright(image: Image) -> Image:
    """A picture turned as its EXIF orientation says."""
    pillow()
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def resize_for(height: int, width: int, crop_pct: float) -> int | tuple[int, int]:
    """The `resize` of a crop that keeps a part of it, rounded as timm does; a ValueError unless `crop_pct` fits."""
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct!r}; give a fraction above 0 and at most 1.")
    rows, columns = math.floor(height / crop_pct), math.floor(width / crop_pct)
    return rows if rows == columns else (rows, columns)


def resolved(given: Mapping[str, Any], *, height: int, width: int) -> dict[str, Any]:
    """The canonical fields of a preprocessing, as plain data.

    Args:
        given: Fields by our names, or what timm calls a data config or a `pretrained_cfg`. Other keys are dropped.
        height: Height of the network's images, in pixels. timm's fields are resolved for it.
        width: Width of the network's images, in pixels.

    Returns:
        What is known of height, width, resize, crop_mode, interpolation, mean, std and time_steps. Of timm's fields all
        but the last are known.

    Raises:
        ValueError: If timm's `crop_pct` is outside its range.
    """
    known = {key: list(given[key]) if isinstance(given[key], tuple) else given[key] for key in _KEYS if key in given}
    if "resize" not in known and ("input_size" in given or "crop_pct" in given):
        resize = resize_for(height, width, given.get("crop_pct") or _TIMM_CROP_PCT)
        known |= {
            "height": height,
            "width": width,
            "resize": list(resize) if isinstance(resize, tuple) else resize,
            "crop_mode": given.get("crop_mode") or "center",
            "interpolation": given.get("interpolation") or "bicubic",
        }
    elif "resize" in known:
        known.setdefault("crop_mode", "center")  # the only one before there was a choice
    return {key: known[key] for key in _KEYS if key in known}
