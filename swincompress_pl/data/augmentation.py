"""Augmentations of images: each is plain data with one method, and draws only from torch's global CPU generator.

The dataset seeds that generator from (seed, epoch, index) around every call (`sampling.seeded_torch`). So torchvision's
own transforms can be used as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from swincompress_pl.data.preprocessing import Preprocessing
from swincompress_pl.pictures import PixelArray


class Augmentation(Protocol):
    """Makes training pixels from an image; it must draw from torch's global generator only."""

    def apply(self, image: Image.Image, preprocessing: Preprocessing) -> PixelArray:
        """Returns one augmented image.

        Args:
            image: The decoded image, of any size and mode.
            preprocessing: Size and interpolation of what the network takes.

        Returns:
            (preprocessing.height, preprocessing.width, 3) uint8.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CropAndColor:
    """The usual recipe for ImageNet: a random resized crop, a flip, and optionally RandAugment and color jitter.

    Attributes:
        area_min: Smallest part of the image's area that a crop keeps, in (0, 1].
        flip: Whether to mirror an image with probability 1/2.
        randaugment_operations: Number of RandAugment operations per image (Cubuk et al. 2020); 0 for none.
        randaugment_magnitude: Their strength, 0 to 30.
        color_jitter: Largest relative change of brightness, contrast and saturation, 0 to 1; 0 for none.

    Raises:
        ValueError: If a value is outside its range.
    """

    area_min: float = 0.08
    flip: bool = True
    randaugment_operations: int = 0
    randaugment_magnitude: int = 9
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.area_min <= 1:
            raise ValueError(
                f"CropAndColor.area_min is {self.area_min}; give a part of the area above 0 and at most 1."
            )
        if self.randaugment_operations < 0:
            raise ValueError(f"CropAndColor.randaugment_operations is {self.randaugment_operations}; give 0 or more.")
        if not 0 <= self.randaugment_magnitude <= 30:
            raise ValueError(f"CropAndColor.randaugment_magnitude is {self.randaugment_magnitude}; give 0 to 30.")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"CropAndColor.color_jitter is {self.color_jitter}; give 0 to 1.")

    def apply(self, image: Image.Image, preprocessing: Preprocessing) -> PixelArray:
        """Returns a random crop of the whole image, taken before any resize.

        Args:
            image: The decoded image, of any size and mode.
            preprocessing: Size and interpolation of the crop.

        Returns:
            (preprocessing.height, preprocessing.width, 3) uint8.
        """
        size = (preprocessing.height, preprocessing.width)
        transform = _crop_and_color(self, size, preprocessing.interpolation)
        return np.array(transform(image.convert("RGB")), dtype=np.uint8)


@lru_cache(maxsize=8)
def _crop_and_color(config: CropAndColor, size: tuple[int, int], interpolation: str) -> Any:
    mode = InterpolationMode(interpolation)
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(config.area_min, 1.0), interpolation=mode)]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.randaugment_operations:
        steps.append(v2.RandAugment(config.randaugment_operations, config.randaugment_magnitude))
    if config.color_jitter:
        steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
    return v2.Compose(steps)


@dataclass(frozen=True, kw_only=True)
class PadCropFlip:
    """The usual recipe for CIFAR: a black border, a random crop back to the size, and a flip.

    Attributes:
        padding_px: Width of the border in pixels, 0 or more.
        flip: Whether to mirror an image with probability 1/2.

    Raises:
        ValueError: If `padding_px` is negative.
    """

    padding_px: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding_px < 0:
            raise ValueError(f"PadCropFlip.padding_px is {self.padding_px}; give 0 or more.")

    def apply(self, image: Image.Image, preprocessing: Preprocessing) -> PixelArray:
        """Returns a random crop of the pixels that evaluation would see.

        Args:
            image: The decoded image, of any size and mode.
            preprocessing: Makes the pixels from the image.

        Returns:
            (preprocessing.height, preprocessing.width, 3) uint8.
        """
        pixels = preprocessing.image_to_uint8(image)
        height, width = pixels.shape[:2]
        padding = self.padding_px
        top, left, mirrored = torch.rand(3).tolist()
        padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
        top, left = int(top * (2 * padding + 1)), int(left * (2 * padding + 1))
        crop = padded[top : top + height, left : left + width]
        return np.ascontiguousarray(crop[:, ::-1] if self.flip and mirrored < 0.5 else crop)


@dataclass(frozen=True, kw_only=True)
class ShiftRotate:
    """A small shift and rotation, for images that must not be mirrored, such as digits.

    The rotation is bilinear, on black.

    Attributes:
        shift_px: Largest shift along each axis, in pixels, 0 or more.
        rotation_deg: Largest rotation either way, in degrees, 0 to 180.

    Raises:
        ValueError: If a value is outside its range.
    """

    shift_px: int = 3
    rotation_deg: float = 10.0

    def __post_init__(self) -> None:
        if self.shift_px < 0:
            raise ValueError(f"ShiftRotate.shift_px is {self.shift_px}; give 0 or more.")
        if not 0 <= self.rotation_deg <= 180:
            raise ValueError(f"ShiftRotate.rotation_deg is {self.rotation_deg}; give 0 to 180.")

    def apply(self, image: Image.Image, preprocessing: Preprocessing) -> PixelArray:
        """Returns the pixels that evaluation would see, shifted and rotated.

        Args:
            image: The decoded image, of any size and mode.
            preprocessing: Makes the pixels from the image.

        Returns:
            (preprocessing.height, preprocessing.width, 3) uint8.
        """
        down, right, turn = torch.rand(3).tolist()
        upright = Image.fromarray(preprocessing.image_to_uint8(image))
        matrix = self._matrix(upright.size, self._shift(right), self._shift(down), (2 * turn - 1) * self.rotation_deg)
        moved = upright.transform(
            upright.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0)
        )
        return np.array(moved, dtype=np.uint8)

    @staticmethod
    def _matrix(size: tuple[int, int], right: int, down: int, angle_deg: float) -> tuple[float, ...]:
        """What Pillow's AFFINE wants: from a pixel of the result to one of the image, turned around the center.

        It is torchvision's `affine` for a shift and a rotation. Calling that costs four times as much as the pixels.
        """
        x, y = size[0] / 2, size[1] / 2
        cosine, sine = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
        shifted_x, shifted_y = -x - right, -y - down
        row = (cosine, sine, cosine * shifted_x + sine * shifted_y + x)
        return (*row, -sine, cosine, -sine * shifted_x + cosine * shifted_y + y)

    def _shift(self, fraction: float) -> int:
        return int(fraction * (2 * self.shift_px + 1)) - self.shift_px
