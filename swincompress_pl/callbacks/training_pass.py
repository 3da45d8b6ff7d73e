"""What callbacks that change a network do in each epoch and batch: begin the epoch once, and simulate integers."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer

from swincompress_pl.callbacks.kept_masks import KeptMasks
from swincompress_pl.callbacks.random_state import RandomNumbers
from swincompress_pl.callbacks.termination import ended_by_sigterm
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.quant import QuantizedNetwork


class TrainingPass(KeptMasks):
    """Begins each epoch once, and lets a quantized network simulate its integers while a batch is trained on.

    The network does so in `eval()` too. Lightning keeps the modes that it finds, so a module that was evaluated before
    its fit is trained in `eval()`: without dropout, and with fixed statistics. Integers would give it no gradients. The
    modes stay as they are.

    If a fit resumes from a checkpoint that was written after the last batch of an epoch, Lightning does not call
    `on_train_epoch_start` for the next epoch. That epoch then begins with its first batch.
    """

    model_attribute: str
    _rng: RandomNumbers
    _begun_epoch = -1
    _in_training_pass: QuantizedNetwork | None = None

    def _begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Does what is due before `trainer.current_epoch`, in subclasses."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the random numbers that a fit begins with."""
        self._rng.on_fit_start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that no epoch has begun yet."""
        self._rng.on_train_start(trainer)
        self._begun_epoch = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the epoch."""
        self._rng.on_train_epoch_start(trainer)
        self._begin_once(trainer, pl_module)

    def _begin_once(self, trainer: Trainer, module: LightningModule) -> None:
        if self._begun_epoch != trainer.current_epoch:
            with ended_by_sigterm(trainer):
                self._begin_epoch(trainer, module)
            self._begun_epoch = trainer.current_epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins the epoch if it has not begun, and the training pass."""
        if batch_idx == 0:
            self._begin_once(trainer, pl_module)
        self._rng.on_train_batch_start()
        network = network_of(pl_module, self.model_attribute)
        if isinstance(network, QuantizedNetwork):
            network.begin_training_pass()
            self._in_training_pass = network

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the training pass."""
        self._end_training_pass()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the training pass, if a batch was skipped with the rest of its epoch."""
        self._end_training_pass()
        super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the training pass, if a batch failed."""
        self._end_training_pass()

    def _end_training_pass(self) -> None:
        if self._in_training_pass is not None:
            self._in_training_pass.end_training_pass()
            self._in_training_pass = None
