"""Verdicts that outlive the process, so that a killed search goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swincompress_pl.files import write_file
from swincompress_pl.pruning.evaluation.scorer import Verdict

Widths = Mapping[str, int]
"""{target: units that stay}; a target that is not named keeps all."""

_VERSION = 1


class EvaluationCache:
    """Verdicts by widths: in memory, and in a file of JSON lines to which each is added as it falls.

    The first line names what the verdicts are about; a file about something else is a ValueError, as is a damaged one.
    A line that was cut off by a kill at the end of the file is dropped.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self._path, self._known = path, dict[str, Verdict]()
        if path is None:
            return
        header = {"version": _VERSION, "about": fingerprint}
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        whole, rest = lines[:-1], lines[-1]
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            first = (json.dumps(header) + "\n").encode()
            write_file(path, lambda file: file.write(first))
            return
        self._read(path, whole, header)
        if rest:
            with path.open("r+b") as file:  # cut in place: another kill here loses nothing
                file.truncate(path.stat().st_size - len(rest.encode("utf-8")))

    def _read(self, path: Path, lines: list[str], header: dict[str, Any]) -> None:
        try:
            first, *entries = [json.loads(line) for line in lines]
            self._known = {_key(entry["widths"]): Verdict(**entry["verdict"]) for entry in entries}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"evaluation_cache={str(path)!r} is damaged ({error}); remove it, or give another path, to begin anew"
            ) from error
        if first != header:
            raise ValueError(
                f"evaluation_cache={str(path)!r} is about another network, hold-out or constraint; give another path, "
                "or remove it"
            )

    def get(self, widths: Widths) -> Verdict | None:
        """What was found for these widths."""
        return self._known.get(_key(widths))

    def put(self, widths: Widths, verdict: Verdict) -> None:
        """Remember `verdict`."""
        self._known[_key(widths)] = verdict
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"widths": dict(widths), "verdict": asdict(verdict)}) + "\n")


def _key(widths: Widths) -> str:
    return json.dumps(widths, sort_keys=True)
