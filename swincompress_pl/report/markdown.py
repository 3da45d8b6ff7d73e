"""A record as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.printable import printable
from swincompress_pl.report.content.parts import Section, Table
from swincompress_pl.report.content.sections import sections
from swincompress_pl.report.record import RunRecord

_STEPS_SHOWN = 30


def render_markdown(record: RunRecord, images: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The whole report; `images` is {name of a plot: (title, file name beside the report)}."""
    parts = [f"# {escaped(record.name)}"]
    for section in sections(record, steps_shown=_STEPS_SHOWN):
        parts += _section(section, images or {})
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of Markdown cells; the first column is left-aligned, the others are right-aligned."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in [head, *body])) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(row) for row in body)])


def _section(section: Section, images: Mapping[str, tuple[str, str]]) -> list[str]:
    lines = []
    for item in section.items:
        lead = f"**{escaped(item.lead)}**" if item.lead and item.mood != "good" else escaped(item.lead)
        lines.append(f"- {lead}: {escaped(item.text)}" if lead else f"- {escaped(item.text)}")
    shown = [images[name] for name in section.plots if name in images]
    return [
        f"## {section.title}",
        escaped(section.text),
        _table(section.table) if section.table else "",
        "\n".join(lines),
        *(f"![{escaped(title)}]({file})" for title, file in shown),
    ]


def _table(given: Table) -> str:
    return table([escaped(cell) for cell in given.header], [[escaped(cell) for cell in row] for row in given.rows])


def escaped(given: str) -> str:
    """Text in which a name cannot become HTML, a link, an image or a block of its own."""
    return re.sub(r"([\\<\[`])", r"\\\1", printable(given))


def __getattr__(name: str) -> Any:
    return find_old_name("report.markdown", name)
