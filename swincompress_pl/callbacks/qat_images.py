"""The images that a fit calibrates on: checked when the fit begins, and collected when the network is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from swincompress_pl.callbacks.calibration import (
    NoImagesError,
    first_inputs,
    network_inputs,
    normalization,
    sample_of_all_ranks,
)
from swincompress_pl.callbacks.loaders import calibration_loaders, has_validation_data, holdout_loaders
from swincompress_pl.callbacks.validation import ModuleValidation, validating
from swincompress_pl.quant import Bits, QuantizedNetwork
from swincompress_pl.quant.fidelity import check_graph
from swincompress_pl.quant.silent_hooks import warn_of_silent_hooks


@dataclass(frozen=True, kw_only=True)
class CalibrationImages:
    """The images that the module's validation step gives to its network.

    Attributes:
        calibration_dataloader: Source of the batches; see `calibration_loaders`.
        count: Number of images to collect; the last batch is kept whole.
        model_attribute: Where the module holds the network.
        callback_name: Name of the callback, for errors.
    """

    calibration_dataloader: Any
    count: int
    model_attribute: str
    callback_name: str

    def preprocessing(
        self,
        trainer: Trainer,
        module: LightningModule,
        network: nn.Module,
        stated: Mapping[str, Any] | None,
        *,
        method: str,
        bits: Bits,
    ) -> dict[str, Any]:
        """How the images are normalized: as the callback's argument `stated` or the datamodule says, or as found.

        It raises the errors that would otherwise come at start_epoch, or at the first validation in integers: for
        training batches that the step does not take, for images of another size or normalization, and for a network
        that computes something else than its graph.
        """
        with self._step(trainer, module) as (validation, loaders):
            _, (images, *_) = first_inputs(validation, loaders)
            held_out: list[Iterable[Any]] = []
            if has_validation_data(trainer):  # images that no augmentation has changed
                held_out = holdout_loaders(trainer, self.callback_name)[:1]
                with suppress(NoImagesError):  # a rank may have none
                    _, (images, *_) = first_inputs(validation, held_out)
            sample, source = sample_of_all_ranks(validation, held_out), held_out
            if sample is None:
                sample, source = sample_of_all_ranks(validation, loaders), loaders
            if sample is None:
                raise NoImagesError("there are no images to calibrate on; give the fit training data")
            found = normalization(stated, preprocessing_of_data(trainer), network, sample, source)
            quantized = QuantizedNetwork(network, preprocessing=found, method=method, bits=bits)
            warn_of_silent_hooks(network, quantized.graph)
            quantized.graph.check_images(images)
            quantized.pixels(images)
            check_graph(quantized.graph, network, images)
        return found

    def collect(self, trainer: Trainer, module: LightningModule) -> list[Tensor]:
        """The images, in the batches in which they came."""
        kept: list[Tensor] = []
        with self._step(trainer, module) as (validation, loaders):
            for images in network_inputs(validation, loaders):
                kept.append(images.detach())
                if sum(len(each) for each in kept) >= self.count:
                    break
        return kept

    @contextmanager
    def _step(
        self, trainer: Trainer, module: LightningModule
    ) -> Iterator[tuple[ModuleValidation, list[Iterable[Any]]]]:
        """The module's validation, which leaves no trace, and the loaders of the images."""
        loaders = calibration_loaders(trainer, self.calibration_dataloader, self.count)
        validation = ModuleValidation(trainer, module, self.model_attribute)
        with validating(trainer, module), torch.no_grad(), validation.without_trace():
            validation.begin_beside_training()
            yield validation, loaders


def preprocessing_of_data(trainer: Trainer) -> Any:
    """The datamodule's `preprocessing`; None if it has none."""
    return getattr(getattr(trainer, "datamodule", None), "preprocessing", None)
