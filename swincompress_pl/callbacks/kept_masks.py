"""Masked weights stay 0 for a whole fit, whoever steps the optimizers and in whatever way."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn

from swincompress_pl.pruning import keep_masks
from swincompress_pl.pruning.structure.weight_masks import MaskKeeper


class KeptMasks(Callback):
    """Sets masked weights to 0 after each optimizer step and at the end of each batch, and before weights are read.

    Optimizers that step in two halves (SAM), those that the trainer does not know, and hooks that write weights change
    them outside of `Optimizer.step`; ends of batches and epochs, validations and checkpoints see zeros all the same.
    """

    keeps_masks = True  # so CompressionMixin need not
    _masks: MaskKeeper | None = None

    def keep_masks(self, trainer: Trainer, network: nn.Module) -> None:
        """From now on, and now."""
        self.let_go_of_masks()
        self._masks = keep_masks(trainer.optimizers, network)

    def let_go_of_masks(self) -> None:
        """Set them to 0 once more, and no longer."""
        if self._masks is not None:
            self._masks.enforce()
            self._masks.remove()
            self._masks = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Whatever the batch's steps were."""
        self._enforce()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module's own hooks may have stepped behind the last batch."""
        self._enforce()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Optimizers that evaluate other weights than they train (schedule-free ones) have put them there by now."""
        if batch_idx == 0:
            self._enforce()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The file's tensors are the module's own."""
        self._enforce()

    def _enforce(self) -> None:
        if self._masks is not None:
            self._masks.enforce()
