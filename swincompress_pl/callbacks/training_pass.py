"""What a quantized network computes while a batch is trained on, whatever mode its module is in."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer

from swincompress_pl.callbacks.kept_masks import KeptMasks
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.quant import QuantizedNetwork


class TrainingPass(KeptMasks):
    """Has the quantized network of a fit simulate its integers while a batch is trained on, in `eval()` too.

    Lightning keeps the modes that it finds, so a module that was evaluated before its fit is trained in `eval()`:
    without dropout, with fixed statistics. Integers would give it no gradients. The modes themselves stay.
    """

    model_attribute: str
    _in_training_pass: QuantizedNetwork | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin it."""
        network = network_of(pl_module, self.model_attribute)
        if isinstance(network, QuantizedNetwork):
            network.begin_training_pass()
            self._in_training_pass = network

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End it."""
        self._end_training_pass()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it where a batch was skipped with the rest of its epoch."""
        self._end_training_pass()
        super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End it where a batch failed."""
        self._end_training_pass()

    def _end_training_pass(self) -> None:
        if self._in_training_pass is not None:
            self._in_training_pass.end_training_pass()
            self._in_training_pass = None
