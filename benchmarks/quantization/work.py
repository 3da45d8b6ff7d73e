"""One job: a network quantized, every test image through the integers, and what was predicted kept for pairing."""

from __future__ import annotations

import base64
import copy
import json
import os
import resource
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.pruning.images import Images, load_splits, locked
from benchmarks.pruning.subjects import Place, Subject, device_name, subject
from swincompress_pl import accel, spec
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.data.sampling import Purpose, derive_seed
from swincompress_pl.history import history_of
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, collect_gradients, prune
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.report import describe_environment
from swincompress_pl.report.plain import write_text

from .jobs import WAYS, Job
from .tuning import RECIPES, tune

CALIBRATION_IMAGES = 128
REPORTED_TRAIN_IMAGES = 800  # of ImageNet-mini's train, beside val: neither calibrated on nor looked at before
_CHECKED_IMAGES = 64
_BATCH = 50
_SEED = 0
_TOLERANCE_POINTS = 2.0

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A network on its device with its images. calibration: as stored; spare: likewise, neither calibrated on nor
    reported. sets: {name: images} that accuracy is reported on, at the network's size."""

    subject: Subject
    network: nn.Module
    calibration: Images
    spare: Images
    sets: dict[str, Images]
    preprocessing: dict[str, Any]

    def batch(self, pixels: Tensor) -> Tensor:
        """Pixels as the network takes them, on its device."""
        return self.subject.preprocessing.normalize(pixels.to(self.subject.place.device))


def material(
    name: str, pruned: bool, place: Place, *, tuned: bool = False, overrides: dict[str, Any] | None = None
) -> Material:
    """Calibration is drawn from the training images; what is reported is disjoint from it, and for a network that is
    to be fine-tuned, by its recipe with `overrides`, from all training images."""
    what = subject(name, _SEED, place, RECIPES[name] | (overrides or {}) if tuned else None)
    # Nothing is decided on a hold-out here, so none is left out of the training images.
    splits = load_splits(what.data_set, place.data, place.cache, holdout=what.recipe.holdout, seed=_SEED)
    train = Images(
        np.concatenate([splits.train.pixels, splits.holdout.pixels]),
        np.concatenate([splits.train.labels, splits.holdout.labels]),
    )
    order = np.random.default_rng(derive_seed(_SEED, Purpose.CALIBRATION)).permutation(len(train.labels))
    size = what.preprocessing.height
    picked = order[:CALIBRATION_IMAGES]
    spare = order[CALIBRATION_IMAGES + REPORTED_TRAIN_IMAGES :] if name == "deit_tiny" else order[:0]
    sets = {"test": Images(_centre(splits.test.pixels, size), splits.test.labels)}
    if name == "deit_tiny" and not tuned:
        unseen = np.sort(order[CALIBRATION_IMAGES : CALIBRATION_IMAGES + REPORTED_TRAIN_IMAGES])
        sets["train"] = Images(_centre(train.pixels[unseen], size), train.labels[unseen])
    network = what.classifier().net.eval()
    if pruned:
        network = _pruned(what, network)
    return Material(
        subject=what,
        network=network.to(place.device),
        calibration=Images(train.pixels[picked], train.labels[picked]),
        spare=Images(train.pixels[spare], train.labels[spare]),
        sets=sets,
        preprocessing=what.preprocessing.to_dict(),
    )


def _centre(pixels: Pixels, size: int) -> Pixels:
    edge = (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[:, edge : edge + size, edge : edge + size])


def _pruned(what: Subject, network: nn.Module) -> nn.Module:
    """Single weights masked within two points of the hold-out, without training; kept beside the decoded images."""
    file = what.place.cache / f"{what.name}-weights-t{_TOLERANCE_POINTS:g}.safetensors"
    with locked(file):
        if not file.is_file():
            _prune(what, copy.deepcopy(network).to(what.place.device), file)
    with safe_open(file, framework="pt") as opened:
        history = json.loads(opened.metadata()["history"])
    network = restore_from_history(network, history)
    network.load_state_dict(load_file(file))
    return network.eval()


def _prune(what: Subject, network: nn.Module, file: Path) -> None:
    data = what.data()
    config = AdaptivePruningConfig(
        granularity="weight", tolerance=_TOLERANCE_POINTS, ranking="global", criterion="layer_fisher", step=0.1
    )
    prune(
        network,
        HoldOut.from_batches(data.holdout_dataloader()),
        config,
        gradients=lambda net: collect_gradients(net, data.calibration_dataloader(512)),
    )
    tensors = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary, {"history": json.dumps(history_of(network))})
    os.replace(temporary, file)


def do(
    job: Job, folder: Path, place: Place, overrides: dict[str, Any] | None = None, commit: str | None = None
) -> Path:
    """Runs `job` and writes its results into `folder`. overrides: of the recipe of fine-tuning; commit: where the
    source tree cannot tell."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # convolutions have a switch of their own
    given = material(job.network, job.pruned, place, tuned=job.tuned, overrides=overrides)
    do_it = _tuned if job.tuned else _plain if job.way is None else _quantized
    figures = do_it(given, job)
    environment = describe_environment(threads=torch.get_num_threads()) | ({"commit": commit} if commit else {})
    if place.device != "cpu":
        figures["place"] = {"device": device_name(place.device), "precision": place.precision}
    text = json.dumps({"job": job.to_dict(), **figures, "environment": environment}, allow_nan=False)
    return write_text(folder / f"{job.name}.json", text + "\n")


def _plain(given: Material, job: Job) -> dict[str, Any]:
    """The float network as it is."""

    def predict(pixels: Tensor) -> Tensor:
        logits: Tensor = given.network(given.batch(pixels))
        return logits

    parameters = list(given.network.parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.safetensors"
        save_file({key: value.cpu().contiguous() for key, value in given.network.state_dict().items()}, file)
        file_bytes = file.stat().st_size
    return {
        "sets": {name: _answers(images, predict) for name, images in given.sets.items()},
        "file_bytes": file_bytes,
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
    }


def _tuned(given: Material, job: Job) -> dict[str, Any]:
    options = {} if job.way is None else WAYS[job.way]
    network, seconds = tune(given.subject, given.network, job.bits, given.preprocessing, options)
    costs = {"fit_seconds": seconds, "peak_rss_bytes": _peak_rss_bytes(), "recipe": given.subject.recipe.to_dict()}
    if isinstance(network, QuantizedNetwork):
        return costs | _integers(given, network)
    return costs | _plain(replace(given, network=network), job)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _quantized(given: Material, job: Job) -> dict[str, Any]:
    assert job.way is not None
    assert job.bits is not None
    options = dict(WAYS[job.way])
    batches = calibration_batches(given, crops=options.pop("crops", 0), spare=options.pop("spare", False))
    started = time.perf_counter()
    quantized = quantize(
        copy.deepcopy(given.network), batches, bits=job.bits, preprocessing=given.preprocessing,
        calibration_images=sum(len(batch) for batch in batches), **options,
    ).eval()  # fmt: skip
    figures: dict[str, Any] = {
        "quantize_seconds": time.perf_counter() - started,
        "peak_rss_bytes": _peak_rss_bytes(),
        "unsigned": list(quantized.unsigned),
    }
    if quantized.method == "affine":

        def simulate(pixels: Tensor) -> Tensor:
            logits: Tensor = quantized(given.batch(pixels))
            return logits

        return figures | {"sets": {name: _answers(images, simulate) for name, images in given.sets.items()}}
    return figures | _integers(given, quantized)


def calibration_batches(given: Material, *, crops: int, spare: bool = False) -> list[Tensor]:
    """The calibration images as the network takes them, and so many random crops of each; with the spare ones."""
    stored, preprocessing = given.calibration.pixels, given.subject.preprocessing
    if spare:
        stored = np.concatenate([stored, given.spare.pixels])
    generator = torch.Generator().manual_seed(_SEED)
    views = [torch.from_numpy(_centre(stored, preprocessing.height))]
    for _ in range(crops):
        cropped = given.subject.augment(torch.from_numpy(stored).movedim(-1, 1).float() / 255, generator)
        views.append((cropped * 255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1))
    return [batch for view in views for batch in given.batch(view).split(16)]


def _integers(given: Material, quantized: QuantizedNetwork) -> dict[str, Any]:
    """Through the C++ engine where it runs the widths, else through the torch twin; both against the reference."""
    program = quantized.to_program()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for compression in (None, "lzma"):
            file = accel.export(quantized, Path(folder) / f"{compression}.safetensors", compression=compression)
            figures["file_bytes" if compression is None else "compressed_file_bytes"] = file.stat().st_size
    some = given.sets["test"].pixels[:_CHECKED_IMAGES]
    expected = spec.run(program, some)

    def run(pixels: Tensor) -> Tensor:
        logits: Tensor = quantized.integer_logits(pixels.to(given.subject.place.device))
        return logits

    twin = run(torch.from_numpy(some)).cpu().numpy()
    figures["equal"] = {"images": len(some), "twin == reference": bool(np.array_equal(twin, expected))}
    try:
        engine = accel.Engine(program, threads=torch.get_num_threads())
    except spec.ProgramError as error:
        figures["engine"] = str(error)
    else:
        figures["engine"] = engine.implementation
        figures["equal"]["engine == reference"] = bool(np.array_equal(engine.run_integer(some), expected))

        def run(pixels: Tensor) -> Tensor:
            return torch.from_numpy(engine.run_integer(pixels.numpy()))

    return figures | {"sets": {name: _answers(images, run) for name, images in given.sets.items()}}


@torch.no_grad()
def _answers(images: Images, predict: Any) -> dict[str, Any]:
    """The predicted classes, packed (`classes_of` reads them), and how many are right."""
    found = [
        predict(batch).argmax(1).cpu().numpy()
        for batch in track(torch.from_numpy(images.pixels).split(_BATCH), "images", transient=True)
    ]
    classes = np.concatenate(found).astype(np.int16)
    return {
        "images": len(classes),
        "correct": int((classes == images.labels).sum()),
        "classes": _packed(classes),
        "labels": _packed(images.labels.astype(np.int16)),
    }


def _packed(classes: npt.NDArray[np.int16]) -> str:
    return base64.b64encode(zlib.compress(classes.tobytes(), 9)).decode()


def classes_of(entry: dict[str, Any], key: str = "classes") -> npt.NDArray[np.int16]:
    """(images,) what `_answers` kept under "classes" or "labels"."""
    return np.frombuffer(zlib.decompress(base64.b64decode(entry[key])), dtype=np.int16)
