"""A progress bar for loops that take longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

SILENT_S = 2.0
Item = TypeVar("Item")


def with_progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yields the items, `total` of them, and shows a bar on the standard error after two seconds."""
    started_s = time.monotonic()
    progress: Progress | None = None
    try:
        for done, item in enumerate(items):
            if progress is None and time.monotonic() - started_s > SILENT_S:
                progress = Progress(console=Console(stderr=True), transient=True)
                task = progress.add_task(description, total=total)
                progress.start()
            if progress is not None:
                progress.update(task, completed=done)
            yield item
    finally:
        if progress is not None:
            progress.stop()
