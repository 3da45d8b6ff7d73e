"""One dataset for all sources: pixels and labels, augmented as a function of (epoch, index)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from swincompress_pl.data.augmentation import Augmentation
from swincompress_pl.data.preprocessing import Preprocessing
from swincompress_pl.data.sampling import EpochIndex, Indices, Purpose, derive_seed, seeded_torch
from swincompress_pl.pictures import PixelArray, in_mode, read_picture

Sample = tuple[Tensor, int]  # (H, W, 3) uint8 pixels, label


class ImageSource(Protocol):
    """Images with labels, by position."""

    @property
    def labels(self) -> Indices:
        """(N,) the class numbers."""
        ...

    def image(self, index: int) -> Image.Image:
        """The image at `index`, with 0 <= index < len(labels)."""
        ...


def decode_image(path: Path) -> Image.Image:
    """The decoded image as RGB; a ValueError names a file that is missing, damaged or cut off."""
    try:
        return in_mode(read_picture(path), "RGB")
    except OSError as error:
        raise ValueError(f"{path}: cannot be decoded as an image ({error}); replace or remove the file.") from error


class FileImages:
    """Images in files, decoded on request.

    The paths are one NumPy array of bytes. A Python list of a million strings would be copied into every worker
    process, page by page, as its reference counts change.
    """

    def __init__(self, root: Path, relative_paths: Sequence[str], labels: Indices) -> None:
        self.root = root
        self.labels = labels
        self._paths: NDArray[np.bytes_] = np.array([os.fsencode(path) for path in relative_paths], dtype=np.bytes_)

    def path(self, index: int) -> Path:
        """The file of the image at `index`."""
        return self.root / os.fsdecode(bytes(self._paths[index]))

    def image(self, index: int) -> Image.Image:
        """The image at `index`; a ValueError names a file that cannot be decoded."""
        return decode_image(self.path(index))


@dataclass(frozen=True)
class MemoryImages:
    """Images held decoded: pixels (N, H, W, 3) uint8, labels (N,)."""

    pixels: PixelArray
    labels: Indices

    def image(self, index: int) -> Image.Image:
        """The image at `index`."""
        return Image.fromarray(self.pixels[index])


class ImageDataset(Dataset[Sample]):
    """A part of a source as uint8 pixels (H, W, 3) and labels.

    Without an augmentation every request gives the pixels of evaluation. With one, a request is
    EpochIndex(epoch, item); a bare index means epoch 0, as Lightning's `overfit_batches` uses it.

    Args:
        source: Images with labels.
        positions: (N,) positions of the images in the source, in the order of this dataset.
        preprocessing: From an image to pixels.
        augmentation: What changes the images; None for nothing.
        seed: Decides, with epoch and item, what the augmentation draws.
    """

    def __init__(
        self,
        source: ImageSource,
        positions: Indices,
        preprocessing: Preprocessing,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.positions = positions
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labels(self) -> Indices:
        """(N,) the class numbers, in the order of the dataset."""
        return self.source.labels[self.positions]

    def __getitem__(self, request: EpochIndex | int) -> Sample:
        epoch, index = request if isinstance(request, EpochIndex) else (0, request)
        position = int(self.positions[index])
        image = self.source.image(position)
        if self.augmentation is None:
            pixels = self.preprocessing.image_to_uint8(image)
        else:
            with seeded_torch(derive_seed(self.seed, Purpose.AUGMENTATION, epoch, index)):
                pixels = self.augmentation.apply(image, self.preprocessing)
        return torch.from_numpy(pixels), int(self.source.labels[position])


@dataclass(frozen=True)
class CollateNormalized:
    """Collates samples to what a network takes: (N, 3, H, W) float32, normalized, and (N,) int64."""

    preprocessing: Preprocessing

    def __call__(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Collates one batch."""
        pixels, labels = collate_uint8(samples)
        return self.preprocessing.normalize(pixels), labels


def collate_uint8(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Collates samples to what the engine takes: (N, H, W, 3) uint8 and (N,) int64."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)
