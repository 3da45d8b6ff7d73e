"""The best checkpoint of a compressed network."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from swincompress_pl.callbacks.quantization import QuantizationAwareTraining
from swincompress_pl.callbacks.search import SearchCallback
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.checkpoint.hooks import keep_record
from swincompress_pl.history import history_of
from swincompress_pl.quant import QuantizedNetwork


class CompressedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that waits until the network is compressed, so that "best" is the best of what will be
    exported.

    Takes the arguments of ModelCheckpoint. A float epoch before quantization usually scores higher and would otherwise
    be kept. Beside `QuantizationAwareTraining` it waits until the network is quantized; in a fit that only prunes,
    until the first round has removed something. A fit in which it saved nothing for that reason ends with a warning.
    model_attribute: the attribute of the LightningModule that holds the network.
    """

    def __init__(self, *args: Any, model_attribute: str = "net", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_attribute = model_attribute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints say how the network is compressed; fail early where there is no such network."""
        super().setup(trainer, pl_module, stage)
        keep_record(pl_module, self.model_attribute)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where it waits for what does not come."""
        super().on_train_start(trainer, pl_module)
        compressing = self._beside(trainer, QuantizationAwareTraining, SearchCallback)
        if not compressing and not self._is_compressed(trainer):
            rank_zero_warn(
                f"CompressedCheckpoint saves nothing before {self.model_attribute} is compressed, and no callback of "
                "this fit prunes or quantizes it; add one, or use ModelCheckpoint"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say so where it waited to the end."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and not self._is_compressed(trainer):
            missing = "quantized" if self._beside(trainer, QuantizationAwareTraining) else "compressed"
            rank_zero_warn(f"CompressedCheckpoint saved nothing: {self.model_attribute} was not {missing} in this fit")

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return not self._is_compressed(trainer) or super()._should_skip_saving_checkpoint(trainer)

    def _is_compressed(self, trainer: Trainer) -> bool:
        """As far as this fit goes: quantized where it quantizes, else changed in any way."""
        network = network_of(trainer.lightning_module, self.model_attribute)
        if self._beside(trainer, QuantizationAwareTraining):
            return isinstance(network, QuantizedNetwork)
        return bool(history_of(network))

    def _beside(self, trainer: Trainer, *kinds: type[Callback]) -> bool:
        """Whether a callback of these kinds stands beside this one, for the same network."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        beside = [other for other in callbacks if isinstance(other, kinds)]
        return any(getattr(other, "model_attribute", None) == self.model_attribute for other in beside)
