"""The parts of a report's content: sections with sentences, items, a table and the names of plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of plain text; the first column is text, the others are figures. A `long` one may be folded."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    long: bool = False

    @classmethod
    def of(cls, header: Sequence[str], rows: Iterable[Sequence[str]], *, long: bool = False) -> Table:
        """Makes a table of any sequences."""
        return cls(header=tuple(header), rows=tuple(tuple(row) for row in rows), long=long)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A line of a list, with an optional lead; `mood` marks good and bad news."""

    text: str
    lead: str = ""
    mood: Literal["", "good", "bad"] = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report; `plots` are names of `plots.draw.PLOTS`, shown if they were drawn."""

    title: str
    text: str = ""
    table: Table | None = None
    items: tuple[Item, ...] = ()
    plots: tuple[str, ...] = ()


class Tile(NamedTuple):
    """A figure that a reader looks for first, with its name and a detail."""

    what: str
    value: str
    detail: str
