"""Collects the curves of a fit: losses and accuracy per epoch, and the epochs in which the network was changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from swincompress_pl.checkpoint.holder import has_network, network_of
from swincompress_pl.history import history_of
from swincompress_pl.report.training import PRUNED, QUANTIZED, TrainingEpoch

_STATE_VERSION = 1
_KINDS = {"prune": PRUNED, "mask": PRUNED, "quantize": QUANTIZED}


class TrainingCurves(Callback):
    """Collects the losses and the accuracy of every epoch, and the epochs in which the network was changed.

    The curves are part of checkpoints, so a resumed fit goes on with them. A metric that the module does not log stays
    empty. An accuracy is read as a fraction unless one of its values is above 1.

    Args:
        model_attribute: Where the LightningModule holds the network: "net", or a path such as "model.backbone".
        train_loss: Name of the logged training loss.
        val_loss: Name of the logged validation loss.
        val_accuracy: Name of the logged validation accuracy.
    """

    def __init__(
        self,
        *,
        model_attribute: str = "net",
        train_loss: str = "train/loss",
        val_loss: str = "val/loss",
        val_accuracy: str = "val/top1",
    ) -> None:
        self.model_attribute = model_attribute
        self.train_loss, self.val_loss, self.val_accuracy = train_loss, val_loss, val_accuracy
        self._rows: list[dict[str, Any]] = []
        self._validated: dict[str, float | None] = {}
        self._changes_seen: int | None = None
        self._steps_seen = 0

    @property
    def epochs(self) -> list[TrainingEpoch]:
        """The epochs so far, as values of a record."""
        accuracies = [row["accuracy"] for row in self._rows if row["accuracy"] is not None]
        factor = 1.0 if any(value > 1 for value in accuracies) else 100.0
        return [
            TrainingEpoch(
                epoch=row["epoch"],
                train_loss=row["train_loss"],
                val_loss=row["val_loss"],
                accuracy_percent=None if row["accuracy"] is None else factor * row["accuracy"],
                changes=tuple(row["changes"]),
            )
            for row in self._rows
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the curves of another fit, and counts what was done to the network before this one."""
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._rows, self._changes_seen, self._steps_seen = [], None, 0
        if self._changes_seen is None:
            self._changes_seen = len(history_of(self._network(pl_module)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the metrics of a validation."""
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self._validated = {
                "val_loss": _finite(metrics, self.val_loss),
                "accuracy": _finite(metrics, self.val_accuracy),
            }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the epoch to the curves."""
        row = {
            "epoch": trainer.current_epoch,
            "train_loss": _finite(trainer.callback_metrics, self.train_loss),
            "val_loss": self._validated.get("val_loss"),
            "accuracy": self._validated.get("accuracy"),
            "changes": self._new_changes(trainer, pl_module),
        }
        self._validated = {}
        self._rows = [*(old for old in self._rows if old["epoch"] < trainer.current_epoch), row]

    def state_dict(self) -> dict[str, Any]:
        """Returns the curves, and what was seen of the network's changes."""
        return {
            "version": _STATE_VERSION,
            "epochs": [dict(row) for row in self._rows],
            "changes_seen": self._changes_seen,
            "steps_seen": self._steps_seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the curves; a state of another version is left alone, as no fit should fail for its curves.

        Args:
            state_dict: What `state_dict()` gave.
        """
        if state_dict.get("version") == _STATE_VERSION:
            self._rows = [dict(row) for row in state_dict["epochs"]]
            self._changes_seen, self._steps_seen = state_dict["changes_seen"], state_dict["steps_seen"]

    def _network(self, module: LightningModule) -> nn.Module | None:
        """The network, or None if the module holds none at `model_attribute`."""
        return network_of(module, self.model_attribute) if has_network(module, self.model_attribute) else None

    def _new_changes(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """What was done to the network since the last call, by its history and by the steps that searches kept."""
        history, steps = history_of(self._network(module)), _steps_kept(trainer)
        new = [_KINDS[kind] for entry in history[self._changes_seen or 0 :] for kind in entry if kind in _KINDS]
        if steps > self._steps_seen:  # masks of single weights are one entry, however many rounds there were
            new.insert(0, PRUNED)
        self._changes_seen, self._steps_seen = len(history), steps
        return list(dict.fromkeys(new))


def _finite(metrics: Mapping[str, Tensor], name: str) -> float | None:
    """The metric as a float; None if it was not logged, or is NaN or infinite, which JSON cannot hold."""
    value = float(metrics[name]) if name in metrics else math.nan
    return value if math.isfinite(value) else None


def _steps_kept(trainer: Trainer) -> int:
    states = [getattr(callback, "search_state", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return sum(step.accepted for state in states for step in getattr(state, "steps", ()))
