"""Sizes of artifacts in every form, and how long they load, in Python and in C++.

A network is quantized once, and kept as an artifact. It is then written as it is, and with masks by magnitude: without
and with sparse weights, and compressed. Every form has to give the same logits in both languages. Loads take turns, so
that a disturbance meets all of them.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.pruning.subjects import Place
from swincompress_pl import accel, spec
from swincompress_pl.accel import artifact, storage
from swincompress_pl.quant import quantize
from swincompress_pl.report import describe_environment, latency
from swincompress_pl.report.plain import write_text

from .jobs import WAYS, Job
from .work import CALIBRATION_IMAGES, calibration_batches, material

_ROUNDS = 31
_MASKED = 0.54  # of each layer's weights, as of the Swin that `prune` has masked within two points of accuracy
JOBS = [
    Job(network=network, way="searched", bits=bits)
    for network in ("swin_cifar10", "deit_tiny")
    for bits in ("W8A8", "W4A8")
]


def make(job: Job, folder: Path, place: Place) -> Path:
    """The artifact of a job, made where it is not there yet."""
    path = folder / f"{job.name}.safetensors"
    if not path.is_file():
        given = material(job.network, job.pruned, place)
        assert job.bits is not None
        quantized = quantize(
            copy.deepcopy(given.network), calibration_batches(given, crops=0), bits=job.bits,
            preprocessing=given.preprocessing, calibration_images=CALIBRATION_IMAGES, **WAYS[job.way or "max"],
        ).eval()  # fmt: skip
        accel.export(quantized, path)
    return path


def masked(program: spec.Program, share: float) -> spec.Program:
    """The Program with the smallest weights of each layer set to 0: not to be used, but of the size of a pruned one."""
    tensors = dict(program.tensors)
    for key in {op.tensors["weight"] for op in program.operations if "weight" in op.tensors}:
        weight = tensors[key].reshape(-1).copy()
        weight[np.argsort(np.abs(weight.astype(np.int16)), kind="stable")[: round(share * weight.size)]] = 0
        tensors[key] = weight.reshape(tensors[key].shape)
    return replace(program, tensors=tensors)


def write_forms(program: spec.Program, folder: Path) -> dict[str, Path]:
    """{form: file}."""
    folder.mkdir()
    with mock.patch.object(storage, "_SPARSE_GAIN_BYTES", 2**62):
        files = {"packed": accel.export(program, folder / "packed.safetensors")}
    files["plain"] = accel.export(program, folder / "plain.safetensors")
    files["lzma"] = accel.export(program, folder / "lzma.safetensors", compression="lzma")
    return files


def measure(program: spec.Program, reader: Path) -> dict[str, Any]:
    """Sizes and load times of the artifacts of a Program. reader: the program of tests/cpp/read_artifacts.cpp."""
    weights = [program.tensors[op.tensors["weight"]] for op in program.operations if "weight" in op.tensors]
    with tempfile.TemporaryDirectory() as folder:
        files = write_forms(program, Path(folder) / "forms")
        require_same_logits(program, files, reader)
        python_ms, cpp_ms = _python_ms(files), _cpp_ms(files, reader)
        return {
            "weights": sum(weight.size for weight in weights),
            "nonzero": sum(int(np.count_nonzero(weight)) for weight in weights),
            "forms": {
                form: {"file_bytes": file.stat().st_size, "python_ms": python_ms[form], "cpp_ms": cpp_ms[form]}
                for form, file in files.items()
            },
        }


def require_same_logits(program: spec.Program, files: Mapping[str, Path], reader: Path) -> None:
    """Raises a ValueError where a form gives other integers, in Python or in C++."""
    shape = (2, *program.input.value.shape)
    images = (37 * np.arange(np.prod(shape)) + 11).astype(np.uint8).reshape(shape)  # those of the reader
    expected = spec.run(program, images)
    printed = _printed(reader, "logits", files.values())
    for (form, file), line in zip(files.items(), printed, strict=True):
        if not np.array_equal(accel.load(file, threads=1).run_integer(images), expected):
            raise ValueError(f"{file}: Python gives other logits ({form})")
        if line.split() != [str(logit) for logit in expected.ravel()]:
            raise ValueError(f"{file}: C++ gives other logits ({form}): {line[:200]}")


def _python_ms(files: Mapping[str, Path]) -> dict[str, float]:
    loads = {form: partial(accel.load, file, threads=1) for form, file in files.items()}
    found = latency.measure(loads, rounds=_ROUNDS, warm_up=1)
    return {form: round(each.median_ms, 3) for form, each in found.items()}


def _cpp_ms(files: Mapping[str, Path], reader: Path) -> dict[str, float]:
    lines = _printed(reader, "load", files.values())
    return {form: round(int(line) / 1e6, 3) for form, line in zip(files, lines, strict=True)}


def _printed(reader: Path, command: str, files: Any) -> Sequence[str]:
    done = subprocess.run([str(reader), command, *map(str, files)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def write(folder: Path, place: Place, reader: Path, results: Path) -> Path:
    """Measures all JOBS and writes `results`/sizes.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for job in JOBS:
        program = artifact.read(make(job, folder, place))
        for share in (0.0, _MASKED):
            rows.append({"job": job.to_dict(), "masked": share, **measure(masked(program, share), reader)})
    text = json.dumps({"rows": rows, "rounds": _ROUNDS, "environment": describe_environment(threads=1)}, indent=1)
    return write_text(results / "sizes.json", text + "\n")
