"""What the sub-commands share: the parser, checks of arguments, output and progress."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from swincompress_pl.cli import PROGRAM


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are."""


def parser(name: str, description: str, *examples: str) -> ArgumentParser:
    """A parser for `swincompress name` whose --help ends with examples; it exits with code 2 on wrong arguments."""
    return ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=textwrap.fill(description, 100),
        epilog=epilog(*examples),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def epilog(*examples: str) -> str:
    """The examples as the end of a help text."""
    return "\n".join([f"example{'s' if len(examples) > 1 else ''}:", *(f"  {example}" for example in examples)])


def integers(text: str, option: str, *, count: int | None = None) -> list[int]:
    """The positive integers in "1,2"; a ValueError names the option. `count` is how many there must be."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts) or (count is not None and len(parts) != count):
        expected = (
            "positive integers separated by commas" if count is None else f"{count} positive integers, e.g. 49,384,96"
        )
        raise ValueError(f"{option} is {text!r}; give {expected}")
    return [int(part) for part in parts]


def existing_file(path: str) -> Path:
    """The path of a file; a FileNotFoundError if there is none."""
    file = Path(path)
    if file.is_dir():
        raise FileNotFoundError(f"{file} is a directory; name a file")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    return file


def is_checkpoint(file: Path) -> bool:
    """Whether a file is a torch checkpoint (a ZIP archive) and not an artifact."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def print_json(value: Any) -> None:
    """Prints a JSON document to the standard output."""
    json.dump(value, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def console() -> Console:
    """A console for tables and text on the standard output; unless it is a terminal, lines are not wrapped."""
    shown = Console(highlight=False, markup=False, soft_wrap=True)
    if not shown.is_terminal:
        shown = Console(highlight=False, markup=False, soft_wrap=True, width=200)
    return shown


class ReportProgress(Protocol):
    """Shows progress."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Says what is being done, and how many of its steps are done."""
        ...


@contextmanager
def progress() -> Iterator[ReportProgress]:
    """Shows a progress bar on the standard error until the context ends, or plain lines if it is not a terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("")

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report


class _Lines:
    """Progress without a terminal: one line when something else begins, and none for its single steps."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        kind = what.split(" ")[0]
        if kind != self._shown:
            self._shown = kind
            print(f"{what} ({done}/{total})", file=sys.stderr, flush=True)
