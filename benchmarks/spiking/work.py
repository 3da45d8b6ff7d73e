"""One job, from its arguments to its file of results."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from swincompress_pl.report import describe_environment
from swincompress_pl.report.plain import write_text

from ..runner import result_file

# {kind of job: the function that measures it}; modules are imported when they are needed
_MEASURES = {
    "exact": ("exact", "compare"),
    "speed": ("speed", "measure"),
    "accuracy": ("accuracy", "measure"),
    "tuning": ("tuning", "measure"),
    "steps": ("steps", "measure"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """kind: a key of `_MEASURES`; arguments: of its function, by name."""

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)


def do(job: Job, folder: Path, commit: str) -> Path:
    """Runs `job` and writes its results into `folder`."""
    module, function = _MEASURES[job.kind]
    found = getattr(importlib.import_module(f"{__package__}.{module}"), function)(**job.arguments)
    environment = describe_environment()
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "spikingjelly"))
    threads = torch.get_num_threads()
    found |= {
        "commit": commit,
        "where": f"{environment['cpu']} ({', '.join(environment['cpu_flags'])}), {threads} threads, {packages}",
    }
    if found.get("fitted_on", "cpu") != "cpu":
        found["where"] += f"; fine-tuned on {found['fitted_on']}"
    return write_text(result_file(folder, job.name), json.dumps(found))
