"""Shows the progress of a search, in a bar beside Lightning's own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

ReportProgress = Callable[[str, int], None]
"""(what was just tried, the largest number of tries)"""
_EVERY_S = 10.0


@contextmanager
def search_progress(trainer: Trainer, description: str, total: int | None) -> Iterator[ReportProgress]:
    """Shows the tries of a search: as a bar beside the trainer's (rich or tqdm), else as a line now and then.

    The bar disappears when the context ends, also by an exception.

    Args:
        trainer: The trainer of the fit.
        description: What the bar says.
        total: The largest number of tries; None if it is not known before the first.

    Yields:
        The function to call after each try.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and trainer.is_global_zero and bar.progress is not None:
        with _rich_bar(bar, description, total) as report_progress:
            yield report_progress
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled and trainer.is_global_zero:
        with _tqdm_bar(bar, description, total) as report_progress:
            yield report_progress
    else:
        yield _Lines(description)


@contextmanager
def _rich_bar(bar: RichProgressBar, description: str, total: int | None) -> Iterator[ReportProgress]:
    progress = bar.progress
    assert progress is not None
    task = progress.add_task(description, total=math.inf if total is None else total)  # as Lightning marks it

    def report_progress(text: str, total: int) -> None:
        progress.update(task, advance=1, total=total, description=f"{description}: {text}")
        progress.refresh()

    try:
        yield report_progress
    finally:
        # Hidden and not removed: Lightning's metrics column keeps the numbers of the tasks it has drawn.
        progress.update(task, visible=False)
        progress.refresh()


@contextmanager
def _tqdm_bar(bar: TQDMProgressBar, description: str, total: int | None) -> Iterator[ReportProgress]:
    line = Tqdm(
        desc=description,
        total=total,
        position=2 * bar.process_position + 1,  # below the bar of the training epoch
        leave=False,
        dynamic_ncols=True,
        file=sys.stdout,
        smoothing=0,
    )

    def report_progress(text: str, total: int) -> None:
        line.total = total
        line.set_postfix_str(text, refresh=False)
        line.update(1)
        line.refresh()  # tqdm leaves out what follows within 0.1 s, but every step is to be seen

    try:
        yield report_progress
    finally:
        line.close()


class _Lines:
    """Logs a line every ten seconds."""

    def __init__(self, description: str) -> None:
        self._description, self._tried, self._last = description, 0, time.monotonic()

    def __call__(self, text: str, total: int) -> None:
        self._tried += 1
        if time.monotonic() - self._last >= _EVERY_S:
            self._last = time.monotonic()
            rank_zero_info(f"{self._description}: {self._tried} of {total}; {text}")
