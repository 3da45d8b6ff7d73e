"""Latency of the pruned networks in torch, in turns with the unpruned one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swincompress_pl.pruning import PruningPlan, apply_plan, count_macs
from swincompress_pl.pruning.prime.config import current_settings
from swincompress_pl.registry import adapter_for
from swincompress_pl.report.latency import Latency, ratio
from swincompress_pl.report.latency import measure as in_turns

from .subjects import INPUT_SHAPE, SUBJECTS, Subject
from .work import where

_WARM_UP_TURNS = 5
_BATCHES = (1, 64)


def measure(subject: str, out: Path, commit: str, *, turns: int = 20) -> dict[str, Any]:
    """Every network of `subject` that a job in `out` sliced; widths decide the time, so which units went does not."""
    networks = {"unpruned": _pruned(SUBJECTS[subject], {})}
    for file in sorted(out.glob(f"{subject}-*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        search = entry.get("search")
        sliced = search and current_settings(search["config"])["granularity"] == "structured" and search["applied"]
        if sliced and not entry["job"]["naive"]:
            networks[entry["job"]["name"]] = _pruned(SUBJECTS[subject], search["applied"]["widths"])
    macs = {name: count_macs(network, INPUT_SHAPE) for name, network in networks.items()}
    rows = []
    for batch in _BATCHES:
        for name, latency in (found := _in_turns(networks, batch, turns)).items():
            (low, high), gain = latency.quartiles_ms, ratio(found["unpruned"], latency)
            rows.append(
                {
                    "name": f"{name}, batch {batch}",
                    "macs_removed": 1 - macs[name] / macs["unpruned"],
                    "milliseconds": f"{latency.median_ms:.2f} [{low:.2f}, {high:.2f}]",
                    "ratio": f"{gain.median:.2f} [{gain.quartiles[0]:.2f}, {gain.quartiles[1]:.2f}]",
                }
            )
    return {"latencies": rows, "where": f"latency: commit {commit}, {where('cpu')}"}


def _pruned(subject: Subject, widths: dict[str, int]) -> nn.Module:
    network = subject.classifier(subject.fine_tuning, 0, trained=True).net.eval()
    groups = adapter_for(network).groups(network)
    units = {group.name: group.units for group in groups}
    gone = {name: range(width, units[name]) for name, width in widths.items()}
    apply_plan(network, PruningPlan.removing(groups, gone))
    return network


@torch.no_grad()
def _in_turns(networks: dict[str, nn.Module], batch: int, turns: int) -> dict[str, Latency]:
    images = torch.randn(batch, *INPUT_SHAPE[1:])
    passes = {name: partial(network, images) for name, network in networks.items()}
    return in_turns(passes, rounds=turns, warm_up=_WARM_UP_TURNS, batch=batch, threads=torch.get_num_threads())
