"""DeiT-Tiny as a feature extractor, in floats and in integers, and the time from a JPEG to its class without torch.

The features of ImageNet-mini's `val` are looked up among those of `train`, which has one image per class. Both forms
get the same pixels, which `accel.Preprocess` makes of the JPEGs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swincompress_pl import accel
from swincompress_pl.data import Preprocessing
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.report import Accuracy, PairedComparison, describe_environment
from swincompress_pl.report.plain import write_text

CALIBRATION_IMAGES = 128
NEAREST = 5
_MODEL = "deit_tiny_patch16_224"
_SIZE = 224
_BATCH = 32
_CHECKED_IMAGES = 16
_TIMED_PICTURES = 20
_PROCESSES = 5
_SEED = 0

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The files of a split, and the wnid of each."""

    files: list[Path]
    classes: list[str]

    @classmethod
    def of(cls, folder: Path) -> Pictures:
        """Those of a tree of folders, one per class."""
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
        return cls(files=files, classes=[file.parent.name for file in files])


def neighbors(queries: Floats, gallery: Floats) -> npt.NDArray[np.int64]:
    """(N, NEAREST) numbers of the features of `gallery` that are nearest to those of `queries` by their cosine."""
    similar = unit(queries) @ unit(gallery).T
    return np.argsort(-similar, axis=1, kind="stable")[:, :NEAREST]


def unit(features: Floats) -> Floats:
    """Features of length 1."""
    scaled: Floats = features / np.linalg.norm(features, axis=1, keepdims=True)
    return scaled


def compare(floats: dict[str, Floats], integers: dict[str, Floats], pictures: dict[str, Pictures]) -> dict[str, Any]:
    """The figures of features {"train": ..., "val": ...} of both forms, (N, channels) each."""
    number = {name: place for place, name in enumerate(sorted({*pictures["train"].classes, *pictures["val"].classes}))}
    known, wanted = (np.array([number[name] for name in pictures[split].classes]) for split in ("train", "val"))
    cosines = (unit(floats["val"]) * unit(integers["val"])).sum(axis=1)
    figures: dict[str, Any] = {
        "images": len(wanted),
        "gallery": len(known),
        "channels": floats["val"].shape[1],
        "cosine": {"mean": float(cosines.mean()), "least": float(cosines.min())},
    }
    nearest = {}
    for form, features in (("float", floats), ("integers", integers)):
        classes = known[neighbors(features["val"], features["train"])]
        nearest[form] = classes[:, 0]
        among = int((classes == wanted[:, None]).any(axis=1).sum())
        figures[form] = {
            "nearest": Accuracy.of(classes[:, 0], wanted).to_dict(),
            f"among_{NEAREST}": Accuracy(correct=among, images=len(wanted)).to_dict(),
        }
    return figures | {"paired": PairedComparison.of(nearest["float"], nearest["integers"], wanted).to_dict()}


def measure(data: Path, cache: Path) -> dict[str, Any]:
    """All figures; `data` as in benchmarks/pruning/images.py, `cache` for the images and the artifacts."""
    pictures = _pictures(data, cache)
    whole: Any = create_model(_MODEL, checkpoint_path=data / f"{_MODEL}.safetensors").eval()
    network: Any = create_model(_MODEL, num_classes=0).eval()
    network.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith("head.")})
    images = Preprocessing(height=_SIZE, width=_SIZE, resize=256)
    order = np.random.default_rng(_SEED).permutation(len(pictures["train"].files))[:CALIBRATION_IMAGES]
    prepare = accel.Preprocess(height=_SIZE, width=_SIZE, resize=256)
    calibration = images.normalize(torch.from_numpy(prepare([pictures["train"].files[number] for number in order])))
    quantized: Any = quantize(
        network, calibration.split(16), preprocessing=images.to_dict(), embeddings=True,
        calibration_images=CALIBRATION_IMAGES,
    ).eval()  # fmt: skip
    artifact = accel.export(quantized, cache / "features.safetensors")
    engine = accel.load(artifact)
    made = accel.Preprocess.of(engine)
    _require_equal(engine, artifact, quantized, made(pictures["val"].files[:_CHECKED_IMAGES]))

    def in_floats(pixels: Pixels) -> Floats:
        with torch.no_grad():
            features: Floats = network(images.normalize(torch.from_numpy(pixels))).numpy()
        return features

    features: dict[str, dict[str, list[Floats]]] = {form: {} for form in ("float", "integers")}
    for split, of_split in pictures.items():
        for pixels in _batches(of_split.files, made):
            for form, run in (("float", in_floats), ("integers", engine)):
                features[form].setdefault(split, []).append(run(pixels))
    joined = {form: {split: np.concatenate(parts) for split, parts in of.items()} for form, of in features.items()}
    figures = compare(joined["float"], joined["integers"], pictures)
    figures |= {"checked_images": _CHECKED_IMAGES, "calibration_images": CALIBRATION_IMAGES}
    return figures | {"jpeg_to_class": _times(whole, calibration, images, pictures, data, cache)}


def _pictures(data: Path, cache: Path) -> dict[str, Pictures]:
    folder = cache / "imagenet_mini"
    if not folder.is_dir():
        with tarfile.open(data / "imagenet_mini.tar") as tar:
            tar.extractall(cache / "extracted", filter="data")
        (cache / "extracted").rename(folder)
    return {split: Pictures.of(next(folder.rglob(split))) for split in ("train", "val")}


def _batches(files: Sequence[Path], prepare: Callable[[list[Path]], Pixels]) -> Iterator[Pixels]:
    for start in range(0, len(files), _BATCH):
        yield prepare([*files[start : start + _BATCH]])


def _require_equal(engine: Any, artifact: Path, quantized: QuantizedNetwork, pixels: Pixels) -> None:
    """Raises a ValueError unless engine, reference and torch twin give the same integers."""
    integers = engine.run_integer(pixels)
    reference = accel.reference(artifact).run_integer(pixels)
    twin = quantized.integer_logits(torch.from_numpy(pixels)).numpy()
    if not (np.array_equal(integers, reference) and np.array_equal(integers, twin)):
        raise ValueError("the engine gives other integers than the reference")


_CHILD = """
import json, sys, time
started = time.perf_counter()
for name in ("torch", "lightning", "timm", "torchvision"):
    sys.modules[name] = None  # importing them fails
from swincompress_pl import accel
imported = time.perf_counter()
engine = accel.load(sys.argv[1], threads=1)
loaded = time.perf_counter()
engine.classify(sys.argv[2])
first = time.perf_counter()
times = []
for file in sys.argv[2:]:
    before = time.perf_counter()
    engine.classify(file)
    times.append(1000 * (time.perf_counter() - before))
parts = {"import_ms": imported - started, "load_ms": loaded - imported, "first_ms": first - loaded}
print(json.dumps({key: 1000 * value for key, value in parts.items()} | {"picture_ms": sorted(times)[len(times) // 2]}))
"""


def _times(
    network: Any, calibration: Tensor, images: Preprocessing, pictures: dict[str, Pictures], data: Path, cache: Path
) -> dict[str, float]:
    """Milliseconds from a JPEG to its class, with one thread in processes without torch; medians over processes."""
    index = json.loads((data / "imagenet_wnid_to_index.json").read_text(encoding="utf-8"))
    names = sorted(index, key=index.get)
    quantized = quantize(network, calibration.split(16), method="max", preprocessing=images.to_dict(), classes=names)
    artifact = str(accel.export(quantized, cache / "classes.safetensors"))
    files = [str(file) for file in pictures["val"].files[:_TIMED_PICTURES]]
    runs = []
    for _ in range(_PROCESSES):
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, artifact, *files], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
    found = {key: round(median(run[key] for run in runs), 1) for key in runs[0]}
    command = [sys.executable, "-m", "swincompress_pl.cli", "classify", artifact, files[0], "--threads", "1"]
    whole = []
    for _ in range(_PROCESSES):
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        whole.append(1000 * (time.perf_counter() - started))
    return found | {"command_ms": round(median(whole), 1), "pictures": _TIMED_PICTURES, "processes": _PROCESSES}


def write(data: Path, cache: Path, results: Path) -> Path:
    """Measures, and writes `results`/features.json."""
    cache.mkdir(parents=True, exist_ok=True)
    figures = measure(data, cache) | {"environment": describe_environment(threads=torch.get_num_threads())}
    return write_text(results / "features.json", json.dumps(figures, indent=1) + "\n")
