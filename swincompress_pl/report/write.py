"""The run directory: report.json, report.md, report.html and the plots."""

from __future__ import annotations

from pathlib import Path

from swincompress_pl.report.html import render_html
from swincompress_pl.report.markdown import render_markdown
from swincompress_pl.report.plain import write_text
from swincompress_pl.report.plots.draw import Plot, draw_plots, save_plots
from swincompress_pl.report.record import RECORD_FILE, RecordError, RunRecord

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"


def write_report(record: RunRecord, directory: str | Path) -> Path:
    """Writes report.json, the plots, report.md and report.html into `directory` (made if need be); returns the path of
    report.md."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: a report goes into a directory, and this is a file; name another output")
    plots = draw_plots(record)  # before anything is written: what cannot be drawn must not replace what is there
    record.save(target / RECORD_FILE)
    return _write(record, plots, target)


def render_report(directory: str | Path) -> Path:
    """Renders report.md, report.html and the plots again from `directory`/report.json; returns the path of
    report.md."""
    target = Path(directory)
    if target.name == RECORD_FILE:
        target = target.parent
    record = RunRecord.load(target)
    try:
        return _write(record, draw_plots(record), target)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # values that no run has
        raise RecordError(f"{target / RECORD_FILE}: the record cannot be drawn: {error!r}") from error


def write_html(record: RunRecord, path: str | Path) -> Path:
    """Writes the record as one HTML page with everything in it, and nothing beside it; returns its path."""
    return write_text(path, render_html(record, draw_plots(record)))


def _write(record: RunRecord, plots: list[Plot], directory: Path) -> Path:
    files = save_plots(plots, directory)
    images = {name: (title, file.name) for name, (title, file) in files.items()}
    write_text(directory / HTML_FILE, render_html(record, plots))
    return write_text(directory / MARKDOWN_FILE, render_markdown(record, images))
