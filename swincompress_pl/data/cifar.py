"""CIFAR-10 from torchvision's files or from a folder of images."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import torchvision.datasets

from swincompress_pl.data.augmentation import PadCropFlip
from swincompress_pl.data.dataset import MemoryImages, decode_image
from swincompress_pl.data.module import ImageClassificationData, image_files, require_folder
from swincompress_pl.data.preprocessing import Preprocessing
from swincompress_pl.data.sampling import Indices
from swincompress_pl.files import write_file
from swincompress_pl.progress import with_progress

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_PREPROCESSING = Preprocessing(
    height=32, width=32, resize=None, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
_SIZE_PX = 32
_BATCHES_FOLDER = "cifar-10-batches-py"
_LAYOUT = (
    f"expected <root>/{_BATCHES_FOLDER}/ (torchvision's) or <root>/train|test/<class>/*.jpg with the ten class names."
)

_log = logging.getLogger(__name__)


class CIFAR10(ImageClassificationData):
    """CIFAR-10, held in memory; nothing is downloaded.

    It is read from `<root>/cifar-10-batches-py/` (torchvision's files) if that folder exists, or else from
    `<root>/train/<class>/*.jpg` and `<root>/test/<class>/*.jpg` with the ten class names. After the first decoding, the
    pixels of such folders are kept in one .npz file per split. A file is used again only while names, sizes and times
    of the images are the same. The splits and loaders are those of `ImageClassificationData`.

    Args:
        root: Folder of the data set.
        holdout: Part of the 50,000 training images that is held out for decisions: a number of images (int, 1 or more)
            or a fraction (float in (0, 1)).
        preprocessing: From an image to the network's input; None for 32 x 32 pixels and CIFAR-10's mean and deviation.
        augmentation: What changes training images; None for nothing.
        cache_dir: Folder for the .npz files. Without it they lie in `root`, if that is writable.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Decides order, augmentation, hold-out and calibration sample; 0 or more.

    Raises:
        FileNotFoundError: If `root` or `cache_dir` is missing, or, when the images are first read, a split's folder.
        ValueError: If an argument is outside its range, or, when the images are first read, if a class folder is
            missing or unknown, a file is damaged, or an image is not 32 x 32.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        holdout: int | float = 5000,
        preprocessing: Preprocessing | None = None,
        augmentation: PadCropFlip | None = PadCropFlip(),  # noqa: B008  (frozen)
        cache_dir: str | Path | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            preprocessing=preprocessing or CIFAR10_PREPROCESSING,
            augmentation=augmentation,
            holdout=holdout,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = Path(root)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.class_names = CLASS_NAMES
        require_folder(self.root, "the CIFAR-10 folder", _LAYOUT)
        if self.cache_dir is not None:
            require_folder(self.cache_dir, "cache_dir", "create it, or leave cache_dir out.")

    def _training_source(self) -> MemoryImages:
        return self._load("train")

    def _test_source(self) -> MemoryImages:
        return self._load("test")

    def _load(self, split: str) -> MemoryImages:
        if (self.root / _BATCHES_FOLDER).is_dir():
            return _read_batches(self.root, split)
        folder = self.root / split
        require_folder(folder, f"the {split} images", _LAYOUT)
        return _read_folder(folder, self._cache_file(split))

    def _cache_file(self, split: str) -> Path | None:
        if self.cache_dir is not None:
            return self.cache_dir / f"cifar10_{split}.npz"
        return self.root / f".cifar10_{split}.npz" if os.access(self.root, os.W_OK) else None


def _read_batches(root: Path, split: str) -> MemoryImages:
    try:
        # torchvision compares MD5 sums before it unpickles anything.
        batches = torchvision.datasets.CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(f"{root / _BATCHES_FOLDER}: {error} Unpack the official archive of CIFAR-10 again.") from error
    return MemoryImages(np.ascontiguousarray(batches.data, dtype=np.uint8), np.array(batches.targets, dtype=np.int64))


def _read_folder(folder: Path, cache: Path | None) -> MemoryImages:
    paths, labels = _list_classes(folder)
    fingerprint = _fingerprint(folder, paths)
    if cache is not None and (cached := _read_cache(cache, fingerprint)) is not None:
        return cached
    pixels = np.empty((len(paths), _SIZE_PX, _SIZE_PX, 3), dtype=np.uint8)
    for row, path in enumerate(with_progress(paths, f"decoding {folder}", len(paths))):
        image = decode_image(path)
        if image.size != (_SIZE_PX, _SIZE_PX):
            raise ValueError(
                f"{path}: {image.width} x {image.height} pixels; images of CIFAR-10 have 32 x 32. Resize or remove it."
            )
        pixels[row] = np.asarray(image)
    images = MemoryImages(pixels, labels)
    if cache is not None:
        _write_cache(cache, images, fingerprint)
    return images


def _list_classes(folder: Path) -> tuple[list[Path], Indices]:
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    missing, unknown = sorted(set(CLASS_NAMES) - found), sorted(found - set(CLASS_NAMES))
    if missing or unknown:
        raise ValueError(
            f"{folder}: class folders missing: {missing or 'none'}, unknown: {unknown or 'none'}; {_LAYOUT}"
        )
    by_class = [[folder / name / file for file in image_files(folder / name)] for name in CLASS_NAMES]
    labels = np.repeat(np.arange(len(CLASS_NAMES)), [len(paths) for paths in by_class]).astype(np.int64)
    return [path for paths in by_class for path in paths], labels


def _fingerprint(folder: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str) -> MemoryImages | None:
    if not cache.is_file():
        return None
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                _log.info("%s: the images have changed, decoding them again.", cache)
                return None
            return MemoryImages(stored["pixels"], stored["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s: unreadable (%s), decoding the images again.", cache, error)
        return None


def _write_cache(cache: Path, images: MemoryImages, fingerprint: str) -> None:
    try:
        write_file(
            cache,
            lambda file: np.savez(file, pixels=images.pixels, labels=images.labels, fingerprint=np.array(fingerprint)),
        )
    except OSError as error:  # the cache only saves time, so a full disk must not stop a training
        _log.warning("%s: not written (%s); the images will be decoded again next time.", cache, error)
