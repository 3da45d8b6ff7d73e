"""The best checkpoint of a compressed network."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.quant import QuantizedNetwork


class CompressedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that waits until the network is quantized, so that "best" is the best of what will be
    exported.

    Takes the arguments of ModelCheckpoint. A float epoch before quantization usually scores higher and would otherwise
    be kept. model_attribute: the attribute of the LightningModule that holds the network.
    """

    def __init__(self, *args: Any, model_attribute: str = "net", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_attribute = model_attribute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail early where there is no such network."""
        super().setup(trainer, pl_module, stage)
        network_of(pl_module, self.model_attribute)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        network = network_of(trainer.lightning_module, self.model_attribute)
        return not isinstance(network, QuantizedNetwork) or super()._should_skip_saving_checkpoint(trainer)
