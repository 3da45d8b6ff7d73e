"""A record as one HTML page in light and dark, with the plots inside, without scripts and requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from swincompress_pl import __version__
from swincompress_pl.report.content.names import readable
from swincompress_pl.report.content.parts import Item, Section, Table
from swincompress_pl.report.content.sections import sections
from swincompress_pl.report.content.tiles import tiles
from swincompress_pl.report.plots.draw import Plot
from swincompress_pl.report.plots.drawing import inline_svg
from swincompress_pl.report.record import RunRecord

_LONG_ROWS = 12
_BRACKETS = re.compile(r"(.*\S) ([(\[][^()\[\]]*[)\]](?:, n = [\d,]+)?)")
_HINT = '<p class="hint">Plots are wider than this screen: move them sideways.</p>'


def render_html(record: RunRecord, plots: Sequence[Plot]) -> str:
    """The whole page, with the plots that `draw_plots` gave for this record; names are escaped."""
    drawn = {plot.name: plot for plot in plots}
    found = sections(record)
    body = [
        f"<h1>{escape(record.name)}</h1>",
        _made(record),
        _tiles(record),
        _contents(found),
        _HINT if plots else "",
        *(_section(number, section, drawn) for number, section in enumerate(found)),
    ]
    style = files("swincompress_pl.report").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(record.name)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<main>",
            *(part for part in body if part),
            "</main>",
            "</body>",
            "</html>\n",
        ]
    )


def _made(record: RunRecord) -> str:
    known = [record.environment.get("date"), record.environment.get("cpu")]
    parts = [str(part) for part in known if part] + [f"swincompress_pl {__version__}"]
    return f'<p class="made">{escape(" · ".join(parts))}</p>'


def _tiles(record: RunRecord) -> str:
    shown = "".join(
        f'<div class="tile"><div class="what">{escape(tile.what)}</div><div class="value">{escape(tile.value)}</div>'
        f'<div class="detail">{_unbroken(escape(tile.detail))}</div></div>'
        for tile in tiles(record)
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def _unbroken(text: str) -> str:
    """Keeps numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=([kMG]|[kM]B|ms|%)(\W|$))", "\u00a0", text)


def _contents(found: Sequence[Section]) -> str:
    if len(found) < 2:
        return ""
    links = (f'<a href="#s{number}">{escape(section.title)}</a>' for number, section in enumerate(found))
    return f"<nav>{' '.join(links)}</nav>"


def _section(number: int, section: Section, plots: Mapping[str, Plot]) -> str:
    parts = [f'<section id="s{number}">', f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    if section.table is not None:
        parts.append(_table(section.table))
    if section.items:
        parts.append("<ul>" + "".join(map(_item, section.items)) + "</ul>")
    parts += [_figure(plots[name]) for name in section.plots if name in plots]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{_cells(row, table)}</tr>" for row in table.rows)
    text = f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    if table.long and len(table.rows) > _LONG_ROWS:
        return f"<details><summary>All {len(table.rows)} rows</summary>\n{text}\n</details>"
    return text


def _cells(row: Sequence[str], table: Table) -> str:
    first, *others = row
    shown = readable(first) if table.names else first
    title = f' title="{escape(first)}"' if shown != first else ""
    cells = [f"<td{title}>{_breakable(shown)}</td>"]
    for cell, label in zip(others, table.header[1:], strict=True):  # the label is the header on a narrow screen
        empty = ' class="none"' if cell == "-" else ""
        cells.append(f'<td{empty} data-label="{escape(label)}">{_breakable(cell)}</td>')
    return "".join(cells)


def _breakable(cell: str) -> str:
    """A cell that may be broken before what stands in brackets at its end."""
    found = _BRACKETS.fullmatch(cell)
    return f"<b>{escape(found[1])}</b> <i>{escape(found[2])}</i>" if found else escape(cell)


def _item(item: Item) -> str:
    lead = f"<strong>{escape(item.lead)}</strong>: " if item.lead else ""
    mood = f' class="{item.mood}"' if item.mood else ""
    return f"<li{mood}>{lead}{escape(item.text)}</li>"


def _figure(plot: Plot) -> str:
    drawing = inline_svg(plot.figure, name=plot.name, label=plot.title)
    return f'<figure class="scroll">{drawing}</figure>'
