"""LightningDataModules whose order and augmentation are functions of (seed, epoch, index)."""

from swincompress_pl.data.augmentation import CropAndColor, PadCropFlip, ShiftRotate
from swincompress_pl.data.cifar import CIFAR10
from swincompress_pl.data.digits import Digits
from swincompress_pl.data.imagenet import ImageNetFolder
from swincompress_pl.data.module import ImageClassificationData
from swincompress_pl.data.preprocessing import Preprocessing

__all__ = [
    "CIFAR10",
    "CropAndColor",
    "Digits",
    "ImageClassificationData",
    "ImageNetFolder",
    "PadCropFlip",
    "Preprocessing",
    "ShiftRotate",
]


def __dir__() -> list[str]:
    return sorted(__all__)
