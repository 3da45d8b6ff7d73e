"""All plots of a record, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from swincompress_pl.report.plots.drawing import finished, save_png, style
from swincompress_pl.report.plots.layers import layer_sparsities, operation_latency
from swincompress_pl.report.plots.pruning import pruning_figures
from swincompress_pl.report.plots.quantization import QUANTIZATION_TITLES, quantization_figures
from swincompress_pl.report.plots.stages import accuracy_size, before_after
from swincompress_pl.report.plots.training import training_curves
from swincompress_pl.report.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn plot; `name` is that of its file without extension, and the one that sections refer to."""

    name: str
    title: str
    figure: Figure


# In reading order; the names are those of the PNG files.
PLOTS = {
    "before_after": "Before and after",
    "accuracy_size": "Accuracy against size",
    "training": "Loss and accuracy, epoch by epoch",
    "pruning_sparsity": "What the search removed, by round",
    "pruning_accuracy_size": "The search's steps, accuracy against size",
    "pruning_sensitivity": "Sensitivity",
    "sparsity": "Sparsity per layer",
    **QUANTIZATION_TITLES,
    "latency": "Latency per layer",
}


def draw_plots(record: RunRecord) -> list[Plot]:
    """Draws every plot of `PLOTS` for which the record has data."""
    with style():
        figures: dict[str, Figure | None] = {
            "before_after": before_after(record.stages),
            "accuracy_size": accuracy_size(record.stages, record.steps),
            "training": training_curves(record.training),
            "sparsity": layer_sparsities(record.layers),
            "latency": operation_latency(record.operations),
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
    """Writes the plots as PNG files into `directory`, which is made if needed; {name: (title, file)}.

    Files of other plots are removed: they belong to an earlier record and would contradict this one.
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
