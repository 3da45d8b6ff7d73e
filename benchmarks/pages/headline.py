"""The README's plot: time and memory of Swin-T in every runtime."""

from __future__ import annotations

from matplotlib.figure import Figure

from swincompress_pl.report.comparison.bench import ENGINE

from ..engine.report import counted, rounds
from .races import Figures, by_time, median_ms, on_threads, result, shown, times
from .sources import Sources
from .text import cpu
from .theme import Drawing, Theme, canvas, long_bars

MODEL = "swin_tiny_patch4_window7_224"


def draw(sources: Sources, theme: Theme) -> Figure:
    """Three panels with the runtimes as rows: one thread, two threads, memory."""
    figures = sources.race(MODEL, 1)
    one, two = (on_threads(figures, threads) for threads in (1, 2))
    names = by_time(two)
    colors = [theme.ours if name == ENGINE else theme.others for name in names]
    figure = canvas(
        10.4, 3.7, theme=theme,
        title="Swin-T, one image: time and memory by runtime (shorter is better)",
        subtitle=(
            f"{cpu(figures['environment'])}, 2 cores, 224 x 224, batch 1, random weights. Medians of {rounds(figures)} "
            "interleaved rounds;\nin brackets, how many times longer than swincompress_pl."
        ),
    )  # fmt: skip
    panels = figure.subplots(1, 3, sharey=True)
    rows = [shown(name, short=True) for name in names]
    for axes, race in zip(panels, (one, two), strict=False):
        labels = [_label(race, name) for name in names]
        long_bars(axes, rows, [median_ms(race, name) for name in names], labels, colors, room=0.75)
        axes.set_title(f"{counted(race['threads'], 'thread')}, ms", fontsize=11)
    memory = [result(two, name)["peak_rss_bytes"] / 1e6 for name in names]
    long_bars(panels[2], rows, memory, [f"{megabytes:.0f}" for megabytes in memory], colors, room=0.3)
    panels[2].set_title("peak memory, MB (2 threads)", fontsize=11)
    panels[0].get_yticklabels()[0].set_fontweight("bold")
    return figure


def _label(race: Figures, name: str) -> str:
    ms = f"{median_ms(race, name):.1f}"
    return ms if name == ENGINE else f"{ms} ({times(race, name):.1f}x)"


DRAWINGS: dict[str, Drawing] = {"headline": draw}
