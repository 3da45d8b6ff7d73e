"""ImageNet, or images of your own, as folders: train/<class>/ and val/<class>/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from swincompress_pl.data.augmentation import CropAndColor
from swincompress_pl.data.dataset import FileImages
from swincompress_pl.data.module import ImageClassificationData, image_files, require_folder
from swincompress_pl.data.preprocessing import Preprocessing
from swincompress_pl.progress import with_progress

_LAYOUT = (
    "expected <root>/train/<class>/*.jpg and <root>/val/<class>/*.jpg, where the folders of classes are ImageNet's "
    "wnids or have names of your own."
)


class ImageNetFolder(ImageClassificationData):
    """ImageNet-1K, a part of it, or images of your own, from `<root>/train/<class>/` and `<root>/val/<class>/`.

    The test split is val. If the folders are ImageNet's wnids, a class has its official number (0 to 999, in timm's
    order) even if folders of other classes are missing. If none of them is a wnid, the classes are the folders of
    train, in the order of their names as in torchvision's ImageFolder. Hidden files are ignored. The splits and loaders
    are those of `ImageClassificationData`.

    Args:
        root: Folder of the data set.
        holdout: Part of the training images that is held out for decisions: a number of images (int, 1 or more) or a
            fraction (float in (0, 1)).
        preprocessing: From an image to the network's input; None for a resize to 256, a center crop of 224 x 224 pixels
            and ImageNet's mean and deviation. `Preprocessing(**models.preprocessing_for(network))` is that of a network
            of timm.
        augmentation: What changes training images; None for nothing.
        class_index: JSON file {folder: number} with the numbers 0 to n - 1; None for the official one of wnids, or the
            order of the names.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Decides order, augmentation, hold-out and calibration sample; 0 or more.

    Raises:
        FileNotFoundError: If `root` or `class_index` is missing, or, when the images are first read, a split's folder.
        ValueError: If an argument is outside its range or `class_index` is not an index, or, when the images are first
            read, if a folder is not a known class or a file in it is not an image.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        holdout: int | float = 0.02,
        preprocessing: Preprocessing | None = None,
        augmentation: CropAndColor | None = CropAndColor(),  # noqa: B008  (frozen)
        class_index: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            preprocessing=preprocessing or Preprocessing(height=224, width=224, resize=256),
            augmentation=augmentation,
            holdout=holdout,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = Path(root)
        require_folder(self.root, "the ImageNet folder", _LAYOUT)
        if class_index is not None:
            self.class_index = read_class_index(Path(class_index))
        else:
            own = _own_classes(self.root / "train")
            self.class_index = official_class_index() if own is None else {name: at for at, name in enumerate(own)}
        official = class_index is None and self.class_index == official_class_index()
        names = sorted(self.class_index, key=self.class_index.__getitem__)
        self.class_names = official_class_names() if official else tuple(names)

    def _training_source(self) -> FileImages:
        return self._scan("train")

    def _test_source(self) -> FileImages:
        return self._scan("val")

    def _scan(self, folder: str) -> FileImages:
        root = self.root / folder
        require_folder(root, f"the {folder} images", _LAYOUT)
        names = _folders(root)
        unknown = [name for name in names if name not in self.class_index]
        if unknown:
            raise ValueError(self._unknown(root, unknown))
        paths: list[str] = []
        labels: list[int] = []
        for name in with_progress(names, f"listing {root}", len(names)):
            files = image_files(root / name)
            paths += [f"{name}/{file}" for file in files]
            labels += [self.class_index[name]] * len(files)
        return FileImages(root, paths, np.array(labels, dtype=np.int64))

    def _unknown(self, root: Path, unknown: list[str]) -> str:
        if self.class_index == official_class_index():
            known, remedy = "the 1,000 wnids of ImageNet", "pass class_index, a JSON file folder -> number"
        else:
            listed = sorted(self.class_index)
            known = ", ".join(listed[:5]) + (f" and {len(listed) - 5} others" if len(listed) > 5 else "")
            remedy = f"add {unknown[0]!r} to train or class_index"
        return (
            f"{root / unknown[0]}: {unknown[0]!r} is not a class of the index ({len(unknown)} such folders); the "
            f"classes are {known}. Rename or remove it, or {remedy}."
        )


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _own_classes(train: Path) -> list[str] | None:
    """The names of the classes if none of them is a wnid; None if one is, so that the others are mistakes."""
    names = _folders(train) if train.is_dir() else []
    return names if names and official_class_index().keys().isdisjoint(names) else None


def official_class_index() -> dict[str, int]:
    """{wnid: 0 to 999} in the order of ILSVRC 2012, which timm's weights use."""
    return {wnid: number for number, wnid in enumerate(_imagenet_info().label_names())}


def official_class_names() -> tuple[str, ...]:
    """A description of each class 0 to 999, e.g. "tench, Tinca tinca"."""
    info = _imagenet_info()
    return tuple(info.index_to_description(number) for number in range(info.num_classes()))


def _imagenet_info() -> Any:
    # Imported on use, as the other data sets do not need timm. Any, as its methods are not annotated.
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo()


def read_class_index(path: Path) -> dict[str, int]:
    """Reads a JSON file {wnid: number}; a ValueError unless the numbers are 0 to n - 1, each once."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the class index is missing; give a JSON file wnid -> number.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected an object wnid -> number.") from error
    numbers = list(index.values()) if isinstance(index, dict) else []
    if (
        not numbers
        or any(type(number) is not int for number in numbers)
        or sorted(numbers) != list(range(len(numbers)))
    ):
        raise ValueError(
            f"{path}: not a class index; expected an object wnid -> number with the numbers 0..n-1, each once."
        )
    return dict(index)
