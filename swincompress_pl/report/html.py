"""A record as one HTML page that needs nothing else: no script, no request, the plots inside, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from swincompress_pl import __version__
from swincompress_pl.report.content.sections import Item, Section, Table, count, megabytes, sections
from swincompress_pl.report.plots.draw import Plot
from swincompress_pl.report.plots.drawing import inline_svg
from swincompress_pl.report.quantization import Quantization, label
from swincompress_pl.report.record import RunRecord, Stage
from swincompress_pl.report.search import PruningSearch

_LONG_ROWS = 12


def render_html(record: RunRecord, plots: Sequence[Plot]) -> str:
    """The whole page; plots: what `draw_plots` gave for this record. Names of any kind are shown as they are."""
    drawn = {plot.name: plot for plot in plots}
    found = sections(record)
    body = [
        f"<h1>{escape(record.name)}</h1>",
        _made(record),
        _tiles(record),
        _contents(found),
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
    """The figures that a reader looks for first."""
    tiles = _stage_tiles(record.stages) if record.stages else []
    if not record.stages and record.pruning is not None:
        tiles = _search_tiles(PruningSearch.of(record.pruning))
    if record.quantization is not None:
        tiles += _quantization_tiles(Quantization.of(record.quantization))
    shown = "".join(
        f'<div class="tile"><div class="what">{escape(what)}</div><div class="value">{escape(value)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for what, value, detail in tiles
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def _stage_tiles(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """(what, value, detail) of the last stage against the first, what both have."""
    first, last = stages[0], stages[-1]
    tiles = []
    if last.accuracy is not None:
        low, high = last.accuracy.interval_percent
        detail = f"95 % interval {low:.2f} to {high:.2f}"
        if last is not first and first.accuracy is not None:
            detail = f"{first.name} {first.accuracy.percent:.2f} %; {detail}"
        tiles.append((f"top-1, {last.name}", f"{last.accuracy.percent:.2f} %", detail))
    sizes = [None if stage.size is None else stage.size.file_bytes for stage in (first, last)]
    for what, (before, after), show in (
        ("file", sizes, megabytes),
        ("parameters", [first.parameters, last.parameters], count),
        ("MACs an image", [first.macs, last.macs], count),
    ):
        if last is not first and before and after is not None:
            share = f"{100 * after / before:.1f} % of {first.name}'s {show(before)}"
            tiles.append((f"{what}, {last.name}", show(after), share))
    return tiles + _latency_tile(first, last)


def _latency_tile(first: Stage, last: Stage) -> list[tuple[str, str, str]]:
    if last is first or not first.latency_ms or not last.latency_ms:
        return []
    fastest = [min(stage.latency_ms.items(), key=lambda entry: entry[1].median_ms) for stage in (first, last)]
    (old, before), (new, after) = fastest
    detail = f"{first.name} in {old}: {before.median_ms:.3g} ms" if before.batch == after.batch else "other batch sizes"
    return [(f"latency in {new}, batch {after.batch}", f"{after.median_ms:.3g} ms", detail)]


def _search_tiles(search: PruningSearch) -> list[tuple[str, str, str]]:
    removed = 100 * (1 - search.parameters / search.baseline_parameters)
    tiles = [
        ("parameters removed", f"{removed:.1f} %", f"{count(search.baseline_parameters)} -> {count(search.parameters)}")
    ]
    if search.baseline_macs and search.macs is not None:
        share = 100 * (1 - search.macs / search.baseline_macs)
        tiles.append(("MACs removed", f"{share:.1f} %", f"{count(search.baseline_macs)} -> {count(search.macs)}"))
    if search.score is not None:
        change = f"{search.score - search.baseline_score:+.2f} points, before {search.baseline_score:.2f}"
        tiles.append(("score on the hold-out", f"{search.score:.2f}", change))
    kept = sum(step.accepted for step in search.steps)
    tiles.append(("rounds", str(search.rounds), f"{kept} of {len(search.steps)} steps kept"))
    if search.scoring is not None and search.scoring.times_fewer_images is not None:
        cost = search.scoring
        detail = f"{cost.images_scored:,}; naive {cost.naive_images:,}"
        tiles.append(("images scored", f"{cost.times_fewer_images:.1f}x fewer", detail))
    return tiles


def _quantization_tiles(known: Quantization) -> list[tuple[str, str, str]]:
    agreement = f"{known.result.agreement_percent:.2f} %"
    tiles = [(f"same predictions as float, {known.bits}", agreement, f"of {known.images:,} images")]
    float_bytes = 4 * sum(layer.weights for layer in known.layers)
    share = f"{100 * known.weights_bytes / float_bytes:.1f} % of float32's {megabytes(float_bytes)}"
    tiles.append(("packed weights", megabytes(known.weights_bytes), share))
    if known.costs:
        tiles.append(("costliest alone", f"KL {known.costs[0].alone.kl:.2g}", label(known.costs[0])))
    return tiles


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
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    text = f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    if table.long and len(table.rows) > _LONG_ROWS:
        return f"<details><summary>All {len(table.rows)} rows</summary>\n{text}\n</details>"
    return text


def _item(item: Item) -> str:
    lead = f"<strong>{escape(item.lead)}</strong>: " if item.lead else ""
    mood = f' class="{item.mood}"' if item.mood else ""
    return f"<li{mood}>{lead}{escape(item.text)}</li>"


def _figure(plot: Plot) -> str:
    drawing = inline_svg(plot.figure, name=plot.name, label=plot.title)
    return f'<figure class="scroll">{drawing}</figure>'
