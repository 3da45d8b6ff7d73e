"""The plots of a PrimeSVT search: robustness or curve of each block, accuracy against memory, spike rates.

Each function takes a `pruning.PrimeSVTResult`, or its plain data. It returns a matplotlib Figure, or None if there is
nothing to draw. None of them touches pyplot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swincompress_pl.pruning import PrimeSVTResult
from swincompress_pl.pruning.prime.result import Candidate
from swincompress_pl.report.content.names import readable
from swincompress_pl.report.plots.drawing import (
    ALERT,
    BASE,
    BETWEEN,
    EDGE,
    EMPTY,
    LAST,
    PAGE,
    finished,
    new_figure,
    save_png,
    style,
)

Result = Mapping[str, Any] | PrimeSVTResult

_BAND_COLORS = (LAST, BETWEEN, BASE)
_PHASES = {"target set": ("s", BASE), "robustness": ("^", BETWEEN), "policy": ("o", LAST)}
_ROW_INCHES = 0.24


def primesvt_figures(result: Result, *, rates_after: Mapping[str, float] | None = None) -> dict[str, Figure]:
    """Draws all plots for which a result of PrimeSVT has data.

    Args:
        result: What the search gave, or its plain data.
        rates_after: Spike rates of the pruned network by neuron layer, 0 to 1, drawn beside those of the unpruned one.

    Returns:
        Figures by name: "robustness" (or "curves" with the allocated policy), "accuracy_memory", "spike_rates".

    Raises:
        ValueError: If the data are of another version.
    """
    known = _read(result)
    curves = curves_by_block(known)
    drawn = {
        "curves": curves,
        "robustness": None if curves else robustness_by_block(known),
        "accuracy_memory": accuracy_against_memory(known),
        "spike_rates": spike_rates(known.spike_rates, rates_after),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_primesvt_figures(
    result: Result, folder: str | Path, *, rates_after: Mapping[str, float] | None = None
) -> list[Path]:
    """Writes each of `primesvt_figures` as `primesvt-<name>.png`.

    Args:
        result: What the search gave, or its plain data.
        folder: Where the files go; it is made if needed.
        rates_after: Spike rates of the pruned network by neuron layer, 0 to 1.

    Returns:
        The paths of the files.

    Raises:
        FileExistsError: If `folder` is a file.
        ValueError: If the data are of another version.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in primesvt_figures(result, rates_after=rates_after).items():
        files.append(folder / f"primesvt-{name}.png")
        save_png(figure, files[-1])
    return files


def robustness_by_block(result: Result) -> Figure | None:
    """A bar per block in the color of its band, with its final rate; None if robustness was not measured."""
    known = _read(result)
    blocks = [block for block in known.blocks if block.robustness is not None]
    if not blocks:
        return None
    with style():
        figure = new_figure(7, 1.2 + _ROW_INCHES * len(blocks))
        ax = figure.subplots()
        places = range(len(blocks))
        colors = [_BAND_COLORS[min(block.band, len(_BAND_COLORS) - 1)] for block in blocks]
        values = [float(block.robustness or 0) for block in blocks]
        ax.barh(places, values, color=colors)
        ax.set_yticks(places, [readable(block.name) for block in blocks], fontsize=8)
        ax.invert_yaxis()
        for place, block, value in zip(places, blocks, values, strict=True):
            ax.annotate(
                f"band {block.band}, {known.initial_rate:.0%} → {block.rate:.0%}", (value, place), (4, 0),
                textcoords="offset points", va="center", fontsize=7.5,
            )  # fmt: skip
        ax.margins(x=0.3)
        ax.set_xlabel("robustness: percent of the parameters saved per point lost")
        ax.set_title("Robustness of the blocks, and their pruning rates")
        return finished(figure)


def curves_by_block(result: Result) -> Figure | None:
    """A row per block with what it loses at each rate alone; None if no curve was measured.

    A bar reaches to the rate at which the policy left the block, and a figure says what that saves.
    """
    known = _read(result)
    if not any(block.curve for block in known.blocks):
        return None
    drop = known.config["tolerance"]
    points = [(100 * p.rate, row, p.drop) for row, block in enumerate(known.blocks) for p in block.curve]
    rates, rows, drops = zip(*points, strict=True)
    with style():
        figure = new_figure(7, 1.6 + _ROW_INCHES * len(known.blocks))
        ax = figure.subplots()
        ax.barh(range(len(known.blocks)), [100 * block.rate for block in known.blocks], color=EMPTY, edgecolor=EDGE)
        dots = ax.scatter(
            rates, rows, c=drops, cmap="viridis_r", vmin=0, vmax=drop, s=22, zorder=3, edgecolors=PAGE, linewidths=0.5
        )
        for row, block in enumerate(known.blocks):
            if block.rate and block.curve:
                at, savings = zip((0.0, 0.0), *((p.rate, p.saving) for p in block.curve), strict=True)
                saved = f"{np.interp(block.rate, at, savings):.1f} %"
                ax.annotate(saved, (101.5, row), va="center", fontsize=7.5, annotation_clip=False)
        ax.annotate("saves", (101.5, -1), va="center", fontsize=7.5, annotation_clip=False)
        ax.set_yticks(range(len(known.blocks)), [readable(block.name) for block in known.blocks], fontsize=8)
        ax.set_ylim(len(known.blocks) - 0.4, -0.6)
        ax.set_xlim(0, 100)
        ax.set_xlabel("rate: percent of the units removed (bar: as the policy left it; dots: measured alone)")
        ax.set_title("What each block costs alone, and its rate")
        figure.colorbar(dots, ax=ax, label="points lost alone", pad=0.12, aspect=30)
        return finished(figure)


def accuracy_against_memory(result: Result) -> Figure | None:
    """Every candidate by what it saves and how it scores; None without candidates.

    The two constraints and the candidate that was applied are marked.
    """
    known = _read(result)
    if not known.candidates:
        return None
    drop, least = known.config["tolerance"], known.config["min_memory_saving"]
    with style():
        figure = new_figure(7, 4.6)
        ax = figure.subplots()
        _points(ax, known.candidates)
        ax.plot([0], [known.baseline_score], "D", color=LAST, markersize=6, label="unpruned")
        floor = known.baseline_score - drop
        ax.axhline(floor, color=ALERT, linewidth=1.1, linestyle="--", label=f"at most {drop:g} points lost")
        ax.axvline(100 * least, color=ALERT, linewidth=1.1, linestyle=":", label=f"at least {least:.0%} saved")
        if known.applied is not None:
            ax.plot(
                [100 * known.applied.saving], [known.applied.score], "*", color=ALERT, markersize=13, zorder=5,
                label=f"applied: {known.applied.saving:.1%} saved, {known.applied.score:.2f} points",
            )  # fmt: skip
        ax.grid()
        ax.set_xlabel("parameters saved, %")
        ax.set_ylabel("accuracy on the hold-out, points")
        ax.set_title("Accuracy against memory, every candidate")
        ax.legend(loc="lower left", fontsize=8)
        return finished(figure)


def spike_rates(before: Mapping[str, float], after: Mapping[str, float] | None = None) -> Figure | None:
    """The rate of each neuron layer, in the order of a pass, unpruned and, if given, pruned; None without neurons."""
    if not before:
        return None
    with style():
        figure = new_figure(7, 1.4 + 0.8 * _ROW_INCHES * len(before))
        ax = figure.subplots()
        places = range(len(before))
        ax.plot([100 * rate for rate in before.values()], places, "o", color=BASE, label="unpruned")
        if after is not None:
            found = [(100 * after[name], place) for place, name in enumerate(before) if name in after]
            ax.plot([x for x, _ in found], [y for _, y in found], "o", color=LAST, markersize=4.5, label="pruned")
        ax.set_yticks(places, [readable(name) for name in before], fontsize=7)
        ax.invert_yaxis()
        ax.set_xlim(left=0)
        ax.grid()
        ax.set_xlabel("spikes per time step and place, %")
        ax.set_title("Spike rates of the neurons")
        ax.legend(fontsize=8)
        return finished(figure)


def _points(ax: Axes, candidates: list[Candidate]) -> None:
    for phase, (mark, color) in _PHASES.items():
        for accepted, face in ((True, color), (False, "none")):
            found = [c for c in candidates if (c.phase, c.accepted) == (phase, accepted)]
            if found:
                ax.plot(
                    [100 * c.saving for c in found], [c.score for c in found], mark, color=color, markerfacecolor=face,
                    markersize=4.5, label=f"{phase}, {'within' if accepted else 'beyond'} ({len(found)})",
                )  # fmt: skip


def _read(result: Result) -> PrimeSVTResult:
    return result if isinstance(result, PrimeSVTResult) else PrimeSVTResult.from_dict(result)
