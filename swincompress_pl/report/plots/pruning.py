"""The plots of a pruning search: sparsity per layer by round, accuracy against size, sensitivity.

Each takes the plain data of `pruning.SearchState.to_dict()` and returns a matplotlib Figure that belongs to the caller,
or None where there is nothing to draw yet; none touches pyplot.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swincompress_pl.pruning.adaptive.state import SearchState
from swincompress_pl.report.content.names import LISTS, readable
from swincompress_pl.report.content.numbers import unit_of
from swincompress_pl.report.plots.drawing import ALERT, EDGE, HEAT, LAST, PAGE, finished, new_figure, style
from swincompress_pl.report.search import kinds_of, last_round, read_search, sensitivity_curve, sparsities_by_round

Search = Mapping[str, Any] | SearchState

KIND_TITLES = {
    "heads": "Attention heads",
    "mlp": "MLP channels",
    "head_dim": "Width of a head",
    "embed": "Embedding width",
    "weight": "Weights",
}
_ROWS_ALONE, _ROWS_A_COLUMN = 60, 120
_LONG_NAME = 32
_CURVES_NAMED = 6
_MOST_SENSITIVE = 3
_CURVE_COLORS = (LAST, ALERT, "#2a8c6e", "#8a5fb0", "#b8860b", "#4a5560")
_MARKS = ("o", "s", "^", "D", "v", "P")


def pruning_figures(search: Search, *, tolerance: float | None = None) -> dict[str, Figure]:
    """All plots for which the search has data: {"sparsity", "accuracy_size", "sensitivity"}, in this order.

    The tolerance, in points, is drawn as a line; by default it is that of the search's data. A ValueError is raised for
    bad data.
    """
    known = read_search(search)
    drawn = {
        "sparsity": sparsity_by_round(known),
        "accuracy_size": accuracy_against_size(known, tolerance=tolerance),
        "sensitivity": sensitivity_curves(known),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def sparsity_by_round(search: Search) -> Figure | None:
    """A heat map with a row per target, grouped by kind, and a column per round; None before the first round."""
    known = read_search(search)
    if not last_round(known) or not known.targets:
        return None
    gone = sparsities_by_round(known)
    rows = _heat_map_rows(known)
    columns = 1 if len(rows) <= _ROWS_ALONE else max(2, -(-len(rows) // _ROWS_A_COLUMN))
    height = -(-len(rows) // columns)
    panel = (
        0.075 * max(len(name) for name, _ in rows)
        + min(4.2 if columns == 1 else 2.9, max(2.0, 0.4 * last_round(known)))
        + 0.5
    )
    with style():
        figure = new_figure(max(5.2, columns * panel + 0.7), 1.25 + 0.16 * height)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for number, ax in enumerate(axes):
            image = _heat_map(ax, rows[number * height : (number + 1) * height], gone, height)
        bar = figure.colorbar(
            image, ax=list(axes), location="right", shrink=min(1.0, 3.0 / figure.get_figheight()), anchor=(0, 1),
            pad=0.02 / columns, aspect=18,
        )  # fmt: skip
        bar.set_label("removed, %")
        bar.outline.set_visible(False)
        _title(figure, f"Removed of each target by round ({len(known.targets)} targets)")
        return finished(figure)


def accuracy_against_size(search: Search, *, tolerance: float | None = None) -> Figure | None:
    """The score of every step against the size after its decision; None before the first step.

    Kept steps are a line, undone ones hollow marks. There is a panel for the parameters, and one for the MACs if they
    are known and change. A line is drawn `tolerance` points below the baseline.
    """
    known = read_search(search)
    if not known.steps:
        return None
    tolerance = known.tolerance if tolerance is None else tolerance
    panels = [("parameters", known.baseline_parameters, [float(step.parameters) for step in known.steps])]
    macs = [step.macs for step in known.steps if step.macs is not None]
    if known.baseline_macs is not None and len(macs) == len(known.steps) and set(macs) != {known.baseline_macs}:
        panels.append(("MACs per image", known.baseline_macs, [float(value) for value in macs]))
    with style():
        figure = new_figure(0.6 + 5.4 * len(panels), 4.2)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (what, baseline, sizes) in zip(axes, panels, strict=True):
            _trade_off(ax, known, what, baseline, sizes, tolerance)
        axes[0].set_ylabel("score on the hold-out, points")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5 if len(panels) > 1 else 3, fontsize=9)
        _title(figure, "Accuracy against size, step by step")
        return finished(figure)


def sensitivity_curves(search: Search) -> Figure | None:
    """The score against the part removed of one target alone; None if nothing was measured.

    Each kind has a panel, with a line per target. Up to six targets of a kind have a color, a mark and a name each. Of
    more, the three most sensitive ones are named, and the others are colored by their depth in the network.
    """
    known = read_search(search)
    curves = {name: curve for name in known.targets if (curve := sensitivity_curve(known, name))}
    panels = [
        (kind, {name: curve for name, curve in curves.items() if known.targets[name].kind == kind})
        for kind in kinds_of(known)
    ]
    panels = [(kind, of_kind) for kind, of_kind in panels if of_kind]
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with style():
        figure = new_figure(0.6 + 5.4 * columns, 0.8 + 3.9 * lines)
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for ax, (kind, of_kind) in zip(axes, panels, strict=False):
            _curves(ax, of_kind, known.baseline_score)
            ax.set_title(f"{KIND_TITLES.get(kind, kind)} ({len(of_kind)})")
            ax.set_xlabel("removed of this target alone, %")
            ax.xaxis.set_tick_params(labelbottom=True)
        for ax in axes[len(panels) :]:
            ax.remove()
        for line in range(lines):
            axes[line * columns].set_ylabel("score, points")
        _title(figure, "Sensitivity: one target pruned at a time")
        return finished(figure)


def _heat_map_rows(search: SearchState) -> list[tuple[str, int | None]]:
    """(label, number of the target) per row; a title of a kind has no number, and a single kind has no title."""
    names = _short_names(list(search.targets))
    kinds = kinds_of(search)
    rows: list[tuple[str, int | None]] = []
    for kind in kinds:
        if len(kinds) > 1:
            rows.append((KIND_TITLES.get(kind, kind), None))
        rows += [
            (name, number)
            for number, (name, target) in enumerate(zip(names, search.targets.values(), strict=True))
            if target.kind == kind
        ]
    return rows


def _heat_map(ax: Axes, rows: Sequence[tuple[str, int | None]], gone: Any, height: int) -> Any:
    """Draws the rows from the top of a panel with room for `height` rows, with the last round's figure at the right."""
    rounds = gone.shape[1]
    cells = np.full((len(rows), rounds), np.nan)
    for place, (_, number) in enumerate(rows):
        if number is not None:
            cells[place] = 100 * gone[number]
    image = ax.imshow(
        np.ma.masked_invalid(cells), cmap=HEAT, vmin=0, vmax=100, aspect="auto", interpolation="none",
        extent=(0.5, rounds + 0.5, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    lines: Any = {"color": PAGE, "linewidth": 0.7}
    ax.hlines(np.arange(0.5, len(rows) - 1), 0.5, rounds + 0.5, **lines)
    ax.vlines(np.arange(1.5, rounds), -0.5, len(rows) - 0.5, **lines)
    ax.set_ylim(height - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7.5)
    for label, (_, number) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if number is None else "normal")
    for place, (_, number) in enumerate(rows):
        if number is not None:
            ax.annotate(
                f"{100 * gone[number, -1]:.0f} %", (rounds + 0.5, place), (4, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
    every = next(step for step in (1, 2, 5, 10, 20, 50, rounds) if rounds <= 10 * step)
    ax.set_xticks([number for number in range(1, rounds + 1) if number == 1 or number % every == 0])
    ax.set_xlim(0.5, rounds + 0.5)
    ax.tick_params(axis="both", length=0)
    ax.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=8)
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("round", fontsize=8.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _trade_off(
    ax: Axes, search: SearchState, what: str, baseline: int, sizes: Sequence[float], tolerance: float | None
) -> None:
    unit, name = unit_of(baseline)
    size = 4.5 if len(search.steps) <= 150 else 2.8
    floor, ceiling = _score_range(search, tolerance)
    points = list(zip(sizes, search.steps, strict=True))
    kept = [(baseline / unit, search.baseline_score), *((left / unit, s.score) for left, s in points if s.accepted)]
    ax.plot(*_columns(kept), "-", color=LAST, linewidth=1.1, alpha=0.6, zorder=3)
    ax.plot(*_columns(kept[1:]), "o", color=LAST, markersize=size, zorder=4, label=f"kept ({len(kept) - 1})")
    undone = [(left / unit, s.score) for left, s in points if not s.accepted]
    within, below = [p for p in undone if p[1] >= floor], [(x, floor) for x, y in undone if y < floor]
    for hollow, mark, larger, text in ((within, "o", 0.5, "undone"), (below, "v", 1.5, "undone, below the axis")):
        if hollow:
            ax.plot(
                *_columns(hollow), mark, markerfacecolor="none", markeredgecolor=ALERT, markersize=size + larger,
                clip_on=False, label=f"{text} ({len(hollow)})",
            )  # fmt: skip
    start = ([baseline / unit], [search.baseline_score])
    ax.plot(*start, "s", color=LAST, markersize=6.5, zorder=4, label="before pruning")
    if tolerance is not None:
        label = f"tolerance, {tolerance:g} points"
        ax.axhline(search.baseline_score - tolerance, color=ALERT, linewidth=1.1, linestyle="--", label=label)
    ax.set_ylim(floor, ceiling)
    _size_axis(ax, what, name, baseline / unit, min(sizes) / unit)


def _size_axis(ax: Axes, what: str, unit: str, baseline: float, smallest: float) -> None:
    """An axis on which the size gets smaller to the right; the upper axis shows how much of it is removed."""
    room = 0.05 * (baseline - smallest) or 0.05 * baseline
    ax.set_xlim(baseline + room, smallest - room)
    ax.set_xlabel(f"{what} left{', ' * bool(unit)}{unit} (smaller to the right)")
    ax.grid()
    there: Any = lambda left: 100 - 100 * left / baseline  # noqa: E731  # Any: matplotlib's type allows text, too
    back: Any = lambda removed: baseline * (1 - removed / 100)  # noqa: E731
    above = ax.secondary_xaxis("top", functions=(there, back))
    above.set_xlabel("removed, %", fontsize=9)
    above.tick_params(labelsize=8.5)
    above.spines["top"].set_color(EDGE)


def _score_range(search: SearchState, tolerance: float | None) -> tuple[float, float]:
    """The range of scores that shows all kept steps and the tolerance; undone steps may lie far below it."""
    kept = [search.baseline_score, *(step.score for step in search.steps if step.accepted)]
    low, high = min(kept), max(kept)
    if tolerance is not None:
        low = min(low, search.baseline_score - tolerance)
    lowest = min(step.score for step in search.steps)
    span = max(high - low, 0.5)
    floor = max(lowest, low - 1.5 * span) if lowest < low else low
    return floor - 0.08 * (high - floor + 0.5), high + 0.08 * (high - floor + 0.5)


def _curves(ax: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], baseline: float) -> None:
    ax.axhline(baseline, color=EDGE, linewidth=1.2, linestyle=":", label="before pruning")
    few = len(curves) <= _CURVES_NAMED
    by_loss = sorted(curves, key=lambda name: _mean_score(curves[name]))
    named = list(curves) if few else by_loss[:_MOST_SENSITIVE]
    shown = dict(zip(curves, _short_names(list(curves)), strict=True))
    depth = colormaps["viridis"]
    for number, (name, curve) in enumerate(curves.items()):
        if name not in named:
            ax.plot(*_percent(curve), color=depth(0.25 + 0.57 * number / (len(curves) - 1)), linewidth=1, alpha=0.75)
    for color, mark, name in zip(_CURVE_COLORS, _MARKS, named, strict=False):
        ax.plot(*_percent(curves[name]), color=color, marker=mark, markersize=4.5, linewidth=1.8, label=shown[name])
    ax.grid()
    heading = None if few else f"the {len(named)} most sensitive; others by depth,\nthe first blue, the last green"
    ax.legend(loc="lower left", fontsize=8, title=heading, title_fontsize=8, alignment="left")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _percent(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [100 * share for share, _ in curve], [score for _, score in curve]


def _mean_score(curve: Sequence[tuple[float, float]]) -> float:
    return sum(score for _, score in curve) / len(curve)


def _short_names(names: Sequence[str]) -> list[str]:
    """Drops the parts between dots with which all names end, and from long names those with which all begin.

    Every name keeps at least one part, and a list of layers keeps its name. What is left is put into words.
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return [readable(name) for name in names]
    last = min(_shared([part[::-1] for part in parts]), min(map(len, parts)) - 1)
    parts = [part[: len(part) - last] for part in parts]
    if max(len(".".join(part)) for part in parts) > _LONG_NAME:
        first = min(_shared(parts), min(map(len, parts)) - 1)
        first = next((number for number, part in enumerate(parts[0][:first]) if part in LISTS), first)
        parts = [part[first:] for part in parts]
    return [readable(".".join(part)) for part in parts]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """The number of first parts that are the same in all names."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
