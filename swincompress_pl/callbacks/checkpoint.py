"""Saves the best checkpoint of a compressed network."""

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
    """A `ModelCheckpoint` that waits until the network is compressed.

    So "best" is the best of what will be exported: a float epoch before quantization usually scores higher, and would
    otherwise be kept. Beside `QuantizationAwareTraining` it waits until the network is quantized. In a fit that only
    prunes, it waits until the first round has removed something. If it saved nothing for that reason, the fit ends with
    a warning.

    Args:
        *args: Positional arguments of `ModelCheckpoint`.
        model_attribute: Where the LightningModule holds the network: "net", or a path such as "model.backbone" or
            "nets.0".
        **kwargs: Keyword arguments of `ModelCheckpoint`.

    Raises:
        AttributeError: When the fit begins, if the module has no network at `model_attribute`.
        MisconfigurationException: If `ModelCheckpoint` refuses its arguments.
    """

    def __init__(self, *args: Any, model_attribute: str = "net", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_attribute = model_attribute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes checkpoints record how the network is compressed; a missing network is an error here."""
        super().setup(trainer, pl_module, stage)
        keep_record(pl_module, self.model_attribute)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if nothing in this fit compresses the network."""
        super().on_train_start(trainer, pl_module)
        compressing = self._beside(trainer, QuantizationAwareTraining, SearchCallback)
        if not compressing and not self._is_compressed(trainer):
            rank_zero_warn(
                f"CompressedCheckpoint saves nothing before {self.model_attribute} is compressed, and no callback of "
                "this fit prunes or quantizes it; add one, or use ModelCheckpoint"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns if it waited to the end."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and not self._is_compressed(trainer):
            missing = "quantized" if self._beside(trainer, QuantizationAwareTraining) else "compressed"
            rank_zero_warn(f"CompressedCheckpoint saved nothing: {self.model_attribute} was not {missing} in this fit")

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return not self._is_compressed(trainer) or super()._should_skip_saving_checkpoint(trainer)

    def _is_compressed(self, trainer: Trainer) -> bool:
        """Whether the network is quantized, in a fit that quantizes it, or else changed in any way."""
        network = network_of(trainer.lightning_module, self.model_attribute)
        if self._beside(trainer, QuantizationAwareTraining):
            return isinstance(network, QuantizedNetwork)
        return bool(history_of(network))

    def _beside(self, trainer: Trainer, *kinds: type[Callback]) -> bool:
        """Whether the trainer has a callback of these kinds for the same network."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        beside = [other for other in callbacks if isinstance(other, kinds)]
        return any(getattr(other, "model_attribute", None) == self.model_attribute for other in beside)
