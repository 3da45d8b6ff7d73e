"""Verdicts that outlive the process, so that a killed search continues where it stopped."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from swincompress_pl.arguments import as_float, shown
from swincompress_pl.files import append_line, write_file
from swincompress_pl.pruning.evaluation.scorer import Verdict

Widths = Mapping[str, int]
"""{target: units that stay}; a target that is not named keeps all of its units."""

_VERSION = 2
_OF_0_1 = 1
_ENTRY = b'{"widths": '  # how an entry begins


class EvaluationCache:
    """Verdicts by widths, in memory and in a file of JSON lines to which each verdict is added at once.

    The first line says what the verdicts are about. A last line that a kill cut off is dropped. Several processes may
    add to one file.

    Args:
        path: The file; None for memory only.
        fingerprint: A string that identifies everything that the verdicts depend on.
        earlier: The fingerprint of version 0.1; None if a file of that version cannot be used.
        units: Maps a target to its number of units.

    Raises:
        ValueError: If the file is not a cache, is about something else, or has an entry that is not a verdict. The file
            is left as it is.
    """

    def __init__(
        self,
        path: Path | None = None,
        fingerprint: str = "",
        *,
        earlier: str | None = None,
        units: Mapping[str, int] | None = None,
    ) -> None:
        self._path, self._known, self._units = path, dict[str, Verdict](), units or {}
        if path is None:
            return
        if path.exists() and not path.is_file():
            raise ValueError(f"evaluation_cache={str(path)!r} is no file; give the path of one, or of a new one")
        content = path.read_bytes() if path.exists() else b""
        if not content:
            _begin(path, fingerprint)
            return
        first, *lines = content.split(b"\n")
        self._check_header(first, fingerprint, earlier)
        rest = lines.pop() if lines else None
        if rest is None:
            append_line(path, first)
        for number, line in enumerate(lines, 2):
            self._read(line, number)
        if rest:
            self._take_up(rest, len(lines) + 2)

    def _check_header(self, line: bytes, fingerprint: str, earlier: str | None) -> None:
        header = _parsed(line)
        if not isinstance(header, dict) or header.keys() != {"version", "about"}:
            raise ValueError(
                f"evaluation_cache={str(self._path)!r} is no evaluation cache, so nothing is written to it; give "
                "another path"
            )
        if header["version"] == _OF_0_1 and header["about"] == earlier:
            warnings.warn(
                f"evaluation_cache={str(self._path)!r} is of version 0.1, which did not note all that its verdicts "
                "depend on. Of the hold-out, only the labels and the first and last image are compared. If anything "
                "else of it has changed since then, remove the file",
                stacklevel=2,
            )
        elif header != {"version": _VERSION, "about": fingerprint}:
            raise ValueError(
                f"evaluation_cache={str(self._path)!r} is about another network, hold-out or constraint (another "
                "`evaluate` or predict, other calibration images, unit scores or options count as well); give another "
                "path, or remove the file"
            )

    def _read(self, line: bytes, number: int) -> None:
        entry = _parsed(line)
        problem = _problem(entry, self._units)
        if problem:
            raise ValueError(
                f"evaluation_cache={str(self._path)!r} is damaged: line {number}: {problem}; remove the line or the "
                "file, or give another path"
            )
        self._known[_key(entry["widths"])] = Verdict(**entry["verdict"])

    def _take_up(self, rest: bytes, number: int) -> None:
        """Reads an unfinished last line: an entry, or what a kill left of one, which the next entry replaces."""
        assert self._path is not None
        if _parsed(rest) is None and (rest.startswith(_ENTRY) or _ENTRY.startswith(rest)):
            return
        self._read(rest, number)
        append_line(self._path, rest)

    def get(self, widths: Widths) -> Verdict | None:
        """The verdict for these widths; None if it is unknown."""
        return self._known.get(_key(widths))

    def put(self, widths: Widths, verdict: Verdict) -> None:
        """Keeps a verdict."""
        self._known[_key(widths)] = verdict
        if self._path is not None:
            append_line(self._path, json.dumps({"widths": dict(widths), "verdict": asdict(verdict)}).encode())


def _begin(path: Path, fingerprint: str) -> None:
    """Makes a new file with its header; if that fails, there is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = (json.dumps({"version": _VERSION, "about": fingerprint}) + "\n").encode()
    write_file(path, lambda file: file.write(first))


def _parsed(line: bytes) -> Any:
    """The value of a line of JSON; None if it is not JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _problem(entry: Any, units: Mapping[str, int]) -> str:
    """What is wrong with an entry; empty if nothing is."""
    if not isinstance(entry, dict) or entry.keys() != {"widths", "verdict"}:
        return "it is no JSON of widths and a verdict"
    widths, verdict = entry["widths"], entry["verdict"]
    if not isinstance(widths, dict) or not isinstance(verdict, dict):
        return "widths and verdict have to be objects"
    for name, width in widths.items():
        if name not in units or type(width) is not int or not 0 < width <= units[name]:
            return f"widths[{shown(name)}] is {shown(width)}; the network has {units.get(name, 'no such target')}"
    if verdict.keys() != {field.name for field in fields(Verdict)}:
        return "the verdict has to have " + ", ".join(field.name for field in fields(Verdict))
    for name, holds in _VALUES.items():
        if not holds(verdict[name]):
            return f"{name} is {shown(verdict[name])}"
    return ""


def _is_number(value: Any, most: float) -> bool:
    found = as_float(value)
    return found is not None and math.isfinite(found) and 0 <= found <= most


_VALUES: dict[str, Callable[[Any], bool]] = {
    "score": lambda value: _is_number(value, 100),
    "accepted": lambda value: type(value) is bool,
    "images": lambda value: type(value) is int and value >= 0,
    "exact": lambda value: type(value) is bool,
    "error_points": lambda value: _is_number(value, math.inf),
}


def _key(widths: Widths) -> str:
    return json.dumps(widths, sort_keys=True)
