"""Formats figures as a table of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def show(value: float | None, form: str) -> str:
    """A figure in a table; "-" for None."""
    return "-" if value is None else format(value, form)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table with aligned columns, also valid Markdown; the first `text` columns are text, the others are figures."""
    body = [list(header), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in body)) for column in range(len(header))]
    rule = ["-" * width if column < text else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [body[0], rule, *body[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )
