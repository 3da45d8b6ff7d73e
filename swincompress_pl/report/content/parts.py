"""What a report's content is made of: sections with sentences, items, a table and the names of plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain text; the first column reads from the left, the others are figures. long: a reader need not see it all."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    long: bool = False

    @classmethod
    def of(cls, header: Sequence[str], rows: Iterable[Sequence[str]], *, long: bool = False) -> Table:
        """From any sequences."""
        return cls(header=tuple(header), rows=tuple(tuple(row) for row in rows), long=long)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A line of a list, led by a word or name where it has one; mood: whether it is news that must be seen."""

    text: str
    lead: str = ""
    mood: Literal["", "good", "bad"] = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report; plots are names of `plots.draw.PLOTS`, shown where they were drawn."""

    title: str
    text: str = ""
    table: Table | None = None
    items: tuple[Item, ...] = ()
    plots: tuple[str, ...] = ()


class Tile(NamedTuple):
    """A figure that a reader looks for first, what it is of, and what there is to say of it."""

    what: str
    value: str
    detail: str
