"""The run directory: report.json, report.md and the plots."""

from __future__ import annotations

from pathlib import Path

from swincompress_pl.report.markdown import render_markdown
from swincompress_pl.report.plots import render_plots
from swincompress_pl.report.record import RECORD_FILE, RunRecord, write_text

MARKDOWN_FILE = "report.md"


def write_report(record: RunRecord, directory: str | Path) -> Path:
    """Writes report.json, the plots and report.md into `directory` (made if need be); returns the path of report.md."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: a report goes into a directory, and this is a file; name another output")
    record.save(target / RECORD_FILE)
    return _render(record, target)


def render_report(directory: str | Path) -> Path:
    """Renders report.md and the plots again from `directory`/report.json; returns the path of report.md."""
    target = Path(directory)
    if target.name == RECORD_FILE:
        target = target.parent
    return _render(RunRecord.load(target), target)


def _render(record: RunRecord, directory: Path) -> Path:
    plots = render_plots(record, directory)
    images = [(title, file.name) for title, file in plots]
    return write_text(directory / MARKDOWN_FILE, render_markdown(record, images))
