"""The committed results, read when a page asks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..pruning import report as pruning_report

Figures = Mapping[str, Any]


class Sources:
    """The JSON files of benchmarks/results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """{job: results}."""
        return self._read("quantization.json")

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Rows of sizes and load times of artifacts, and where they were measured."""
        return self._read("sizes.json")

    @cached_property
    def features(self) -> dict[str, Any] | None:
        """Features in floats and integers, and the time from a JPEG to its class; None where they are not measured."""
        return self._read("features.json") if (self.folder / "features.json").is_file() else None

    @cached_property
    def pruning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(rows and other figures, jobs)."""
        return pruning_report.read(self._existing("pruning.json"))

    @cached_property
    def compensation(self) -> dict[str, Any]:
        """{job: results}."""
        return self._read("compensation.json")

    @cached_property
    def primesvt(self) -> dict[str, Any]:
        """{job: results}."""
        return self._read("primesvt.json")

    @cached_property
    def spiking(self) -> dict[str, Any]:
        """{measurement: results}."""
        return self._read("spiking.json")

    @cached_property
    def interop(self) -> dict[str, Any]:
        """{job: results} of ONNX in other runtimes."""
        return self._read("interop.json")

    @cached_property
    def races(self) -> list[dict[str, Any]]:
        """The races of the engine on Sapphire Rapids, by model and batch."""
        return self._races("sapphire_rapids", "engine-*.json")

    @cached_property
    def quiet_races(self) -> list[dict[str, Any]]:
        """Races of an earlier commit on the same kind of machine, while it was quiet."""
        return self._races("sapphire_rapids", "quiet-*.json")

    @cached_property
    def zen4_races(self) -> list[dict[str, Any]]:
        """Races of the engine on Zen 4."""
        return self._races(".", "engine-*.json")

    @cached_property
    def amx_races(self) -> list[dict[str, Any]]:
        """Races of the engine on Sapphire Rapids with AMX, also against its commit before."""
        return self._races("amx", "engine-*.json")

    @cached_property
    def avx2_races(self) -> list[dict[str, Any]]:
        """Races of the engine, with AVX2 alone, against an earlier commit of it."""
        return self._races("avx2", "engine-*.json")

    @cached_property
    def avx2_peer_races(self) -> list[dict[str, Any]]:
        """Races of the engine, with AVX2 alone, against other runtimes that are held to it."""
        return self._races("avx2", "peers-*.json")

    @cached_property
    def shares(self) -> dict[str, Any]:
        """Which part of the peak whole networks reach."""
        return self._read("shares.json")

    @cached_property
    def batches(self) -> dict[str, Any]:
        """One image per call against several."""
        return self._read("sapphire_rapids/batches.json")

    @cached_property
    def gemm(self) -> dict[str, Any]:
        """Linear layers alone."""
        return self._read("sapphire_rapids/gemm.json")

    def race(self, model: str, batch: int) -> dict[str, Any]:
        """The race of a model on Sapphire Rapids; ValueError where there is none."""
        return pick(self.races, model, batch)

    def _races(self, folder: str, pattern: str) -> list[dict[str, Any]]:
        files = sorted((self.folder / folder).glob(pattern))
        races = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return sorted(races, key=lambda figures: (figures["model"], figures["batch"]))

    def _read(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self._existing(name).read_text(encoding="utf-8")))

    def _existing(self, name: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; pass the folder with the committed results as --results")
        return file


def pick(races: list[dict[str, Any]], model: str, batch: int) -> dict[str, Any]:
    """The race of a model in a batch; ValueError where there is none."""
    for race in races:
        if race["model"] == model and race["batch"] == batch:
            return race
    raise ValueError(f"no race of {model} in batch {batch}; `python -m benchmarks.engine --model {model}` runs one")


def result_of(results: Mapping[str, Any], name: str) -> Any:
    """The results called `name`; ValueError where they are missing."""
    if name not in results:
        raise ValueError(f"the page quotes {name!r}, which the results lack; run that job and report it first")
    return results[name]
