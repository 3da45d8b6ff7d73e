"""The progress of a long call: a bar in a terminal or a notebook, and plain lines anywhere else."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

SILENT_S = 2.0  # of a loop that nobody asked about
LINES_S = 10.0  # between the lines of one thing
T = TypeVar("T")


class ReportProgress(Protocol):
    """Shows progress."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Says what is being done, how many of its steps are done, and what the latest one gave."""
        ...


@contextmanager
def progress_bar(delay_s: float = 0.0) -> Iterator[ReportProgress]:
    """Shows a bar on the standard error, or plain lines where there can be none, and removes the bar at the end.

    Args:
        delay_s: For so many seconds nothing is shown.

    Yields:
        The function to call before each step.
    """
    bars = _bars()
    if bars is None:
        yield _Lines(delay_s)
        return
    bar = _Bar(bars, delay_s)
    try:
        yield bar
    finally:
        bar.close()


def with_progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields the items, `total` of them, and shows the progress after two seconds."""
    with progress_bar(SILENT_S) as report:
        for done, item in enumerate(items):
            report(what, done, total)
            yield item


@contextmanager
def told_progress(
    progress: bool | Callable[[T], None], place: Callable[[T], tuple[str, int, int]]
) -> Iterator[Callable[[T], None] | None]:
    """Yields the function to call after each step of a search, or None.

    Args:
        progress: True shows a bar with the latest step beside it, or prints a line per step where there can be no bar.
            A function is yielded as it is, and False becomes None.
        place: What is being done at a step, how many steps are done, and in total.

    Yields:
        The function.
    """
    if progress is not True:
        yield progress or None
    elif _bars() is None:
        yield print
    else:
        with progress_bar() as report:
            yield lambda step: report(*place(step), str(step))


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    return "ipykernel.zmqshell" in sys.modules  # as tqdm decides it


def _bars() -> Any:
    """Tqdm's class of bars for this place; None if bars cannot be drawn here, or tqdm is not installed."""
    if not (sys.stderr.isatty() or in_notebook()):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets, a notebook shows a bar of text, and tqdm warns
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm


class _Bar:
    """A bar that begins again whenever something else is done."""

    def __init__(self, bars: Any, delay_s: float) -> None:
        self._bars, self._delay_s = bars, delay_s
        self._bar: Any = None
        self._stage = ("", 0)

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        if self._bar is None:
            self._bar = self._bars(desc=what, total=total, leave=False, dynamic_ncols=True, delay=self._delay_s)
        elif self._stage != (what, total):
            self._bar.set_description(what, refresh=False)
            if total != self._stage[1] or done < self._bar.n:
                self._bar.reset(total)
        self._stage = (what, total)
        self._bar.update(done - self._bar.n)
        if detail:
            self._bar.set_postfix_str(detail)  # at once: tqdm leaves out what follows within 0.1 s

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines:
    """One line when something else begins, and of its single steps one in a while, with the time that is left."""

    def __init__(self, delay_s: float) -> None:
        self._next_s, self._shown = time.monotonic() + delay_s, ""
        self._total, self._done, self._first, self._first_s = 0, 0, 0, 0.0  # of what is counted

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        now_s, kind = time.monotonic(), what.split(" ")[0]
        if total != self._total or done < self._done:
            self._total, self._first, self._first_s = total, done, now_s
        self._done = done
        if now_s < self._next_s and (kind == self._shown or not self._shown):
            return
        left_s = (now_s - self._first_s) / max(done - self._first, 1) * (total - done)
        left = f", {left_s:.0f} s left" if done > self._first and left_s >= 1 else ""
        print(f"{what} ({done}/{total}){left}", file=sys.stderr, flush=True)
        self._shown, self._next_s = kind, now_s + LINES_S
