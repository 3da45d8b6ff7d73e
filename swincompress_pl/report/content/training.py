"""What a report says about the epochs of a fit."""

from __future__ import annotations

from collections.abc import Sequence

from swincompress_pl.report.content.numbers import many
from swincompress_pl.report.content.parts import Item, Section
from swincompress_pl.report.record import RunRecord
from swincompress_pl.report.training import PRUNED, QUANTIZED, TrainingEpoch


def training(record: RunRecord) -> Section | None:
    """The curves, the epochs of changes, and the best validation of each stretch between them."""
    epochs = record.training
    if not epochs:
        return None
    text = f"{many(len(epochs), 'epoch')}, numbered from 0. Changes come before the first batch of an epoch."
    lines = []
    for change in (PRUNED, QUANTIZED):
        at = [str(epoch.epoch) for epoch in epochs if change in epoch.changes]
        if at:
            lines.append((change, f"epoch{'s' * (len(at) > 1)} {', '.join(at)}"))
    lines += [(f"best validation accuracy, {name}", best) for name, part in _stretches(epochs) if (best := _best(part))]
    items = tuple(Item(lead=lead, text=line) for lead, line in lines)
    return Section(title="Training", text=text, items=items, plots=("training",))


def _stretches(epochs: Sequence[TrainingEpoch]) -> list[tuple[str, Sequence[TrainingEpoch]]]:
    """The epochs as trained in float, pruned and quantized."""
    places = {
        change: next((n for n, epoch in enumerate(epochs) if change in epoch.changes), len(epochs))
        for change in (PRUNED, QUANTIZED)
    }
    pruned, quantized = min(places[PRUNED], places[QUANTIZED]), places[QUANTIZED]
    return [
        ("before any change", epochs[:pruned]),
        ("pruned", epochs[pruned:quantized]),
        ("quantized", epochs[quantized:]),
    ]


def _best(epochs: Sequence[TrainingEpoch]) -> str:
    scored = [(epoch.accuracy_percent, -epoch.epoch) for epoch in epochs if epoch.accuracy_percent is not None]
    if not scored:
        return ""
    percent, epoch = max(scored)
    return f"{percent:.2f} % in epoch {-epoch}"
