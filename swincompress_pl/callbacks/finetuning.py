"""Lightning's BaseFinetuning, which keeps the parameters' names of each group, beside a change of the network."""

from __future__ import annotations

from collections.abc import Iterator

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning


def restore_finetuned_groups(trainer: Trainer, module: LightningModule) -> None:
    """Brings back the groups that were added before a resume, wherever the callback stands; may be called twice."""
    for callback in _finetuning(trainer):
        callback.on_fit_start(trainer, module)


def note_finetuned_groups(trainer: Trainer, module: LightningModule) -> None:
    """Tells the callbacks the present groups of the optimizers: the names have changed, and there is one group more."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for callback in _finetuning(trainer):
        for number, optimizer in enumerate(trainer.optimizers):
            if number in callback._internal_optimizer_metadata:
                groups = callback._apply_mapping_to_param_groups(optimizer.param_groups, names)
                callback._internal_optimizer_metadata[number] = groups


def keeps_last_group(trainer: Trainer) -> bool:
    """Whether a callback sets the learning rate of an optimizer's last group, which it takes for its own."""
    return any(isinstance(callback, BackboneFinetuning) for callback in _finetuning(trainer))


def _finetuning(trainer: Trainer) -> Iterator[BaseFinetuning]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        if isinstance(callback, BaseFinetuning):
            yield callback
