"""How far a long call is: a bar in the terminal, or a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich import progress as rich_progress

Progress = bool | Callable[[str, int, int], object]
"""True: a bar in the terminal. A function: called with (what is done, steps done, steps in all) before each step and at
the end of each kind of step. False: nothing."""

T = TypeVar("T")


def track(items: Sequence[T], what: str, progress: Progress) -> Iterator[T]:
    """The items one after the other, with `progress` shown or told."""
    if not callable(progress):
        yield from rich_progress.track(items, what, transient=True, disable=not progress)
        return
    for done, item in enumerate(items):
        progress(what, done, len(items))
        yield item
    progress(what, len(items), len(items))
