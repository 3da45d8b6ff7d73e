"""One job, from its name to its file of results."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swincompress_pl.report import describe_environment

from ..runner import read_result
from .jobs import Job, write_result
from .overhead import overhead
from .peers import peer
from .scoring import scoring
from .subjects import Place, Subject, device_name, subject
from .training import control, fingerprint, prune_alone, prune_with_recovery


def do(job: Job, folder: Path, place: Place, overrides: dict[str, Any], commit: str | None = None) -> Path:
    """Runs `job` and writes its results into `folder`. commit: where the source tree cannot tell."""
    torch.set_float32_matmul_precision("high")  # for training on a GPU; accuracies are taken with "highest"
    started = time.perf_counter()
    what = subject(job.model, job.seed, place, overrides)
    figures = _figures(job, what, folder)
    environment = describe_environment(threads=torch.get_num_threads())
    figures |= {
        "recipe": what.recipe.to_dict(),
        "overrides": overrides,
        "test_data": what.test_data,
        "weights": fingerprint(what.weights),
        "place": {"device": device_name(place.device), "precision": place.precision},
        "environment": environment | ({"commit": commit} if commit else {}),
        "total_seconds": time.perf_counter() - started,
    }
    return write_result(folder, job, figures)


def _figures(job: Job, what: Subject, folder: Path) -> dict[str, Any]:
    if job.kind == "control":
        return control(what, job)
    if job.kind == "prune":
        return (prune_with_recovery if job.recovery else prune_alone)(what, job)
    if job.kind == "peer":
        assert job.reference is not None
        return peer(what, job, read_result(folder, job.reference))
    if job.kind == "scoring":
        return scoring(what, job)
    if job.kind == "overhead":
        return overhead(what, job)
    raise ValueError(f"unknown kind of job: {asdict(job)}")
