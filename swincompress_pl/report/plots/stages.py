"""The plots of a run's stages: before and after, accuracy against size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swincompress_pl.report.content.numbers import count, megabytes, unit_of
from swincompress_pl.report.plots.drawing import ALERT, BASE, BETWEEN, LAST, TEXT, bars, new_figure
from swincompress_pl.report.record import PruningStep, Stage, runtimes


def before_after(stages: Sequence[Stage]) -> Figure | None:
    """A panel per figure that any stage has; None if there is none."""
    panels: list[tuple[str, list[tuple[Stage, float]], Callable[[float], str]]] = [
        ("Parameters", [(s, s.parameters) for s in stages if s.parameters is not None], lambda v: count(round(v))),
        ("MACs per image", [(s, s.macs) for s in stages if s.macs is not None], lambda v: count(round(v))),
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
        colors = _stage_colors(len(pairs))
        bars(ax, [stage.name for stage, _ in pairs], [value for _, value in pairs], show, colors)
        ax.set_title(title)
    if scored:
        _accuracy_panel(axes[len(panels)], scored)
    if timed:
        _latency_panel(axes[-1], stages, timed)
    return figure


def _accuracy_panel(ax: Axes, stages: Sequence[Stage]) -> None:
    names = [stage.name for stage in stages]
    colors = _stage_colors(len(stages))
    bounds = []
    for place, (stage, color) in enumerate(zip(stages, colors, strict=True)):
        assert stage.accuracy is not None
        low, high = stage.accuracy.interval_percent
        bounds += [low, high]
        ax.plot([low, high], [place, place], color=color, linewidth=3, alpha=0.55, solid_capstyle="round")
        ax.plot([stage.accuracy.percent], [place], "o", color=color, markersize=7)
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
    names, values, errors, colors = [], [], [], []
    for runtime in timed:
        for stage in (stage for stage in stages if runtime in stage.latency_ms):
            latency = stage.latency_ms[runtime]
            low, high = latency.quartiles_ms
            names.append(stage.name if stage.name == runtime else f"{stage.name}\n{runtime}")
            values.append(latency.median_ms)
            errors.append((latency.median_ms - low, high - latency.median_ms))
            colors.append(LAST if "engine" in runtime else BASE)
    bars(ax, names, values, lambda v: f"{v:.3g} ms", colors)
    ax.errorbar(
        values, range(len(values)), xerr=list(zip(*errors, strict=True)), fmt="none", ecolor=TEXT, elinewidth=1,
        capsize=2,
    )  # fmt: skip
    for text, value, (_, above) in zip(ax.texts, values, errors, strict=True):
        text.set_x(value + above + 0.02 * max(values))
    ax.tick_params(axis="y", labelsize=8.5)
    ax.set_title("Latency, median and quartiles")


def accuracy_size(stages: Sequence[Stage], steps: Sequence[PruningStep]) -> Figure | None:
    """A panel with the steps of a search, and one with the stages and their files; None if both are empty."""
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
    unit, name = unit_of(max(cost))
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
    for stage, size, color in zip(stages, sizes, _stage_colors(len(stages)), strict=True):
        assert stage.accuracy is not None
        low, high = stage.accuracy.interval_percent
        # Stages of (nearly) the same size are drawn side by side, or their intervals would hide one another.
        x = size - apart * sum(abs(size - other) < apart for other in sizes[: len(points)])
        y = stage.accuracy.percent
        points.append((x, y))
        ax.errorbar(
            [x], [y], yerr=[[y - low], [high - y]], fmt="o", color=color, capsize=3, elinewidth=1.4, markersize=7
        )
    ax.set_xlim(1.12 * max(sizes), -0.16 * max(sizes))
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= 1.12 * max(sizes)])
    _label_apart(ax, points, [stage.name for stage in stages])
    ax.set_xlabel("file, MB (smaller to the right)")
    ax.set_ylabel("top-1, % with 95 % interval")
    ax.grid()
    ax.set_title("Accuracy against the file's size")


def _label_apart(ax: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Puts labels right of the points; labels of points that lie together are stacked to the right of all of them."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    line, near = 0.062 * (top - bottom), 0.12 * abs(left - right)
    placed: list[tuple[float, float]] = []
    for (x, y), name in sorted(zip(points, names, strict=True), key=lambda item: -item[0][1]):
        cluster = [other for other, _ in points if abs(other - x) < near]
        above = [height for other, height in placed if abs(other - x) < near]
        height = min([y, *(value - line for value in above)])
        placed.append((x, height))
        ax.annotate(name, (min(cluster), height), (9, 0), textcoords="offset points", fontsize=9, va="center")


def _stage_colors(stages: int) -> list[str]:
    if stages == 1:
        return [LAST]
    return [BASE, *[BETWEEN] * (stages - 2), LAST]
