"""The engine against torch and onnxruntime on whole spiking networks, dense and pruned, and where its time goes."""

from __future__ import annotations

import bisect
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from swincompress_pl import accel
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.registry import adapter_for
from swincompress_pl.report import describe_environment, program_macs
from swincompress_pl.report.comparison.bench import ENGINE, ratios_to
from swincompress_pl.report.comparison.compare import Progress, Runner, compare
from swincompress_pl.report.comparison.runtimes import prepare

from ..engine.held import WATCH, check
from ..engine.hold_to_avx2 import build_library, hold_to_avx2
from .exact import BUILDERS, built, quantized

PRUNED = "engine, pruned"
_PEERS = ("torch fp32", "onnxruntime fp32")
_SAVING = 0.2668  # of the parameters: the paper's
_ROUND_TO = 8
_BISECTIONS = 5


def measure(
    name: str,
    steps: int,
    *,
    threads: Sequence[int],
    density: float,
    rounds: int,
    turn_ms: float,
    implementation: str | None = None,
    tell: Progress = print,
) -> dict[str, Any]:
    """Batch 1. density: additions that spikes cause, at the least, against all multiplications of the same shapes; the
    biases of the normalizations are raised for it, since some fresh networks make next to no spikes. implementation:
    the engine's; with "avx2", every runtime is held to it."""
    tell(f"{name}: network", 0, 1)
    images = np.random.default_rng(0).integers(0, 256, (1, BUILDERS[name], BUILDERS[name], 3), dtype=np.uint8)
    bias = bias_for(name, steps, density, images)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        dense = _exported(quantized(name, steps, bias=bias), directory / "dense.safetensors", images)
        pruned = _exported(quantized(name, steps, bias=bias, network=_pruned), directory / "pruned.safetensors", images)
        peers = prepare(
            ("torch", "onnxruntime"), origin=dense["origin"], image_shape=images.shape[1:], threads=threads, batch=1,
            directory=directory, on_progress=lambda what: tell(f"{name}: {what}", 0, 1),
        )  # fmt: skip
        hold = _holding(directory) if implementation == "avx2" else None
        races = []
        for count in threads:
            ours = [
                Runner(
                    name=title, runtime="engine", threads=count, batch=1, image_shape=images.shape[1:],
                    file=str(entry["file"]), implementation=implementation,
                )
                for title, entry in ((ENGINE, dense), (PRUNED, pruned))
            ]  # fmt: skip
            others = [peer for peer in peers[count] if peer.name in _PEERS]
            runners = [*ours, *others] if hold is None else [hold(runner) for runner in (*ours, *others)]
            results = compare(runners, rounds=rounds, turn_ms=turn_ms, on_progress=tell)
            races.append(
                {
                    "threads": count,
                    "results": [result.to_dict() for result in results],
                    "times_engine": {key: value.to_dict() for key, value in ratios_to(results[0], results[1:]).items()},
                    "shares": _shares(accel.load(dense["file"], threads=count, implementation=implementation), images),
                }
            )
        ran = accel.load(dense["file"], implementation=implementation).implementation
    keep = ("equal", "macs", "sops", "spike_rate", "parameters", "file_bytes")
    return {
        "network": name,
        "steps": steps,
        "density": density,
        "bias": bias,
        "implementation": ran,
        "dense": {key: dense[key] for key in keep},
        "pruned": {key: pruned[key] for key in keep},
        "races": races,
        "environment": describe_environment(),
    }


def _holding(folder: Path) -> Callable[[Runner], Runner]:
    """What holds a runner to AVX2, or makes it unavailable where that fails."""
    hold, watch = hold_to_avx2(folder), build_library(WATCH, folder)
    return lambda runner: check(runner, hold, watch)[0]


def bias_for(name: str, steps: int, density: float, images: np.ndarray[Any, Any]) -> float:
    """Of the normalizations: 0 where that is enough, else by bisection."""

    def enough(bias: float) -> bool:
        profile = accel.Engine(quantized(name, steps, bias=bias).to_program(), threads=1).profile(images, repeats=1)
        return (profile.sops or 0) >= density * profile.macs

    if enough(0.0):
        return 0.0
    low, high = 0.0, 1.5
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _pruned(name: str, steps: int) -> nn.Module:
    """The network without an equal part of every group's units, a multiple of eight left, by the paper's saving."""
    whole = built(name, steps)
    groups, total = adapter_for(whole).groups(whole), _parameters(whole)

    def without(part: float) -> nn.Module:
        network = built(name, steps)
        gone = {group.name: range(_kept(group.units, part), group.units) for group in groups}
        apply_plan(network, PruningPlan.removing(groups, {key: units for key, units in gone.items() if len(units)}))
        return network

    parts = [float(part) for part in np.arange(0.05, 0.9, 0.01)]
    enough = bisect.bisect_left(parts, _SAVING, key=lambda part: 1 - _parameters(without(part)) / total)
    if enough == len(parts):
        raise ValueError(f"{name}: no equal part of all groups saves {_SAVING:.2%} of the parameters")
    return without(parts[enough])


def _kept(units: int, part: float) -> int:
    if units < 2 * _ROUND_TO:  # heads and the like stay
        return units
    return max(_ROUND_TO, round(units * (1 - part) / _ROUND_TO) * _ROUND_TO)


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _exported(network: QuantizedNetwork, file: Path, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The artifact, and what is known of it; `equal`: integer logits of every implementation are the twin's."""
    accel.export(network, file)
    expected = network.integer_logits(torch.from_numpy(images)).numpy()
    engines = [accel.load(file, threads=2, implementation=each) for each in accel.implementations()]
    profile = engines[0].profile(images, repeats=1)
    rates = [row.spike_rate for row in profile if row.spike_rate is not None]
    program = engines[0].program
    return {
        "file": file,
        "origin": program.origin,
        "equal": all(bool(np.array_equal(engine.run_integer(images), expected)) for engine in engines),
        "macs": program_macs(program),
        "sops": profile.sops,
        "spike_rate": float(np.mean(rates)),
        "parameters": _parameters(network.network),
        "file_bytes": file.stat().st_size,
    }


def _shares(engine: accel.Engine, images: np.ndarray[Any, Any]) -> dict[str, float]:
    """The part of the engine's time that each kind of operation takes."""
    shares: dict[str, float] = defaultdict(float)
    for row in engine.profile(images):
        shares[row.kind] += row.share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
