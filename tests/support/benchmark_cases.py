"""A tiny network in place of the benchmarks' own, with few random images and short fits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import runner
from benchmarks.primesvt import __main__ as main
from benchmarks.primesvt import baselines, latency, report, subjects, work
from benchmarks.pruning import images
from benchmarks.pruning.subjects import Place

ARGUMENTS = {"T": 2, "embed_dims": 32, "depths": [1, 1, 1]}
QUICK = {"rates": (0.1, 0.3), "min_memory_saving": 0.0, "round_to": 1}


def random_splits(*_: Any, holdout: int, seed: int, **__: Any) -> images.Splits:
    rng = np.random.default_rng(seed)

    def some(count: int) -> images.Images:
        return images.Images(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count))

    return images.Splits(some(32), some(40), some(30))


def tiny_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where a tiny network stands for maxformer, the only family, with few images and short fits."""
    recipe = subjects.Recipe(epochs=4, batch_size=4, lr=2e-3, warmup_epochs=0.5)
    tiny = subjects.Subject(
        name="maxformer",
        model="MaxFormer",
        arguments=ARGUMENTS,
        baseline=recipe,
        fine_tuning=replace(recipe, epochs=1),
    )
    for module in (subjects, work, main, latency, report):
        monkeypatch.setattr(module, "SUBJECTS", {"maxformer": tiny})
    for module in (subjects, work, report):
        monkeypatch.setattr(module, "BINARY", {"maxformer": tiny})
    monkeypatch.setattr(subjects, "WEIGHTS", folder)
    monkeypatch.setattr(subjects, "load_splits", random_splits)
    monkeypatch.setattr(baselines, "_WATCHED_IMAGES", 20)
    monkeypatch.setattr(work, "_COMMON", {**work._COMMON, **QUICK})
    return Place(data=folder, cache=folder)


def run_here(jobs: Sequence[Any], folder: Path, settings: dict[str, Any], *, work: str, **_: Any) -> runner.Outcome:
    """In place of `runner.run`: in this process, so that what a test has patched is seen."""
    outcome = runner.Outcome()
    for job in jobs:
        if not runner.result_file(folder, job.name).is_file():
            importlib.import_module(work).do(job, folder, **settings)
            outcome.done.append(job.name)
    return outcome
