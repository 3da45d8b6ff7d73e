"""The progress of a long call: a bar in the terminal, or a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich import progress as rich_progress

Progress = bool | Callable[[str, int, int], object]
"""True shows bars in the terminal, and False shows nothing. A function is called with the name of the step, the steps
done and the steps in total, before each step and at the end of each kind of step."""

T = TypeVar("T")


def track(items: Sequence[T], what: str, progress: Progress) -> Iterator[T]:
    """Yields the items and reports the progress."""
    if not callable(progress):
        yield from rich_progress.track(items, what, transient=True, disable=not progress)
        return
    for done, item in enumerate(items):
        progress(what, done, len(items))
        yield item
    progress(what, len(items), len(items))
