"""Races of the engine with other runtimes, as the plots and tables show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swincompress_pl.report.comparison.bench import ENGINE

from ..engine.measure import NARROW

Figures = Mapping[str, Any]
NAMES = {
    ENGINE: "swincompress_pl",
    NARROW: "swincompress_pl, 7-bit weights",
    "openvino int8 (nncf)": "OpenVINO int8 (NNCF)",
    "openvino fp32": "OpenVINO fp32",
    "onnxruntime static int8 (QDQ)": "onnxruntime static int8 (QDQ)",
}
_SHORT = {
    "onnxruntime static int8 (QDQ)": "onnxruntime static int8",
    "openvino int8 (nncf)": "OpenVINO int8",
}


def shown(name: str, *, short: bool = False) -> str:
    """A runtime's name in a text, or shorter in a plot."""
    return _SHORT.get(name, NAMES.get(name, name)) if short else NAMES.get(name, name)


def on_threads(figures: Figures, threads: int) -> Figures:
    """The race with a number of threads; ValueError where there is none."""
    for race in figures["races"]:
        if race["threads"] == threads:
            return dict(race)
    raise ValueError(f"{figures['model']}, batch {figures['batch']}: no race with {threads} thread(s)")


def by_time(race: Figures) -> list[str]:
    """The runtimes that were measured, the engine first and then from the quickest to the slowest."""
    measured = {result["name"]: result for result in race["results"] if result["latency"]}
    return sorted(measured, key=lambda name: (name != ENGINE, measured[name]["latency"]["median_ms"]))


def result(race: Figures, name: str) -> Figures:
    """The measurements of a runtime."""
    return next(each for each in race["results"] if each["name"] == name)


def median_ms(race: Figures, name: str) -> float:
    """A runtime's median."""
    return float(result(race, name)["latency"]["median_ms"])


def times(race: Figures, name: str) -> float:
    """How many times longer than the engine a runtime took, the median of the rounds."""
    return float(race["times_engine"][name]["median"])


def time_cell(race: Figures, name: str) -> str:
    """ "43.4 (1.38x)"; the engine's without the bracket; "-" where it was not measured."""
    if name not in {each["name"] for each in race["results"] if each["latency"]}:
        return "-"
    ms = f"{median_ms(race, name):.1f}"
    return ms if name == ENGINE else f"{ms} ({times(race, name):.2f}x)"
