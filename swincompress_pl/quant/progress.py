"""The progress of a long call: a bar or lines, or a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from swincompress_pl.progress import progress_bar

Progress = bool | Callable[[str, int, int], object]
"""True shows bars in a terminal or a notebook and lines elsewhere, and False shows nothing. A function is called with
the name of the step, the steps done and the steps in total, before each step and at the end of each kind of step."""

T = TypeVar("T")


def track(items: Sequence[T], what: str, progress: Progress) -> Iterator[T]:
    """Yields the items and reports the progress."""
    if not progress:
        yield from items
        return
    with nullcontext(progress) if callable(progress) else progress_bar() as report:
        for done, item in enumerate(items):
            report(what, done, len(items))
            yield item
        report(what, len(items), len(items))
