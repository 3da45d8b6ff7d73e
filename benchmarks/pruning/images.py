"""The images of a data set in memory: decoded once by all cores into one file, whatever its form on disk.

A data folder holds each set as a folder or as the archive that it came in:

    cifar10/train|test/<class>/*.jpg              or cifar10_jpeg.tar.xz
    imagenet_mini/train|val/<wnid>/*.jpg          or imagenet_mini.tar, and imagenet_wnid_to_index.json

The digits come with scikit-learn.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swincompress_pl.data import Digits, Preprocessing
from swincompress_pl.data.cifar import CIFAR10_PREPROCESSING, CLASS_NAMES
from swincompress_pl.data.sampling import Purpose, derive_seed, stratified_sample

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

_WORTH_A_POOL = 500  # images; processes take seconds to start
IMAGENET_SIDE_PX = 256  # of the kept square; networks see 224 of it


@dataclass(frozen=True)
class Images:
    """pixels (N, H, W, 3) uint8, labels (N,) int64."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True)
class Splits:
    """train; a hold-out taken from it, where decisions are made; test, which is reported and decides nothing."""

    train: Images
    holdout: Images
    test: Images


@dataclass(frozen=True)
class _Source:
    folder: str
    archive: str
    test_split: str
    preprocessing: Preprocessing


_SOURCES = {
    "cifar10": _Source("cifar10", "cifar10_jpeg.tar.xz", "test", CIFAR10_PREPROCESSING),
    "imagenet_mini": _Source(
        "imagenet_mini",
        "imagenet_mini.tar",
        "val",
        Preprocessing(height=IMAGENET_SIDE_PX, width=IMAGENET_SIDE_PX, resize=IMAGENET_SIDE_PX),
    ),
}


def load_splits(name: str, data: Path, cache: Path, *, holdout: int, seed: int) -> Splits:
    """The images of "cifar10", "imagenet_mini" or "digits"; `seed` decides which `holdout` images are held out, with
    the classes in proportion, and for the digits, which have no official test images, the test split too."""
    if name == "digits":
        digits = Digits(seed=seed, holdout=holdout)
        parts = [digits.dataset(split) for split in ("train", "holdout", "test")]
        return Splits(
            *(Images(np.stack([part[i][0].numpy() for i in range(len(part))]), part.labels) for part in parts)
        )
    with np.load(prepare(name, data, cache), allow_pickle=False) as stored:
        pixels, labels = stored["train_pixels"], stored["train_labels"]
        test = Images(stored["test_pixels"], stored["test_labels"])
    held = stratified_sample(labels, holdout, derive_seed(seed, Purpose.HOLDOUT))
    rest = np.setdiff1d(np.arange(len(labels)), held)
    return Splits(Images(pixels[rest], labels[rest]), Images(pixels[held], labels[held]), test)


def prepare(name: str, data: Path, cache: Path) -> Path:
    """The file with the decoded images of a set, made if it is not there; several processes may ask at once."""
    file = cache / f"{name}.npz"
    with locked(file):
        if not file.is_file():
            temporary = cache / f"{name}.tmp.npz"
            np.savez(temporary, **_decode(_SOURCES[name], data))
            os.replace(temporary, file)
    return file


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time works on `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _decode(source: _Source, data: Path) -> dict[str, Any]:
    encoded = dict(sorted(_files(source, data)))
    numbers = _class_numbers(source, data)
    decode = partial(_pixels, preprocessing=source.preprocessing)
    if len(encoded) < _WORTH_A_POOL:
        pixels = np.stack([decode(file) for file in encoded.values()])
    else:
        with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
            pixels = np.stack(pool.map(decode, encoded.values(), chunksize=64))
    splits = np.array([path.split("/")[0] for path in encoded])
    labels = np.array([numbers[path.split("/")[1]] for path in encoded], dtype=np.int64)
    arrays: dict[str, NDArray[Any]] = {}
    for name, folder in (("train", "train"), ("test", source.test_split)):
        arrays |= {f"{name}_pixels": pixels[splits == folder], f"{name}_labels": labels[splits == folder]}
    return arrays


def _files(source: _Source, data: Path) -> Iterator[tuple[str, bytes]]:
    """(split/class/name, the file's bytes), in any order."""
    folder, archive = data / source.folder, data / source.archive
    if folder.is_dir():
        for path in folder.glob("*/*/*.jpg"):
            yield path.relative_to(folder).as_posix(), path.read_bytes()
    elif archive.is_file():
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".jpg"):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield member.name.removeprefix("./"), content.read()
    else:
        raise FileNotFoundError(f"neither {folder} nor {archive} is there; give --data the folder that holds one")


def _class_numbers(source: _Source, data: Path) -> dict[str, int]:
    if source.folder == "cifar10":
        return {name: number for number, name in enumerate(CLASS_NAMES)}
    # By the index, never by the sorted folders: only some of the 1,000 classes have one.
    return dict(json.loads((data / "imagenet_wnid_to_index.json").read_text(encoding="utf-8")))


def _pixels(encoded: bytes, preprocessing: Preprocessing) -> Pixels:
    with Image.open(io.BytesIO(encoded)) as image:
        return preprocessing.image_to_uint8(image)
