"""Keeps Lightning's averages of weights (EMA, SWA) across a change of the network."""

from __future__ import annotations

from collections.abc import Callable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


def renew_averages(trainer: Trainer, module: LightningModule, rename: Callable[[str], str] = lambda name: name) -> None:
    """Gives every WeightAveraging callback a copy of `module` as it is now, with what it has averaged so far.

    New parameters, the scales, start with their present values. It does nothing outside of a fit.

    Args:
        trainer: The trainer, whose callbacks are searched.
        module: The module after the change.
        rename: Maps the former name of a parameter of `module` to the present one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        if not isinstance(callback, WeightAveraging) or callback._average_model is None:
            continue
        before = callback._average_model.state_dict()
        callback.setup(trainer, module, "fit")
        average = callback._average_model
        now = average.state_dict()
        carried = {_renamed(name, rename): value for name, value in before.items()}
        kept = {name: value for name, value in carried.items() if name in now and now[name].shape == value.shape}
        average.load_state_dict(now | kept)


def _renamed(name: str, rename: Callable[[str], str]) -> str:
    prefix = "module."
    return prefix + rename(name.removeprefix(prefix)) if name.startswith(prefix) else name
