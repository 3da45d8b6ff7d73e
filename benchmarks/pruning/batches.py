"""Batches made on the device: images stay there as bytes, augmentation is tensor arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional

from swincompress_pl.data.sampling import Purpose, derive_seed

from .images import Images, Splits

Batch = tuple[Tensor, Tensor]  # (N, 3, H, W) float32 normalized, (N,) int64
Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(N, 3, H, W) float32 in [0, 1] -> the same at the size that the network sees."""


class MemoryData(LightningDataModule):
    """`Splits` on `device`; the batches of the test images are for the one report at the end, so no fit sees them.

    size_px: what the network sees, the centre of what is stored. mean, std: for pixels in [0, 1].
    """

    def __init__(
        self,
        splits: Splits,
        *,
        device: str,
        size_px: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.size_px, self.augment, self.batch_size, self.seed = size_px, augment, batch_size, seed
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
        self.parts = {name: _on_device(getattr(splits, name), device) for name in ("train", "holdout", "test")}

    def train_dataloader(self) -> TrainingBatches:
        """Shuffled and augmented, another order in each epoch; an incomplete batch at the end is left out."""
        return TrainingBatches(self)

    def holdout_dataloader(self) -> PlainBatches:
        """The images that decide, in stored order."""
        return self.batches("holdout")

    def calibration_dataloader(self, images: int = 128) -> PlainBatches:
        """Some of the training images, not augmented."""
        order = torch.randperm(self.images("train"), generator=torch.Generator().manual_seed(self.seed))
        return PlainBatches(self, "train", order[:images].split(64))

    def batches(self, split: str, *, batch_size: int = 500) -> PlainBatches:
        """The images of a split in stored order, as evaluation sees them."""
        return PlainBatches(self, split, torch.arange(self.images(split)).split(batch_size))

    def images(self, split: str) -> int:
        """How many there are."""
        return len(self.parts[split][1])

    def normalized(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> what the network takes."""
        return (images - self.mean) / self.std

    def take(self, split: str, positions: Tensor) -> Batch:
        """(N, 3, H, W) float32 in [0, 1] as stored, and the labels."""
        pixels, labels = self.parts[split]
        positions = positions.to(pixels.device)
        return pixels[positions].movedim(-1, 1).float() / 255, labels[positions]

    def plain(self, split: str, positions: Tensor) -> Batch:
        """A batch as evaluation sees it."""
        images, labels = self.take(split, positions)
        edge = (images.shape[-1] - self.size_px) // 2
        return self.normalized(images[..., edge : edge + self.size_px, edge : edge + self.size_px]).contiguous(), labels


class PlainBatches:
    """Batches without augmentation, the same in every pass."""

    def __init__(self, data: MemoryData, split: str, positions: Sequence[Tensor]) -> None:
        self.data, self.split, self.positions = data, split, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.plain(self.split, positions) for positions in self.positions)


class TrainingBatches:
    """One pass is one epoch; order and augmentation are functions of (seed, number of the pass)."""

    def __init__(self, data: MemoryData) -> None:
        self.data = data
        self.epoch = -1

    def __len__(self) -> int:
        return self.data.images("train") // self.data.batch_size

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        data, device = self.data, self.data.parts["train"][0].device
        order = torch.Generator().manual_seed(derive_seed(data.seed, Purpose.ORDER, self.epoch))
        generator = torch.Generator(device).manual_seed(derive_seed(data.seed, Purpose.AUGMENTATION, self.epoch))
        positions = torch.randperm(data.images("train"), generator=order)
        for chunk in positions[: len(self) * data.batch_size].split(data.batch_size):
            images, labels = data.take("train", chunk)
            yield data.normalized(data.augment(images, generator)), labels


def pad_crop_flip(images: Tensor, generator: torch.Generator, *, padding_px: int = 4) -> Tensor:
    """CIFAR's recipe: a black frame, a random crop back to the size, half of the images mirrored."""
    count, _, height, width = images.shape
    device = images.device
    padded = functional.pad(images, [padding_px] * 4)
    top, left = torch.randint(0, 2 * padding_px + 1, (2, count, 1), generator=generator, device=device)
    columns = left + torch.arange(width, device=device)
    mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height, device=device)
    numbers = torch.arange(count, device=device)[:, None, None]
    return padded.movedim(1, -1)[numbers, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def random_resized_crop(
    images: Tensor, generator: torch.Generator, *, size_px: int = 224, area_min: float = 0.35
) -> Tensor:
    """ImageNet's recipe from the stored square: a part of the area, sides of a ratio of 3:4 to 4:3, half mirrored.

    Bilinear: the crops are hardly larger than `size_px`, so nothing aliases.
    """
    area, ratio, x, y, mirrored = _uniform(images, 5, generator)
    scale = (area_min + (1 - area_min) * area).sqrt()
    aspect = torch.exp((2 * ratio - 1) * math.log(4 / 3) / 2)
    width, height = (scale * aspect).clamp(max=1), (scale / aspect).clamp(max=1)
    sign = torch.where(mirrored < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    # the crop's centre lies where the crop stays inside; coordinates run from -1 to 1
    shift_x, shift_y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    return _warped(images, [[sign * width, zero, shift_x], [zero, height, shift_y]], size_px)


def shift_rotate(
    images: Tensor, generator: torch.Generator, *, shift_px: int = 4, rotation_deg: float = 10.0
) -> Tensor:
    """For digits, which must not be mirrored: a small shift and rotation on black."""
    turn, x, y = _uniform(images, 3, generator)
    angle = (2 * turn - 1) * math.radians(rotation_deg)
    shift = 2 * shift_px / images.shape[-1]
    rows = [[angle.cos(), -angle.sin(), (2 * x - 1) * shift], [angle.sin(), angle.cos(), (2 * y - 1) * shift]]
    return _warped(images, rows, images.shape[-1])


def _uniform(images: Tensor, numbers: int, generator: torch.Generator) -> Tensor:
    return torch.rand(numbers, len(images), generator=generator, device=images.device)


def _warped(images: Tensor, rows: list[list[Tensor]], size_px: int) -> Tensor:
    affine = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = functional.affine_grid(affine, [len(images), 3, size_px, size_px], align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def _on_device(images: Images, device: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.pixels).to(device), torch.from_numpy(images.labels).to(device)
