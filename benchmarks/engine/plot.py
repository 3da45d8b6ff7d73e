"""Latency of every runtime relative to the engine's, as an SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swincompress_pl.report.bench import ENGINE
from swincompress_pl.report.drawing import BASE, BETWEEN, EDGE, LAST, finished, new_figure, style

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
    names = [result["name"] for result in races[0]["results"]]
    height = 0.8 / len(races)
    longest = 1.0
    for number, race in enumerate(races):
        found = {result["name"]: result["latency"] for result in race["results"]}
        times = {name: entry["median"] for name, entry in race["times_engine"].items()}
        times |= {ENGINE: 1.0} if found[ENGINE] else {}
        places = [place + (number - (len(races) - 1) / 2) * height for place in range(len(names))]
        colour = _COLOURS[number % len(_COLOURS)]
        lengths = [times.get(name, 0.0) for name in names]
        axes.barh(places, lengths, height * 0.92, color=colour, label=f"{race['threads']} thread(s)")
        for place, name in zip(places, names, strict=True):
            text = f" {found[name]['median_ms']:.3g} ms" if name in times else " not measured"
            axes.text(times.get(name, 0.0), place, text, va="center", fontsize=7)
        longest = max(longest, *lengths)
    axes.axvline(1.0, color=EDGE, linewidth=0.8, zorder=0)
    axes.set_xlim(0, longest * 1.18)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("time relative to the engine's")
    axes.set_title(f"{figures['model']}, batch {figures['batch']}")
    axes.legend(loc="lower right", fontsize=8)
