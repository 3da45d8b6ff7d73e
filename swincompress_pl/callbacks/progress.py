"""A bar for the search that stands beside Lightning's own."""

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
"""(what was just tried, how many tries there are at most)"""
_EVERY_S = 10.0


@contextmanager
def search_progress(trainer: Trainer, description: str, total: int | None) -> Iterator[ReportProgress]:
    """Shows the tries of a search: a bar in the trainer's progress bar (rich or tqdm), else a line now and then.

    total: how many tries there are, None where that is not known before the first. The bar goes when the context ends,
    also by an exception.
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
        line.refresh()  # tqdm leaves out what follows within 0.1 s; a step is worth being seen

    try:
        yield report_progress
    finally:
        line.close()


class _Lines:
    """A line every ten seconds."""

    def __init__(self, description: str) -> None:
        self._description, self._tried, self._last = description, 0, time.monotonic()

    def __call__(self, text: str, total: int) -> None:
        self._tried += 1
        if time.monotonic() - self._last >= _EVERY_S:
            self._last = time.monotonic()
            rank_zero_info(f"{self._description}: {self._tried} of {total}; {text}")
