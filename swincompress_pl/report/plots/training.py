"""The curves of a fit, with the epochs before which the network was changed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from swincompress_pl.report.plots.drawing import ALERT, BASE, BETWEEN, LAST, new_figure
from swincompress_pl.report.training import PRUNED, QUANTIZED, TrainingEpoch

_CHANGES = {PRUNED: (BETWEEN, "-", "pruned"), QUANTIZED: (ALERT, "--", "quantized from here")}


def training_curves(epochs: Sequence[TrainingEpoch]) -> Figure | None:
    """A panel with the losses and one with the accuracy; None if nothing was logged."""
    losses = {
        "training loss": (BASE, [(e.epoch, e.train_loss) for e in epochs if e.train_loss is not None]),
        "validation loss": (LAST, [(e.epoch, e.val_loss) for e in epochs if e.val_loss is not None]),
    }
    losses = {name: curve for name, curve in losses.items() if curve[1]}
    scored = [(e.epoch, e.accuracy_percent) for e in epochs if e.accuracy_percent is not None]
    panels = [(losses, "Loss")] if losses else []
    if scored:
        panels.append(({"validation accuracy": (LAST, scored)}, "Validation accuracy, %"))
    if not panels:
        return None
    figure = new_figure(5.5 * len(panels) + 0.3, 3.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (curves, title) in zip(axes, panels, strict=True):
        for name, (color, points) in curves.items():
            x, y = zip(*points, strict=True)
            mark = "o" if len(points) < 40 else ""
            ax.plot(x, y, color=color, marker=mark, markersize=3.5, linewidth=1.6, label=name)
        _mark_changes(ax, epochs)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlim(epochs[0].epoch - 0.6, epochs[-1].epoch + 0.6)
        ax.grid()
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure


def _mark_changes(ax: Axes, epochs: Sequence[TrainingEpoch]) -> None:
    """A line before each epoch that began with a change."""
    for change, (color, line, label) in _CHANGES.items():
        for number, place in enumerate(each.epoch - 0.5 for each in epochs if change in each.changes):
            ax.axvline(place, color=color, linestyle=line, linewidth=1.2, label=None if number else label, zorder=1)
