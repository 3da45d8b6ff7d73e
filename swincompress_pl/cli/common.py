"""What the sub-commands share: the parser, checks of arguments and output. It needs the standard library only."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from swincompress_pl.cli import PROGRAM


def parser(name: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser for `swincompress name` whose --help ends with examples; it exits with code 2 on wrong arguments."""
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=textwrap.fill(description, 100),
        epilog=epilog(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of examples as they are
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
