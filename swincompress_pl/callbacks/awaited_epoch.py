"""Warns of fits that end before the epoch that a callback waits for, at the beginning if possible, else at the end."""

from __future__ import annotations

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn


class AwaitedEpoch:
    """Warns once per fit that it does not reach an epoch.

    Args:
        name: Name of the callback's argument that gives the epoch.
        consequence: What follows, such as "nothing is pruned".
    """

    def __init__(self, name: str, consequence: str) -> None:
        self.name, self.consequence = name, consequence
        self._told = False

    def fit_begins(self, trainer: Trainer, epoch: int) -> None:
        """Warns if `max_epochs` already excludes the epoch."""
        self._told = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch
        if self._told:
            rank_zero_warn(
                f"{self.name}={epoch} is not reached in max_epochs={trainer.max_epochs}: {self.consequence}."
            )

    def fit_ends(self, trainer: Trainer, epoch: int) -> None:
        """Warns if something else ended the fit (max_steps, max_time, EarlyStopping), and no warning came before.

        Call it only if what was awaited did not happen.
        """
        done = trainer.current_epoch
        if not self._told and done <= epoch:
            rank_zero_warn(
                f"the fit ended after {done} epochs, before {self.name}={epoch}: {self.consequence}. Choose an earlier "
                "epoch, or let the fit go on (max_epochs, max_steps, max_time, EarlyStopping)"
            )
        elif not self._told:
            rank_zero_warn(f"the fit ended after {done} epochs, none of which was chosen: {self.consequence}")
        self._told = False
