"""SIGINT and SIGTERM end a command without waiting for the batch, also inside Lightning's loops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM)


class EndedBySignal(BaseException):
    """A signal that ends the command.

    It is no KeyboardInterrupt, because Lightning turns that into the exit code 1 and a message of its own.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raises EndedBySignal on SIGINT and SIGTERM; in a thread other than the main one, it does nothing.

    Lightning's trainers only note a SIGTERM, and end after the batch. They call the handler that they find, though, so
    this one's exception ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker of a data loader, which ends silently on a KeyboardInterrupt
            raise KeyboardInterrupt
        raise EndedBySignal(number)

    before = {number: signal.signal(number, end) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
