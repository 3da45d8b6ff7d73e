"""Latency of every runtime relative to the engine's, as an SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swincompress_pl.report.comparison.bench import ENGINE
from swincompress_pl.report.plots.drawing import BASE, BETWEEN, EDGE, LAST, finished, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2
_COLOURS = (BETWEEN, LAST, BASE, EDGE)  # one for each number of threads


def draw(races: Sequence[Mapping[str, Any]]) -> str:
    """races: figures of `engine-*.json`. A panel for each, a group of bars for each runtime, one for each number of
    threads."""
    columns = min(_COLUMNS, len(races))
    rows = math.ceil(len(races) / columns)
    runtimes = max(len(figures["races"][0]["results"]) for figures in races)
    with style():
        figure = new_figure(6.2 * columns, rows * (1.1 + 0.36 * runtimes))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, figures in zip(panels, races, strict=False):
            _panel(axes, figures)
        for axes in panels[len(races) :]:
            axes.set_axis_off()
        buffer = io.StringIO()
        finished(figure).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _panel(axes: Axes, figures: Mapping[str, Any]) -> None:
    races = figures["races"]
    names = _slowest_first(races)
    height = 0.8 / len(races)
    longest = 1.0
    for number, race in enumerate(races):
        latencies, times = {result["name"]: result["latency"] for result in race["results"]}, _times(race)
        places = [place + (number - (len(races) - 1) / 2) * height for place in range(len(names))]
        lengths = [times.get(name, 0.0) for name in names]
        label = f"{race['threads']} thread{'s' if race['threads'] > 1 else ''}"
        axes.barh(places, lengths, height * 0.92, color=_COLOURS[number % len(_COLOURS)], label=label)
        for place, name, length in zip(places, names, lengths, strict=True):
            text = f" {_milliseconds(latencies[name]['median_ms'])}" if name in times else " not measured"
            axes.text(length, place, text, va="center", fontsize=7)
        longest = max(longest, *lengths)
    axes.axvline(1.0, color=EDGE, linewidth=0.8, zorder=0)
    axes.set_xlim(0, longest * 1.18)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("time relative to the engine's")
    axes.set_title(f"{figures['model']}, batch {figures['batch']}")
    axes.legend(loc="lower right", fontsize=8)  # beside the engine's bars, which are the short ones


def _slowest_first(races: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runtimes from the slowest to the engine in the first race; those that were not measured come first."""
    times = _times(races[0])
    names = [result["name"] for result in races[0]["results"]]
    return sorted(names, key=lambda name: (name == ENGINE, -times.get(name, math.inf)))


def _times(race: Mapping[str, Any]) -> dict[str, float]:
    """{runtime: its time / the engine's} of those that were measured."""
    measured = {result["name"] for result in race["results"] if result["latency"]}
    ours = {ENGINE: 1.0} if ENGINE in measured else {}
    return {name: entry["median"] for name, entry in race["times_engine"].items()} | ours


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
