"""The plots of a run's layers: how much of each is removed, and where the engine's time goes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from swincompress_pl.report.content.names import readable
from swincompress_pl.report.layers import LayerSparsity
from swincompress_pl.report.operations import OperationTime
from swincompress_pl.report.plots.drawing import EMPTY, LAST, bars, new_figure

_KIND_COLORS = (
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


def layer_sparsities(layers: Sequence[LayerSparsity]) -> Figure | None:
    """A bar per weight, for the largest weights if there are many; None without any."""
    if not layers:
        return None
    shown = list(layers)
    title = "Part of each weight that is removed"
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
    ax.set_yticks(places, [readable(layer.name) for layer in shown], fontsize=7.5)
    for place, value in zip(places, percent, strict=True):
        ax.text(101, place, f"{value:.0f} %", va="center", fontsize=7.5)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0, 108)
    ax.set_xlabel("%")
    ax.tick_params(axis="y", length=0)
    ax.set_title(title)
    return figure


def operation_latency(operations: Sequence[OperationTime]) -> Figure | None:
    """The time of each kind of operation, and of the slowest operations; None without any."""
    if not operations:
        return None
    by_kind: dict[str, float] = {}
    for operation in operations:
        by_kind[operation.kind] = by_kind.get(operation.kind, 0.0) + operation.time_ms
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])
    colors = {kind: _KIND_COLORS[number % len(_KIND_COLORS)] for number, kind in enumerate(kinds)}
    total = sum(by_kind.values()) or 1.0
    slowest = sorted(operations, key=lambda operation: -operation.time_ms)[:_OPERATIONS_SHOWN]
    figure = new_figure(11.5, 1.2 + 0.24 * max(len(slowest), len(kinds), 6))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    bars(
        left, kinds, [by_kind[kind] for kind in kinds], lambda v: f"{v:.3g} ms, {100 * v / total:.0f} %",
        [colors[kind] for kind in kinds],
    )  # fmt: skip
    left.set_xlim(0, 1.55 * max(by_kind.values()))
    left.set_title(f"By kind of operation ({total:.3g} ms)")
    bars(
        right, [readable(operation.name) for operation in slowest], [operation.time_ms for operation in slowest],
        lambda v: f"{v:.3g} ms", [colors[operation.kind] for operation in slowest],
    )  # fmt: skip
    right.tick_params(axis="y", labelsize=8)
    right.set_title(f"The slowest {len(slowest)} of {len(operations)} operations")
    return figure
