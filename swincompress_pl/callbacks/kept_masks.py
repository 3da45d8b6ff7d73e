"""Keeps masked weights at 0 for a whole fit, however the optimizers are stepped."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn

from swincompress_pl.pruning import keep_masks
from swincompress_pl.pruning.structure.weight_masks import MaskKeeper


class KeptMasks(Callback):
    """Sets masked weights to 0 after each optimizer step and at the end of each batch, and before weights are read.

    Some weights change outside of `Optimizer.step`: by optimizers that step in two halves (SAM), by those that the
    trainer does not know, and by hooks. The ends of batches and epochs, validations and checkpoints see zeros all the
    same.
    """

    keeps_masks = True  # so CompressionMixin need not
    _masks: MaskKeeper | None = None

    def keep_masks(self, trainer: Trainer, network: nn.Module) -> None:
        """Sets masked weights to 0, now and after each step.

        Args:
            trainer: The trainer, whose optimizers are watched.
            network: The network with the masks.
        """
        self.let_go_of_masks()
        self._masks = keep_masks(trainer.optimizers, network)

    def let_go_of_masks(self) -> None:
        """Sets masked weights to 0 once more, and stops watching the optimizers."""
        if self._masks is not None:
            self._masks.enforce()
            self._masks.remove()
            self._masks = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sets masked weights to 0, whatever the batch's steps were."""
        self._enforce()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets masked weights to 0, as the module's own hooks may have made steps after the last batch."""
        self._enforce()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sets masked weights to 0 after schedule-free optimizers have put in the weights that they evaluate."""
        if batch_idx == 0:
            self._enforce()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets masked weights to 0, as the tensors of the file are the module's own."""
        self._enforce()

    def _enforce(self) -> None:
        if self._masks is not None:
            self._masks.enforce()
