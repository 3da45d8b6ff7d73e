"""Plots in light and in dark, as SVG files that are the same for the same figures and version of matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swincompress_pl.report.plots.drawing import finished, new_figure, style

from .sources import Sources


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colors on a page of one scheme; the background is the page's. ours stands out from the others."""

    name: str
    ink: str
    muted: str
    grid: str
    ours: str
    second: str
    others: str


LIGHT = Theme(
    name="light", ink="#1f2733", muted="#5b6673", grid="#d9dee4", ours="#1f6fb2", second="#c8553d", others="#a9b4bf"
)
DARK = Theme(
    name="dark", ink="#e6eaef", muted="#a3adb9", grid="#3a424d", ours="#5aa9e6", second="#f08a6c", others="#66717f"
)
THEMES = (LIGHT, DARK)
Drawing = Callable[[Sources, Theme], Figure]


def svg(draw: Drawing, sources: Sources, theme: Theme) -> str:
    """The drawing as an SVG file with a transparent background."""
    buffer = io.StringIO()
    with _style(theme):
        # The creator stays in the file: another version of matplotlib may draw the same figures otherwise.
        finished(draw(sources, theme)).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # Verdana has the widths of DejaVu Sans, for systems without it. matplotlib leaves blanks at ends of lines.
    text = buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    colors = {
        "text.color": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "grid.color": theme.grid,
        "xtick.color": theme.muted,
        "ytick.color": theme.ink,
        "ytick.major.size": 0,
        "font.size": 11,
    }
    with style(), matplotlib.rc_context(colors):  # type: ignore[arg-type]  # its keys are a Literal type
        yield


def canvas(width: float, height: float, *, title: str, subtitle: str, theme: Theme) -> Figure:
    """A figure with its title and, in smaller lines, the conditions that it was measured under."""
    lines = subtitle.count("\n") + 1
    figure = new_figure(width, height)
    figure.text(0.01, 1 - 0.06 / height, title, fontsize=13, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.36 / height, subtitle, fontsize=9.5, color=theme.muted, va="top", linespacing=1.35)
    top = 1 - (0.46 + 0.19 * lines) / height
    figure.set_layout_engine("constrained", rect=(0, 0, 1, top))
    return figure


def long_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], labels: Sequence[str], colors: Sequence[str],
    *, room: float, fontsize: float = 10,
) -> None:  # fmt: skip
    """Horizontal bars, the first on top, each with its label behind it; room: of the labels, as a part of the bars."""
    places = range(len(names))
    axes.barh(places, list(values), color=list(colors), height=0.72)
    axes.set_yticks(places, list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, (1 + room) * max(values))
    for place, value, label in zip(places, values, labels, strict=True):
        behind(axes, value, place, label, fontsize)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def behind(axes: Axes, value: float, place: float, label: str, fontsize: float = 10) -> None:
    """A label a little to the right of the end of a bar."""
    axes.annotate(label, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=fontsize)
