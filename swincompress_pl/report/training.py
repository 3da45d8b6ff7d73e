"""The epochs of a fit in a record."""

from __future__ import annotations

from dataclasses import dataclass

from swincompress_pl.report.plain import Plain

PRUNED, QUANTIZED = "pruned", "quantized"


@dataclass(frozen=True, kw_only=True)
class TrainingEpoch(Plain):
    """One epoch of a fit. None stands for "not logged in this epoch".

    Attributes:
        epoch: Number of the epoch, from 0.
        train_loss: Mean loss of its training batches.
        val_loss: Loss of the validation in this epoch.
        accuracy_percent: Accuracy of that validation, in percent.
        changes: What was done to the network in this epoch, usually before its first batch: "pruned", "quantized".
    """

    epoch: int
    train_loss: float | None = None
    val_loss: float | None = None
    accuracy_percent: float | None = None
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.changes, list):  # of JSON
            object.__setattr__(self, "changes", tuple(self.changes))
