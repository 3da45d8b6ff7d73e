"""A network with random weights, its artifact, and races of the engine with its peers on both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl.progress import progress_bar
from swincompress_pl.report import describe_environment, program_macs
from swincompress_pl.report.comparison.bench import ENGINE, ratios_to
from swincompress_pl.report.comparison.compare import Progress, Result, Runner, compare
from swincompress_pl.report.comparison.runtimes import prepare
from swincompress_pl.report.comparison.worker import PIXEL_MEAN, PIXEL_STD, SEED
from swincompress_pl.spec import Program

BEFORE = "engine before"
NARROW = "engine, 7-bit weights"
FLOATS = ("torch fp32", "onnxruntime fp32", "openvino fp32")  # the first in a race is the float network
_CALIBRATION_IMAGES = 4
Check = Callable[[Runner], tuple[Runner, dict[str, Any]]]


def measure_model(
    model: str,
    *,
    against: Sequence[str],
    batches: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    turn_ms: float,
    images_checked: int,
    implementation: str | None = None,
    before: Path | None = None,
    narrow: bool = False,
    check: Check | None = None,
) -> Iterator[dict[str, Any]]:
    """The figures of a model with random weights, one batch after the other; for the arguments see `race_all`."""
    from swincompress_pl import accel

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.safetensors"
        with progress_bar() as tell:
            tell(f"quantizing {model}", 0, 1)
            program = export_random(model, file)
            narrow_file = Path(directory) / "narrow.safetensors" if narrow else None
            if narrow_file is not None:
                export_random(model, narrow_file, "W7A8")
            tell("checking engine against reference", 0, 1)
            equal = all(answers_equal(each, images_checked) for each in (file, narrow_file) if each is not None)
        for batch in batches:
            with progress_bar() as tell, tempfile.TemporaryDirectory(dir=directory) as files:
                races = race_all(
                    against, program, file, batch=batch, threads=threads, rounds=rounds, turn_ms=turn_ms,
                    directory=Path(files), tell=tell, implementation=implementation, before=before, narrow=narrow_file,
                    check=check,
                )  # fmt: skip
            yield {
                "model": model,
                "weights": "random",
                "macs": program_macs(program),
                "file_bytes": file.stat().st_size,
                "batch": batch,
                "implementation": implementation or accel.implementations()[0],
                "answers": {"images": images_checked, "equal_to_reference": equal},
                "races": races,
                "environment": describe_environment(),
            }


def export_random(model: str, file: Path, bits: str = "W8A8") -> Program:
    """An artifact of `model` with random weights, those that its peers draw too, calibrated on random images."""
    import torch

    from swincompress_pl import accel, models, quant

    torch.manual_seed(SEED)
    network = models.create_model(model).eval()
    channels, height, width = network.pretrained_cfg["input_size"]  # type: ignore[index]
    images = (torch.rand(_CALIBRATION_IMAGES, channels, height, width) - PIXEL_MEAN) / PIXEL_STD
    preprocessing = {"mean": (PIXEL_MEAN,) * channels, "std": (PIXEL_STD,) * channels}
    quantized = quant.quantize(network, [images], method="max", bits=bits, preprocessing=preprocessing)
    accel.export(quantized, file)
    return accel.reference(file).program


def answers_equal(file: Path, images: int) -> bool:
    """Whether every implementation that this CPU has gives the reference's integers on random images."""
    from swincompress_pl import accel

    reference = accel.reference(file)
    pixels = np.random.default_rng(0).integers(0, 256, (images, *reference.input_shape), dtype=np.uint8)
    expected = reference.run_integer(pixels)
    engines = (accel.load(file, implementation=name) for name in accel.implementations())
    return all(bool(np.array_equal(engine.run_integer(pixels), expected)) for engine in engines)


def race_all(
    against: Sequence[str],
    program: Program,
    file: Path,
    *,
    batch: int,
    threads: Sequence[int],
    rounds: int,
    turn_ms: float,
    directory: Path,
    tell: Progress,
    implementation: str | None = None,
    before: Path | None = None,
    narrow: Path | None = None,
    check: Check | None = None,
) -> list[dict[str, Any]]:
    """One race for every number of threads, as JSON types; directory: for the files that peers read; implementation: of
    the engine, None for the best; before: a checkout of another commit, with its engine built, that joins in; narrow:
    the artifact with 7-bit weights, if it joins in; check: changes a runner before the race, and says what it found."""
    shape = program.input.value.shape
    peers = prepare(
        against, origin=program.origin, image_shape=shape, threads=threads, batch=batch, directory=directory,
        on_progress=lambda what: tell(what, 0, 1),
    )  # fmt: skip
    races = []
    for number in threads:
        ours = Runner(
            name=ENGINE, runtime="engine", threads=number, batch=batch, image_shape=shape, file=str(file),
            implementation=implementation,
        )  # fmt: skip
        earlier = [] if before is None else [replace(ours, name=BEFORE, checkout=before)]
        narrower = [] if narrow is None else [replace(ours, name=NARROW, file=str(narrow))]
        runners, checks = _checked([ours, *narrower, *earlier, *peers[number]], check, tell)
        results = compare(runners, rounds=rounds, turn_ms=turn_ms, on_progress=tell)
        races.append({"threads": number, **_race(results), **({"checks": checks} if check else {})})
    return races


def _checked(
    runners: Sequence[Runner], check: Check | None, tell: Progress
) -> tuple[list[Runner], list[dict[str, Any]]]:
    if check is None:
        return list(runners), []
    found = []
    for number, runner in enumerate(runners):
        tell(f"checking {runner.name}", number, len(runners))
        found.append(check(runner))
    return [runner for runner, _ in found], [facts for _, facts in found]


def _race(results: Sequence[Result]) -> dict[str, Any]:
    """The results as JSON types, with how alike their answers are."""
    real = next((result for result in results if result.name in FLOATS and result.logits is not None), None)
    ratios = ratios_to(results[0], results[1:])
    return {
        "results": [
            result.to_dict()
            | {"agreement": _agreement(results[0], result), "float_agreement": _agreement(real, result)}
            for result in results
        ],
        "times_engine": {name: value.to_dict() for name, value in ratios.items()},
    }


def _agreement(one: Result | None, other: Result) -> dict[str, Any] | None:
    if one is None or one.logits is None or other.logits is None or one.name == other.name:
        return None
    return agreement(one.logits, other.logits)


def agreement(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> dict[str, Any] | None:
    """How alike two runtimes' logits, (images, classes), are; None where they differ in shape or are not finite.

    correlation: the lowest of all images of Pearson's between the logits over the classes: centred, since what all
    classes have in common decides nothing; None where logits do not vary. same_top1: images with the same best class.
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    a, b = (
        logits.astype(np.float64) - logits.mean(axis=1, keepdims=True, dtype=np.float64) for logits in (ours, theirs)
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    correlation = float(((a * b).sum(axis=1) / norms).min()) if norms.all() else None
    same = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    return {"correlation": correlation, "same_top1": same, "images": len(ours)}
