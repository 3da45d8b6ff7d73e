"""What `Engine.tune` brings on the trained networks, whose layers have the densities of spikes that training gave."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import accel
from swincompress_pl.report import describe_environment
from swincompress_pl.report.latency import measure as in_turns
from swincompress_pl.report.latency import ratio

from ..primesvt.subjects import SUBJECTS
from ..pruning.subjects import Place
from .accuracy import quantized

_IMAGES = 32  # of a sample, one after another
_ROUNDS = 15


def measure(name: str, place: Place, *, threads: Sequence[int]) -> dict[str, Any]:
    """A row per implementation but the plain one, and number of threads; times of one image, batch 1."""
    subject = SUBJECTS[name]
    data = subject.data(place, subject.fine_tuning, 0)
    network = quantized(subject.classifier(subject.fine_tuning, 0, trained=True).net, data, "W8A8", rounding="nearest")
    images = network.pixels(next(iter(data.batches("test", batch_size=_IMAGES)))[0]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        file = accel.export(network, Path(folder) / "network.safetensors")
        rows = [
            _row(file, images, Path(folder) / f"{each}-{count}.json", each, count)
            for each in accel.implementations()
            if each != "scalar"
            for count in threads
        ]
    return {"network": name, "tuning": rows, "environment": describe_environment()}


def _row(file: Path, images: npt.NDArray[np.uint8], table: Path, implementation: str, threads: int) -> dict[str, Any]:
    usual, tuned = (accel.load(file, threads=threads, implementation=implementation) for _ in range(2))
    seconds = []
    for _ in range(2):  # measured, then looked up
        start = time.perf_counter()
        chosen = tuned.tune(accel.LayerTimes(table))
        seconds.append(time.perf_counter() - start)
    calls: dict[str, Callable[[], object]] = {
        key: partial(_one_by_one, engine, images) for key, engine in (("usual", usual), ("tuned", tuned))
    }
    times = in_turns(calls, rounds=_ROUNDS, threads=threads)
    gain, profile = ratio(times["usual"], times["tuned"]), usual.profile(images[:1])
    return {
        "implementation": implementation,
        "threads": threads,
        "density": (profile.sops or 0) / profile.macs,
        "usual_ms": times["usual"].median_ms / len(images),
        "tuned_ms": times["tuned"].median_ms / len(images),
        "gain": gain.to_dict(),
        "percents": [each.events_max_percent for each in chosen.values() if each.events_max_percent is not None],
        "measured_s": seconds[0],
        "looked_up_s": seconds[1],
        "equal": bool(np.array_equal(usual.run_integer(images), tuned.run_integer(images))),
    }


def _one_by_one(engine: accel.Engine, images: npt.NDArray[np.uint8]) -> None:
    for number in range(len(images)):
        engine.run_integer(images[number : number + 1])
