"""Quantization-aware training from a chosen epoch of a fit on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from ..models.manifest import network_of, restore_on_load, save_to_checkpoint
from ..quant import METHODS, QuantizedNetwork, find_preprocessing, quantize


class QuantizationAwareTraining(Callback):
    """Quantizes `module.<model_attribute>` at the start of an epoch and trains on with fake quantization.

    From then on the attribute holds a `quant.QuantizedNetwork`: training sees rounded values with straight-through
    gradients, validation and test see the integers of the engine. Its float weights are the same parameters as before,
    so the optimizer and its state stay; scales stay as calibrated.

    start_epoch: the epoch before which the network is quantized; 0 for a network with trained weights.
    calibration_images, method: see `quant.quantize`.
    preprocessing: {"mean": ..., "std": ...} of the images; default: the datamodule's `preprocessing`, or the network's.
    model_attribute: the attribute of the LightningModule that holds the network.

    The images come from the datamodule's `calibration_dataloader(images)`, or else from the training batches (images,
    ...). A fit that is resumed after start_epoch goes on with the checkpoint's scales.

    Example: `Trainer(max_epochs=10, callbacks=[QuantizationAwareTraining(start_epoch=6)])`
    """

    def __init__(
        self,
        *,
        start_epoch: int,
        calibration_images: int = 128,
        method: str = "searched",
        preprocessing: Mapping[str, Any] | None = None,
        model_attribute: str = "net",
    ) -> None:
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch}: it has to be 0 or more")
        if calibration_images < 1:
            raise ValueError(f"calibration_images={calibration_images}: it has to be 1 or more")
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not available; there is {', '.join(map(repr, METHODS))}")
        self.start_epoch = start_epoch
        self.calibration_images = calibration_images
        self.method = method
        self.preprocessing = preprocessing
        self.model_attribute = model_attribute

    # Policy: override this.

    def should_quantize(self, epoch: int) -> bool:
        """Whether the network is to be quantized before `epoch` (it happens once)."""
        return epoch >= self.start_epoch

    # Hooks.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Rebuild the architecture of the checkpoint that is about to be loaded, and refuse what cannot work."""
        if stage == "fit":
            _refuse_surroundings(trainer)
        restore_on_load(pl_module, self.model_attribute)
        network = network_of(pl_module, self.model_attribute)
        if stage == "fit" and not isinstance(network, QuantizedNetwork):
            # Builds the graph once, so that a network without an integer form is refused now and not at start_epoch.
            QuantizedNetwork(network, preprocessing=self._preprocessing(trainer, pl_module), method=self.method)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when this fit ends before anything is quantized."""
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.start_epoch:
            rank_zero_warn(
                f"start_epoch={self.start_epoch} is not reached in max_epochs={trainer.max_epochs}: "
                "nothing is quantized."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize if this is the epoch."""
        network = network_of(pl_module, self.model_attribute)
        if isinstance(network, QuantizedNetwork) or not self.should_quantize(trainer.current_epoch):
            return
        rank_zero_info(f"quantizing {self.model_attribute} ({self.method}) on {self.calibration_images} images")
        # Calibration must not move the random numbers that shuffling, dropout and augmentation draw.
        with isolate_rng():
            quantized = quantize(
                network,
                self._calibration(trainer),
                method=self.method,
                preprocessing=self._preprocessing(trainer, pl_module),
                images=self.calibration_images,
                classes=_class_names(trainer),
            )
        setattr(pl_module, self.model_attribute, quantized.train())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the manifest with which the architecture is rebuilt."""
        save_to_checkpoint(pl_module, checkpoint, self.model_attribute)

    # Mechanism.

    def _calibration(self, trainer: Trainer) -> Iterable[Any]:
        source = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
        loader = source(self.calibration_images) if callable(source) else trainer.train_dataloader
        if loader is None:
            raise ValueError("QuantizationAwareTraining has no images to calibrate on; give the fit training data")
        calibration: Iterable[Any] = loader
        return calibration

    def _preprocessing(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Any]:
        network = network_of(module, self.model_attribute)
        data = getattr(trainer, "datamodule", None)
        of_network = getattr(network, "pretrained_cfg", None)
        return find_preprocessing(self.preprocessing, getattr(data, "preprocessing", None), of_network)


def _class_names(trainer: Trainer) -> list[str] | None:
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return None if names is None else [str(name) for name in names]


def _refuse_surroundings(trainer: Trainer) -> None:
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"QuantizationAwareTraining cannot exchange the network in the middle of a fit under "
            f"{type(trainer.strategy).__name__}, which has wrapped it. Train on one device (Trainer(devices=1))"
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{type(other).__name__} keeps a copy of the model that knows no scales; take it out of this fit"
            )
