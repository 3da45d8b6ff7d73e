"""The files of a report: report.json, report.md, report.html and the plots."""

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
    """Writes report.json, the plots, report.md and report.html.

    Args:
        record: What is known about the run.
        directory: Where the files go; it is made if needed.

    Returns:
        The path of report.md.

    Raises:
        NotADirectoryError: If `directory` is a file.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: a report goes into a directory, and this is a file; name another output")
    plots = draw_plots(record)  # first, because a record that cannot be drawn must not replace an earlier report
    record.save(target / RECORD_FILE)
    return _write(record, plots, target)


def render_report(directory: str | Path) -> Path:
    """Renders report.md, report.html and the plots again from report.json.

    Args:
        directory: The directory of the report, or its report.json.

    Returns:
        The path of report.md.

    Raises:
        FileNotFoundError: If report.json is missing.
        RecordError: If report.json is not a record of this version, or cannot be drawn.
    """
    target = Path(directory)
    if target.name == RECORD_FILE:
        target = target.parent
    record = RunRecord.load(target)
    try:
        return _write(record, draw_plots(record), target)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # values that no run gives
        raise RecordError(f"{target / RECORD_FILE}: the record cannot be drawn: {error!r}") from error


def write_html(record: RunRecord, path: str | Path) -> Path:
    """Writes the record as one self-contained HTML page; returns its path."""
    return write_text(path, render_html(record, draw_plots(record)))


def _write(record: RunRecord, plots: list[Plot], directory: Path) -> Path:
    files = save_plots(plots, directory)
    images = {name: (title, file.name) for name, (title, file) in files.items()}
    write_text(directory / HTML_FILE, render_html(record, plots))
    return write_text(directory / MARKDOWN_FILE, render_markdown(record, images))
