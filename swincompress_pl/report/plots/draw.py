"""The plots of a report: before and after, accuracy against size, the pruning search, sparsity, quantization, latency a
layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swincompress_pl.report.content.sections import count, megabytes, runtimes
from swincompress_pl.report.plots.drawing import (
    ALERT,
    BASE,
    BETWEEN,
    EMPTY,
    LAST,
    TEXT,
    finished,
    new_figure,
    save_png,
    style,
)
from swincompress_pl.report.plots.pruning import pruning_figures, scale
from swincompress_pl.report.plots.quantization import quantization_figures
from swincompress_pl.report.quantization import PLOT_TITLES
from swincompress_pl.report.record import LayerSparsity, OperationTime, PruningStep, RunRecord, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND_COLOURS = (
    "#1f6fb2",
    "#e08a3c",
    "#4c9a6a",
    "#8a6fb8",
    "#c8553d",
    "#7a8794",
    "#c9a227",
    "#3aa6a6",
    "#b26f8c",
    "#5b6770",
)
_LAYERS_SHOWN = 64
_OPERATIONS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn plot. name: its file's, without ending, and what a report's sections call it by."""

    name: str
    title: str
    figure: Figure


# In the order in which a reader meets them; the names are those of the PNG files.
PLOTS = {
    "before_after": "Before and after",
    "accuracy_size": "Accuracy against size",
    "pruning_sparsity": "What the search removed, by round",
    "pruning_accuracy_size": "The search's steps, accuracy against size",
    "pruning_sensitivity": "Sensitivity",
    "sparsity": "Sparsity a layer",
    **PLOT_TITLES,
    "latency": "Latency a layer",
}


def draw_plots(record: RunRecord) -> list[Plot]:
    """Draws every plot of `PLOTS` that the record has figures for."""
    with style():
        figures: dict[str, Figure | None] = {
            "before_after": _before_after(record.stages),
            "accuracy_size": _accuracy_size(record.stages, record.steps),
            "sparsity": _sparsity(record.layers),
            "latency": _latency(record.operations),
        }
        for drawn in filter(None, figures.values()):
            finished(drawn)
    if record.pruning is not None:
        figures |= {f"pruning_{name}": figure for name, figure in pruning_figures(record.pruning).items()}
    if record.quantization is not None:
        figures |= quantization_figures(record.quantization)
    return [
        Plot(name=name, title=title, figure=figure)
        for name, title in PLOTS.items()
        if (figure := figures.get(name)) is not None
    ]


def save_plots(plots: Sequence[Plot], directory: str | Path) -> dict[str, tuple[str, Path]]:
    """Writes the plots as PNG files into `directory` (made if need be); {name: (title, file)}.

    Files of plots that are not among them go: they are of an earlier record and would contradict this one.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    written = {}
    for plot in plots:
        file = target / f"{plot.name}.png"
        save_png(plot.figure, file)
        written[plot.name] = (plot.title, file)
    for name in PLOTS.keys() - written.keys():
        (target / f"{name}.png").unlink(missing_ok=True)
    return written


def _before_after(stages: Sequence[Stage]) -> Figure | None:
    panels: list[tuple[str, list[tuple[Stage, float]], Callable[[float], str]]] = [
        ("Parameters", [(s, s.parameters) for s in stages if s.parameters is not None], lambda v: count(round(v))),
        ("MACs an image", [(s, s.macs) for s in stages if s.macs is not None], lambda v: count(round(v))),
        (
            "File on disk",
            [(s, s.size.file_bytes) for s in stages if s.size is not None and s.size.file_bytes is not None],
            lambda v: megabytes(round(v)),
        ),
    ]
    panels = [panel for panel in panels if panel[1]]
    timed = runtimes(stages)
    scored = [stage for stage in stages if stage.accuracy is not None]
    total = len(panels) + bool(timed) + bool(scored)
    if not total:
        return None
    columns = min(3, total)
    rows = -(-total // columns)
    figure = new_figure(4.2 * columns, 2.9 * rows)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(total)]
    for ax, (title, pairs, show) in zip(axes, panels, strict=False):
        colours = _stage_colours(len(pairs))
        _bars(ax, [stage.name for stage, _ in pairs], [value for _, value in pairs], show, colours)
        ax.set_title(title)
    if scored:
        _accuracy_panel(axes[len(panels)], scored)
    if timed:
        _latency_panel(axes[-1], stages, timed)
    return figure


def _bars(
    ax: Axes, names: Sequence[str], values: Sequence[float], show: Callable[[float], str], colours: Sequence[str]
) -> None:
    """Horizontal bars from zero, first on top, each with its value."""
    places = list(range(len(names)))
    ax.barh(places, list(values), color=list(colours), height=0.68)
    ax.set_yticks(places, list(names))
    ax.invert_yaxis()
    largest = max(values) or 1.0
    for place, value in zip(places, values, strict=True):
        ax.text(value + 0.02 * largest, place, show(value), va="center", fontsize=9)
    ax.set_xlim(0, 1.28 * largest)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _accuracy_panel(ax: Axes, stages: Sequence[Stage]) -> None:
    names = [stage.name for stage in stages]
    colours = _stage_colours(len(stages))
    bounds = []
    for place, (stage, colour) in enumerate(zip(stages, colours, strict=True)):
        assert stage.accuracy is not None
        low, high = stage.accuracy.interval_percent
        bounds += [low, high]
        ax.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.55, solid_capstyle="round")
        ax.plot([stage.accuracy.percent], [place], "o", color=colour, markersize=7)
        ax.annotate(
            f"{stage.accuracy.percent:.2f} %", (stage.accuracy.percent, place), (0, 7), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
    room = max(0.2, 0.12 * (max(bounds) - min(bounds)))
    ax.set_xlim(max(0.0, min(bounds) - room), min(100.0, max(bounds)) + room)
    ax.set_ylim(len(names) - 0.5, -0.75)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    images = sorted({stage.accuracy.images for stage in stages if stage.accuracy is not None})
    ax.set_title(f"Top-1, % with 95 % interval (n = {', '.join(map(str, images))})")


def _latency_panel(ax: Axes, stages: Sequence[Stage], timed: Sequence[str]) -> None:
    names, values, errors, colours = [], [], [], []
    for runtime in timed:
        for stage in (stage for stage in stages if runtime in stage.latency_ms):
            latency = stage.latency_ms[runtime]
            low, high = latency.quartiles_ms
            names.append(stage.name if stage.name == runtime else f"{stage.name}\n{runtime}")
            values.append(latency.median_ms)
            errors.append((latency.median_ms - low, high - latency.median_ms))
            colours.append(LAST if "engine" in runtime else BASE)
    _bars(ax, names, values, lambda v: f"{v:.3g} ms", colours)
    ax.errorbar(
        values, range(len(values)), xerr=list(zip(*errors, strict=True)), fmt="none", ecolor=TEXT, elinewidth=1,
        capsize=2,
    )  # fmt: skip
    for text, value, (_, above) in zip(ax.texts, values, errors, strict=True):
        text.set_x(value + above + 0.02 * max(values))
    ax.tick_params(axis="y", labelsize=8.5)
    ax.set_title("Latency, median and quartiles")


def _accuracy_size(stages: Sequence[Stage], steps: Sequence[PruningStep]) -> Figure | None:
    placed = [s for s in stages if s.accuracy is not None and s.size is not None and s.size.file_bytes is not None]
    tried = [s for s in steps if s.accuracy_percent is not None and (s.macs is not None or s.parameters is not None)]
    total = bool(len(placed) > 1) + bool(tried)
    if not total:
        return None
    figure = new_figure(6.2 * total, 3.9)
    if tried:
        _search_panel(figure.add_subplot(1, total, 1), tried)
    if len(placed) > 1:
        _trade_off_panel(figure.add_subplot(1, total, total), placed)
    return figure


def _search_panel(ax: Axes, steps: Sequence[PruningStep]) -> None:
    by_macs = all(step.macs is not None for step in steps)
    cost = [float((step.macs if by_macs else step.parameters) or 0) for step in steps]
    unit, name = scale(max(cost))
    kept = [(c / unit, s.accuracy_percent) for c, s in zip(cost, steps, strict=True) if s.accepted]
    undone = [(c / unit, s.accuracy_percent) for c, s in zip(cost, steps, strict=True) if not s.accepted]
    if kept:
        x, y = zip(*kept, strict=True)
        ax.plot(x, y, "-", color=LAST, linewidth=1, alpha=0.5)
        ax.plot(x, y, "o", color=LAST, markersize=4.5, label=f"kept ({len(kept)})")
    if undone:
        x, y = zip(*undone, strict=True)
        ax.plot(x, y, "x", color=ALERT, markersize=5, label=f"undone ({len(undone)})")
    ax.invert_xaxis()
    ax.set_xlabel(f"{'MACs' if by_macs else 'parameters'} left{', ' * bool(name)}{name} (smaller to the right)")
    ax.set_ylabel("hold-out top-1, %")
    ax.grid()
    ax.legend(loc="lower left")
    ax.set_title("Pruning, step by step")


def _trade_off_panel(ax: Axes, stages: Sequence[Stage]) -> None:
    points: list[tuple[float, float]] = []
    sizes = [
        stage.size.file_bytes / 1e6 for stage in stages if stage.size is not None and stage.size.file_bytes is not None
    ]
    apart = 0.018 * max(sizes)
    for stage, size, colour in zip(stages, sizes, _stage_colours(len(stages)), strict=True):
        assert stage.accuracy is not None
        low, high = stage.accuracy.interval_percent
        # Stages of (nearly) one size are drawn beside each other, or their intervals would hide one another.
        x = size - apart * sum(abs(size - other) < apart for other in sizes[: len(points)])
        y = stage.accuracy.percent
        points.append((x, y))
        ax.errorbar(
            [x], [y], yerr=[[y - low], [high - y]], fmt="o", color=colour, capsize=3, elinewidth=1.4, markersize=7
        )
    ax.set_xlim(1.12 * max(sizes), -0.16 * max(sizes))
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= 1.12 * max(sizes)])
    _label_apart(ax, points, [stage.name for stage in stages])
    ax.set_xlabel("file, MB (smaller to the right)")
    ax.set_ylabel("top-1, % with 95 % interval")
    ax.grid()
    ax.set_title("Accuracy against the file's size")


def _label_apart(ax: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Labels right of the points, those of points that lie together under each other and right of all of them."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    line, near = 0.062 * (top - bottom), 0.12 * abs(left - right)
    placed: list[tuple[float, float]] = []
    for (x, y), name in sorted(zip(points, names, strict=True), key=lambda item: -item[0][1]):
        cluster = [other for other, _ in points if abs(other - x) < near]
        above = [height for other, height in placed if abs(other - x) < near]
        height = min([y, *(value - line for value in above)])
        placed.append((x, height))
        ax.annotate(name, (min(cluster), height), (9, 0), textcoords="offset points", fontsize=9, va="center")


def _sparsity(layers: Sequence[LayerSparsity]) -> Figure | None:
    if not layers:
        return None
    shown = list(layers)
    title = "Part of each weight that is gone"
    if len(shown) > _LAYERS_SHOWN:
        chosen = sorted(layers, key=lambda layer: -layer.weights_before)[:_LAYERS_SHOWN]
        shown = [layer for layer in layers if layer in chosen]
        title += f" (the {len(shown)} largest of {len(layers)} weights)"
    figure = new_figure(8.2, 1.0 + 0.21 * len(shown))
    ax = figure.add_subplot()
    percent = [100 * layer.sparsity for layer in shown]
    places = range(len(shown))
    ax.barh(places, [100] * len(shown), color=EMPTY, height=0.72)
    ax.barh(places, percent, color=LAST, height=0.72)
    ax.set_yticks(places, [layer.name for layer in shown], fontsize=7.5)
    for place, value in zip(places, percent, strict=True):
        ax.text(101, place, f"{value:.0f} %", va="center", fontsize=7.5)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0, 108)
    ax.set_xlabel("%")
    ax.tick_params(axis="y", length=0)
    ax.set_title(title)
    return figure


def _latency(operations: Sequence[OperationTime]) -> Figure | None:
    if not operations:
        return None
    by_kind: dict[str, float] = {}
    for operation in operations:
        by_kind[operation.kind] = by_kind.get(operation.kind, 0.0) + operation.time_ms
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])
    colours = {kind: _KIND_COLOURS[number % len(_KIND_COLOURS)] for number, kind in enumerate(kinds)}
    total = sum(by_kind.values()) or 1.0
    slowest = sorted(operations, key=lambda operation: -operation.time_ms)[:_OPERATIONS_SHOWN]
    figure = new_figure(11.5, 1.2 + 0.24 * max(len(slowest), len(kinds), 6))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _bars(
        left, kinds, [by_kind[kind] for kind in kinds], lambda v: f"{v:.3g} ms, {100 * v / total:.0f} %",
        [colours[kind] for kind in kinds],
    )  # fmt: skip
    left.set_xlim(0, 1.55 * max(by_kind.values()))
    left.set_title(f"By kind of operation ({total:.3g} ms)")
    _bars(
        right, [_short(operation.name) for operation in slowest], [operation.time_ms for operation in slowest],
        lambda v: f"{v:.3g} ms", [colours[operation.kind] for operation in slowest],
    )  # fmt: skip
    right.tick_params(axis="y", labelsize=8)
    right.set_title(f"The slowest {len(slowest)} of {len(operations)} operations")
    return figure


def _short(name: str) -> str:
    """Of operations that run as one, "a.b.c+a.b.d", the later ones without what they share: "a.b.c+d"."""
    first, *later = name.split("+")
    path = first.split(".")
    for other in later:
        parts = other.split(".")
        shared = 0
        while shared < min(len(path), len(parts)) - 1 and path[shared] == parts[shared]:
            shared += 1
        first += "+" + ".".join(parts[shared:])
    return first


def _stage_colours(stages: int) -> list[str]:
    if stages == 1:
        return [LAST]
    return [BASE, *[BETWEEN] * (stages - 2), LAST]
