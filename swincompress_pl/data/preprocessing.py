"""From an image to the pixels that a network sees, the same for the float network and for the integer engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from swincompress_pl.pictures import Framing, PixelArray, resize_for

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Framing):
    """Resize, center crop and normalization, split at the uint8 pixels.

    `image_to_uint8` gives the (height, width, 3) uint8 pixels that the integer engine takes. `normalize` gives the
    float input of the network from exactly these pixels, so both see the same image.

    Attributes:
        height: Height of the crop, in pixels.
        width: Width of the crop, in pixels.
        resize: Length of the shorter side before the crop, in pixels; None for no resize. A pair (height, width) is
            covered by the image.
        crop_mode: "center"; or "squash", which stretches the image to `resize`; or "border", which fits it into
            `resize` and pads with the mean color.
        interpolation: "bicubic", "bilinear", "lanczos", "box", "hamming" or "nearest", antialiased as in Pillow.
        mean: What is subtracted per channel (R, G, B), for pixels in [0, 1].
        std: What is then divided by per channel, above 0 and at most 1.

    Raises:
        ValueError: If a value is outside its range, or `resize` is shorter than the crop.
    """

    height: int = 224
    width: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            self._check_channels(name)

    def _check_channels(self, name: str) -> None:
        values = tuple(float(value) for value in getattr(self, name))
        if len(values) != 3 or not all(math.isfinite(value) and 0 <= value <= 1 for value in values):
            raise ValueError(
                f"Preprocessing.{name} is {values}; give 3 numbers in [0, 1] "
                f"(for pixels divided by 255, not for pixels in 0..255). Images of other than 3 channels, as events "
                "are, are described by a mapping: {'mean': (0.0, 0.0), 'std': (1 / 255, 1 / 255), 'time_steps': T}."
            )
        if name == "std" and min(values) == 0:
            raise ValueError(f"Preprocessing.std is {values}; every deviation must be above 0.")
        object.__setattr__(self, name, values)

    @classmethod
    def from_crop_pct(cls, *, size: int, crop_pct: float, **fields: Any) -> Preprocessing:
        """Makes a square center crop that keeps a part of the shorter side, rounded as timm does it.

        Args:
            size: Height and width of the crop, in pixels.
            crop_pct: Part of the shorter side that the crop keeps, in (0, 1].
            **fields: Other fields, such as `interpolation`, `mean` and `std`.

        Returns:
            The preprocessing.

        Raises:
            ValueError: If `crop_pct` or a field is outside its range.
        """
        return cls(height=size, width=size, resize=resize_for(size, size, crop_pct), **fields)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data for JSON and YAML."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Rebuilds what `to_dict` gave.

        Args:
            fields: All fields by name; `crop_mode` may be missing, as in data of earlier versions.

        Returns:
            The preprocessing.

        Raises:
            ValueError: If a field is unknown, missing or outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {"crop_mode": "center", **fields}
        if fields.keys() != known:
            raise ValueError(
                f"Preprocessing: unknown fields {sorted(fields.keys() - known)}, "
                f"missing fields {sorted(known - fields.keys())}; "
                f"expected exactly {sorted(known)}."
            )
        return cls(**fields)

    def image_to_uint8(self, image: Image.Image) -> PixelArray:
        """Resizes the image and crops its center.

        Args:
            image: The decoded image, of any size and mode.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            ValueError: If there is no resize and the image is smaller than the crop, or its mode has no 8-bit form.
        """
        return self.framed(image, mean=self.mean)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Computes `(pixels / 255 - mean) / std`, with the channels first.

        Args:
            pixels: uint8, (N, H, W, 3) or (H, W, 3).

        Returns:
            float32, (N, 3, H, W) or (3, H, W).

        Raises:
            ValueError: If `pixels` has another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.dim() not in (3, 4) or pixels.shape[-1] != 3:
            raise ValueError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (N, H, W, 3) or (H, W, 3)."
            )
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        return ((pixels / 255 - mean) / std).movedim(-1, -3).contiguous()

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Undoes `normalize` exactly.

        Args:
            inputs: float32, (N, 3, H, W) or (3, H, W).

        Returns:
            uint8 pixels, (N, H, W, 3) or (H, W, 3).
        """
        mean, std = (torch.tensor(values, device=inputs.device) for values in (self.mean, self.std))
        pixels = (inputs.movedim(-3, -1) * std + mean) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8)
