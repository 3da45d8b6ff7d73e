"""The plots of a quantized network: errors, costs, ranges with their clips, values of the worst quantizers, bits.

Each function takes a `Diagnosis` and returns a matplotlib Figure, or None if there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from swincompress_pl.quant.diagnosis import Diagnosis, Histogram, QuantizationError, QuantizerCost
from swincompress_pl.report.content.names import readable
from swincompress_pl.report.content.numbers import megabytes
from swincompress_pl.report.diagnosis import all_packed_bytes, label, packed_bytes, read_diagnosis
from swincompress_pl.report.plots.drawing import EDGE, LAST, TEXT, finished, new_figure, style

QUANTIZATION_TITLES = {
    "quantization_error": "Signal to noise",
    "quantization_costs": "What each quantizer costs",
    "quantization_ranges": "Ranges and clips",
    "quantization_histograms": "Values of the worst quantizers",
    "quantization_bits": "Bits per layer",
}
_ROWS_SHOWN, _COSTS_SHOWN = 60, 30
_KINDS = {"activation": (LAST, "o"), "weight": ("#e08a3c", "s")}
_BIT_COLORS = {8: "#1f6fb2", 7: "#4b8ec6", 6: "#2a8c6e", 5: "#7a9e3a", 4: "#e08a3c", 3: "#c8553d", 2: "#8a2f3d"}


def quantization_figures(data: Mapping[str, Any] | Diagnosis) -> dict[str, Figure]:
    """All plots for which the diagnosis has data, by the names of `QUANTIZATION_TITLES`."""
    known = read_diagnosis(data)
    drawn = {
        "quantization_error": _errors(known),
        "quantization_costs": _costs(known),
        "quantization_ranges": _ranges(known),
        "quantization_histograms": _histograms(known),
        "quantization_bits": _bits(known),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _errors(known: Diagnosis) -> Figure | None:
    """Signal to noise of the values (filled) and of the rounding here alone (hollow), in the network's order."""
    found = [error for error in known.errors if error.snr_db is not None and error.own_snr_db is not None]
    shown = _worst(found, lambda error: error.snr_db or 0.0)
    if not shown:
        return None
    with style():
        figure, ax = _row_figure(shown)
        for place, error in enumerate(shown):
            color, mark = _KINDS[error.kind]
            ends = [error.snr_db or 0.0, error.own_snr_db or 0.0]
            ax.plot(ends, [place, place], color=color, linewidth=1, alpha=0.35)
            ax.plot(ends[1:], [place], mark, markersize=4.5, markerfacecolor="none", markeredgecolor=color)
            ax.plot(ends[:1], [place], mark, markersize=4.5, color=color)
        for kind, (color, mark) in _KINDS.items():
            ax.plot([], [], mark, color=color, markersize=4.5, label=kind)
        ax.plot([], [], "o", markerfacecolor="none", markeredgecolor=EDGE, markersize=4.5, label="rounded here alone")
        ax.set_xlabel("signal to noise, dB (more is better)")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        ax.set_title(_of("Signal to noise, input to logits", "of most noise", shown, found))
        return finished(figure)


def _costs(known: Diagnosis) -> Figure | None:
    """The KL divergence with one quantizer alone, the costliest first."""
    shown = known.costs[:_COSTS_SHOWN]
    if not shown:
        return None
    with style():
        figure, ax = _row_figure(shown)
        values = [1000 * cost.alone.kl for cost in shown]
        ax.barh(range(len(shown)), values, color=[_KINDS[cost.kind][0] for cost in shown], height=0.7)
        for place, cost in enumerate(shown):
            text = f"{values[place]:.3g}, {cost.alone.agreement_percent:.1f} % same, {cost.bits} bits"
            ax.text(values[place] + 0.01 * max(values), place, text, va="center", fontsize=7)
        ax.set_xlim(0, 1.4 * max(*values, 1e-12))
        for kind in _KINDS:
            ax.barh([0], [0], color=_KINDS[kind][0], label=kind)
        ax.set_xlabel("KL to the float output, 1/1000 nats, this one alone quantized")
        ax.legend(loc="lower right", fontsize=9)
        ax.set_title(_of("What each quantizer costs", "costliest", shown, known.costs))
        return finished(figure)


def _ranges(known: Diagnosis) -> Figure | None:
    """The magnitudes at every quantizer, from the 99.99 percentile to the maximum, in multiples of the clip."""
    found = [error for error in known.errors if error.clip_to_max and error.clip_to_p9999]
    shown = _worst(found, lambda error: error.clip_to_max or 0.0)
    if not shown:
        return None
    with style():
        figure, ax = _row_figure(shown)
        reach = [(1 / (e.clip_to_p9999 or 1), 1 / (e.clip_to_max or 1)) for e in shown]
        for place, (error, (percentile, largest)) in enumerate(zip(shown, reach, strict=True)):
            color, mark = _KINDS[error.kind]
            ax.plot([percentile, largest], [place, place], color=color, linewidth=1.5, alpha=0.5)
            ax.plot([percentile], [place], "|", markersize=8, color=color)
            ax.plot([largest], [place], mark, markersize=4.5, color=color)
        ax.axvline(1, color=TEXT, linestyle="--", linewidth=1.2, label="clip")
        for kind, (color, mark) in _KINDS.items():
            ax.plot([], [], mark, color=color, markersize=4.5, label=f"maximum, {kind}")
        ax.plot([], [], "|", color=EDGE, markersize=8, label="99.99 percentile")
        ax.set_xscale("log", base=2)
        ends = [value for pair in reach for value in pair]
        ax.set_xlim(min(*ends, 0.45) / 1.1, max(*ends, 2.2) * 1.1)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("magnitude / clip (right of 1 is cut off)")
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
        ax.set_title(_of("Ranges against the clip", "most clipped", shown, found))
        return finished(figure)


def _histograms(known: Diagnosis) -> Figure | None:
    """Float values in quantization steps, with the first and the last code."""
    if not known.histograms:
        return None
    columns = min(2, len(known.histograms))
    lines = -(-len(known.histograms) // columns)
    with style():
        figure = new_figure(0.4 + 5.2 * columns, 0.4 + 2.5 * lines)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, histogram in zip(axes, known.histograms, strict=False):
            _histogram(ax, histogram)
        for ax in axes[len(known.histograms) :]:
            ax.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=9)
        return finished(figure)


def _histogram(ax: Axes, histogram: Histogram) -> None:
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    ax.stairs(histogram.counts, edges, fill=True, color=_KINDS[histogram.kind][0], alpha=0.75)
    for number, clip in enumerate((histogram.clip_low, histogram.clip_high)):
        text = "clip: the first and the last code" if number == 0 else None
        ax.axvline(clip, color=TEXT, linestyle="--", linewidth=1.3, label=text)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)
    low, high = min(histogram.low, histogram.clip_low), max(histogram.high, histogram.clip_high)
    ax.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    ax.set_xlabel("value, in steps")
    ax.set_ylabel("count")
    ax.set_title(readable(label(histogram)), fontsize=9.5)


def _bits(known: Diagnosis) -> Figure | None:
    """A bar of weight bits per layer, the first layer on top, with the bytes that they take."""
    if not known.layers:
        return None
    with style():
        figure = new_figure(7.4, 1.0 + 0.19 * len(known.layers))
        ax = figure.add_subplot()
        places, widths = range(len(known.layers)), [bits for bits, _ in known.layers.values()]
        ax.barh(places, widths, color=[_BIT_COLORS[bits] for bits in widths], height=0.72)
        for place, (bits, weights) in enumerate(known.layers.values()):
            text = f"{bits}, {megabytes(packed_bytes(bits, weights))}"
            ax.text(bits + 0.1, place, text, va="center", fontsize=7)
        ax.set_yticks(places, [readable(name) for name in known.layers], fontsize=7.5)
        ax.set_ylim(len(known.layers) - 0.4, -0.6)
        ax.set_xlim(0, 9.6)
        ax.set_xticks(range(0, 9, 2))
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("weight bits, and their size packed")
        ax.set_title(f"Bits per layer ({megabytes(all_packed_bytes(known))} together)")
        return finished(figure)


def _worst(errors: Sequence[QuantizationError], key: Any) -> list[QuantizationError]:
    """As many as a figure has room for, those with the least key, in the network's order."""
    chosen = {id(error) for error in sorted(errors, key=key)[:_ROWS_SHOWN]}
    return [error for error in errors if id(error) in chosen]


def _row_figure(rows: Sequence[QuantizerCost | QuantizationError]) -> tuple[Figure, Axes]:
    figure = new_figure(8.6, 1.3 + 0.19 * len(rows))
    ax = figure.add_subplot()
    ax.set_yticks(range(len(rows)), [readable(label(row)) for row in rows], fontsize=7.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    return figure, ax


def _of(title: str, which: str, shown: Sequence[Any], found: Sequence[Any]) -> str:
    return title if len(shown) == len(found) else f"{title} (the {len(shown)} {which} of {len(found)})"
