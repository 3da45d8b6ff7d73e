"""The parts of a report's content: sections with sentences, items, a table and the names of plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of plain text; the first column is text, the others are figures. A `long` one may be folded.

    With `names`, the first column has names of layers, which a page shows in words.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    long: bool = False
    names: bool = False

    @classmethod
    def of(
        cls, header: Sequence[str], rows: Iterable[Sequence[str]], *, long: bool = False, names: bool = False
    ) -> Table:
        """Makes a table of any sequences, without the columns that say "-" in every row."""
        body = [tuple(row) for row in rows]
        kept = [n for n in range(len(header)) if not n or not body or any(row[n].strip("- ") for row in body)]
        return cls(
            header=tuple(header[n] for n in kept),
            rows=tuple(tuple(row[n] for n in kept) for row in body),
            long=long,
            names=names,
        )


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
