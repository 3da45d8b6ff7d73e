"""How long a step of quantization-aware training takes beside one of float training, on the trained networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.report import describe_environment
from swincompress_pl.report.latency import measure as in_turns
from swincompress_pl.report.latency import ratio

from ..primesvt.subjects import SUBJECTS
from ..pruning.subjects import Place
from .accuracy import quantized

_BATCH = 128
_ROUNDS = 7


def measure(name: str, place: Place, *, threads: int) -> dict[str, Any]:
    """Forward and backward pass and AdamW's step on one batch, W8A8 and float in turns in one process."""
    torch.set_num_threads(threads)
    subject = SUBJECTS[name]
    data = subject.data(place, subject.fine_tuning, 0)
    network = subject.classifier(subject.fine_tuning, 0, trained=True).net
    networks: dict[str, nn.Module] = {
        "float": network.train(),
        "quantized": quantized(copy.deepcopy(network), data, "W8A8", rounding="nearest").train(),
    }
    images, labels = next(iter(data.batches("train", batch_size=_BATCH)))
    calls: dict[str, Callable[[], object]] = {
        key: partial(_step, each, torch.optim.AdamW(each.parameters(), lr=1e-5), images, labels)
        for key, each in networks.items()
    }
    times = in_turns(calls, rounds=_ROUNDS, threads=threads)
    return {
        "network": name,
        "batch": _BATCH,
        "threads": threads,
        "step_ms": {key: latency.to_dict() for key, latency in times.items()},
        "times_float": ratio(times["quantized"], times["float"]).to_dict(),
        "environment": describe_environment(),
    }


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
