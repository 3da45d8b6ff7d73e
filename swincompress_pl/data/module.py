"""What all data modules of this package share: the splits, their loaders, and what each may be used for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from swincompress_pl.data.augmentation import Augmentation
from swincompress_pl.data.dataset import CollateNormalized, ImageDataset, ImageSource, Sample, collate_uint8
from swincompress_pl.data.preprocessing import Preprocessing
from swincompress_pl.data.sampling import EpochSampler, Indices, Purpose, derive_seed, stratified_sample
from swincompress_pl.pictures import PixelArray

Loader = DataLoader[Sample]
SPLITS = ("train", "holdout", "calibration", "test")


class ImageClassificationData(LightningDataModule):
    """Images in three disjoint parts: train; a hold-out taken from train, for decisions; and test, for the report.

    `val_dataloader` gives the hold-out, because a fit must not look at the reported images every epoch. Loaders yield
    images (N, 3, H, W) float32, normalized, and labels (N,) int64. They need no earlier call of `setup`. Order,
    augmentation, hold-out and calibration sample are functions of `seed`; they do not depend on the number of workers.

    A subclass sets `class_names` and overrides `_training_source` and `_test_source`.

    Args:
        preprocessing: From an image to the network's input.
        augmentation: What changes training images; None for nothing.
        holdout: Part of the training images that is held out: a number of images (int, 1 or more) or a fraction (float
            in (0, 1)).
        batch_size: Images per batch and process, 1 or more.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Decides order, augmentation, hold-out and calibration sample; 0 or more.

    Attributes:
        class_names: Names of the classes in the order of their numbers.

    Raises:
        ValueError: If an argument is outside its range.
    """

    class_names: tuple[str, ...]

    def __init__(
        self,
        *,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None,
        holdout: int | float,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        _check_options(holdout=holdout, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.holdout = holdout
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._sources: dict[str, ImageSource] = {}
        self._parts: tuple[Indices, Indices] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each has images."""
        return len(self.class_names)

    @abstractmethod
    def _training_source(self) -> ImageSource:
        """All images that training may use, including the hold-out."""

    @abstractmethod
    def _test_source(self) -> ImageSource:
        """The images for the report."""

    def setup(self, stage: str | None = None) -> None:
        """Finds the images of a stage, so that errors of the data come early.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all.

        Raises:
            FileNotFoundError: If a folder is missing.
            ValueError: If there are no images, or the hold-out takes all of them.
        """
        if stage != "test":
            self.dataset("train")
        if stage in ("test", None):
            self.dataset("test")

    def dataset(self, split: str, *, augmented: bool = False) -> ImageDataset:
        """Returns a split as a dataset, in stored order.

        Args:
            split: "train", "holdout" or "test".
            augmented: Whether to apply the augmentation.

        Returns:
            A dataset of uint8 pixels (H, W, 3) and labels.

        Raises:
            FileNotFoundError: If the folder of the images is missing.
            ValueError: If the split is unknown or has no images, or the hold-out takes all of train.
        """
        if split not in ("train", "holdout", "test"):
            raise ValueError(f"split is {split!r}; choose from train, holdout, test.")
        source = self._source("test" if split == "test" else "train")
        if split == "test":
            positions = np.arange(len(source.labels))
        else:
            positions = self._train_and_holdout()[0 if split == "train" else 1]
        augmentation = self.augmentation if augmented else None
        return ImageDataset(source, positions, self.preprocessing, augmentation=augmentation, seed=self.seed)

    def train_dataloader(self) -> Loader:
        """Returns train, augmented and shuffled, without an epoch's last incomplete batch (mixup needs even batches).

        Returns:
            A loader of images (N, 3, H, W) float32, normalized, and labels (N,) int64.

        Raises:
            ValueError: If a process has fewer images than `batch_size`.
        """
        dataset = self.dataset("train", augmented=True)
        sampler = EpochSampler(dataset, self.seed)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, but training has {len(sampler)} images per process; "
                f"give at most that many."
            )
        return self._loader(dataset, sampler=sampler, drop_last=True, persistent_workers=self.num_workers > 0)

    def val_dataloader(self) -> Loader:
        """Returns the hold-out, as `holdout_dataloader` does.

        Returns:
            A loader of images (N, 3, H, W) float32, normalized, and labels (N,) int64.
        """
        return self.holdout_dataloader()

    def holdout_dataloader(self) -> Loader:
        """Returns the part of train that is held out for decisions, not augmented, in stored order.

        Returns:
            A loader of images (N, 3, H, W) float32, normalized, and labels (N,) int64.
        """
        return self._loader(self.dataset("holdout"))

    def test_dataloader(self) -> Loader:
        """Returns the official validation or test images, not augmented, in stored order; for the report only.

        Returns:
            A loader of images (N, 3, H, W) float32, normalized, and labels (N,) int64.
        """
        return self._loader(self.dataset("test"))

    def calibration_dataloader(self, images: int = 128) -> Loader:
        """Returns a fixed sample of train, stratified by class, not augmented, in stored order.

        Args:
            images: Number of images; none is of the hold-out.

        Returns:
            A loader of images (N, 3, H, W) float32, normalized, and labels (N,) int64.

        Raises:
            ValueError: If `images` is below 1 or above the size of train.
        """
        return self._loader(self._calibration_dataset(images))

    def uint8_batches(self, split: str, *, images: int = 128) -> Iterator[tuple[PixelArray, NDArray[np.int64]]]:
        """Returns a split as pixels for the integer engine, not augmented, in stored order.

        Args:
            split: "train", "holdout", "calibration" or "test".
            images: Number of images of the calibration sample; other splits ignore it.

        Returns:
            An iterator over pixels (N, H, W, 3) uint8 and labels (N,) int64.

        Raises:
            FileNotFoundError: If the folder of the images is missing.
            ValueError: If the split is unknown or empty, or `images` is below 1 or above the size of train.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose from {', '.join(SPLITS)}.")
        dataset = self._calibration_dataset(images) if split == "calibration" else self.dataset(split)
        return _numpy_batches(self._loader(dataset, collate_fn=collate_uint8))

    def _source(self, name: str) -> ImageSource:
        if name not in self._sources:
            source = self._training_source() if name == "train" else self._test_source()
            if len(source.labels) == 0:
                raise ValueError(
                    f"{type(self).__name__}: the {name} images are empty; check the folder and its layout."
                )
            self._sources[name] = source
        return self._sources[name]

    def _train_and_holdout(self) -> tuple[Indices, Indices]:
        if self._parts is None:
            labels = self._source("train").labels
            held = stratified_sample(labels, self._holdout_count(len(labels)), derive_seed(self.seed, Purpose.HOLDOUT))
            self._parts = np.setdiff1d(np.arange(len(labels)), held), held
        return self._parts

    def _holdout_count(self, images: int) -> int:
        count = self.holdout if isinstance(self.holdout, int) else round(self.holdout * images)
        if not 1 <= count < images:
            raise ValueError(
                f"{type(self).__name__}: holdout={self.holdout} takes {count} of {images} training images; "
                f"it must take at least 1 and leave at least 1."
            )
        return count

    def _calibration_dataset(self, images: int) -> ImageDataset:
        train = self.dataset("train")
        if not 1 <= images <= len(train):
            raise ValueError(
                f"calibration asks for {images} images; training has {len(train)}, give 1 to {len(train)}."
            )
        chosen = stratified_sample(train.labels, images, derive_seed(self.seed, Purpose.CALIBRATION))
        return ImageDataset(train.source, train.positions[chosen], self.preprocessing)

    def _loader(self, dataset: ImageDataset, **options: Any) -> Loader:
        options = {"collate_fn": CollateNormalized(self.preprocessing), **options}
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Without a generator of its own, starting the workers would draw from the global one and change dropout.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )


def _check_options(*, holdout: int | float, batch_size: int, num_workers: int, seed: int) -> None:
    if isinstance(holdout, bool) or not (holdout >= 1 if isinstance(holdout, int) else 0 < holdout < 1):
        raise ValueError(
            f"holdout is {holdout}; give a number of images (an int of at least 1) or a fraction between 0 and 1."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; give 0 (decode in this process) or more.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give 0 or more.")


def _numpy_batches(loader: DataLoader[Any]) -> Iterator[tuple[PixelArray, NDArray[np.int64]]]:
    pixels: Tensor
    labels: Tensor
    for pixels, labels in loader:
        yield pixels.numpy(), labels.numpy()


def require_folder(path: Path, what: str, remedy: str) -> None:
    """Raises FileNotFoundError, naming `path`, unless it is a folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {what} is missing or not a folder; {remedy}")


def image_files(folder: Path, extensions: Sequence[str] = (".jpeg", ".jpg", ".png", ".bmp", ".webp")) -> list[str]:
    """The names of the images in `folder`, sorted; hidden files are ignored, and any other file is an error."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    for name in names:
        if not name.lower().endswith(tuple(extensions)):
            raise ValueError(
                f"{folder / name}: not an image ({', '.join(extensions)}); remove it from the class folder."
            )
    return names
