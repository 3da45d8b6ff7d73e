"""SIGTERM ends a search or an exchange to integers at once, as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

TERMINATED = 128 + signal.SIGTERM


@contextmanager
def ended_by_sigterm(trainer: Trainer) -> Iterator[None]:
    """Raises Lightning's SIGTERMException, with the exit code 143, as soon as SIGTERM comes inside the context.

    Lightning only notes the signal and ends after the batch, but a search may take hours before its next batch. Where
    SLURM requeues the job, and in a thread other than the main one, nothing changes: Lightning bypasses SIGTERM there,
    as the signal to requeue follows.
    """
    if threading.current_thread() is not threading.main_thread() or _requeues(trainer):
        yield
        return
    before, process = signal.getsignal(signal.SIGTERM), os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker of a data loader, which the loader ends so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # Lightning's handler tells the other ranks by a collective, which would wait for those that search. They hear
        # of the exception instead.
        if callable(before) and trainer.world_size == 1:
            before(number, frame)
        raise SIGTERMException(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _requeues(trainer: Trainer) -> bool:
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and bool(environment.auto_requeue)
