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
    parts = [f"# {_text(record.name)}"]
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
        lead = f"**{_text(item.lead)}**" if item.lead and item.mood != "good" else _text(item.lead)
        lines.append(f"- {lead}: {_text(item.text)}" if lead else f"- {_text(item.text)}")
    shown = [images[name] for name in section.plots if name in images]
    return [
        f"## {section.title}",
        _text(section.text),
        _table(section.table) if section.table else "",
        "\n".join(lines),
        *(f"![{_text(title)}]({file})" for title, file in shown),
    ]


def _table(given: Table) -> str:
    return table([_text(cell) for cell in given.header], [[_text(cell) for cell in row] for row in given.rows])


def _text(given: str) -> str:
    """Escapes text, so that a name cannot become HTML, a link, an image or a block of its own."""
    return re.sub(r"([\\<\[`])", r"\\\1", printable(given))


def __getattr__(name: str) -> Any:
    return find_old_name("report.markdown", name)
