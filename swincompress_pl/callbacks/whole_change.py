"""Changes the network in the middle of a fit, and all that follows it, in one step that an exception undoes."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from swincompress_pl.callbacks.qat_scales import nested_schedulers
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.interrupts import Attributes, all_or_nothing


def whole_change(trainer: Trainer, module: LightningModule, model_attribute: str, *others: object) -> all_or_nothing:
    """Lets the network and all that follows it change together inside the context, or not at all.

    That includes the module that holds it, optimizers, schedulers, Lightning's averages, the trainer's stage and
    loggers, and `others`, which belong to a callback. So a checkpoint that is written because of an exception
    (`OnExceptionCheckpoint`) has the state before the change.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    return all_or_nothing(
        *others,
        module,
        Attributes(trainer, ("_loggers",)),
        trainer.state,
        trainer._logger_connector,
        *trainer.optimizers,
        *(inner for config in trainer.lr_scheduler_configs for inner in nested_schedulers(config.scheduler)),
        *(callback for callback in callbacks if isinstance(callback, WeightAveraging)),
        written=[network_of(module, model_attribute)],
    )
