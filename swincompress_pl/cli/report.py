"""`swincompress report`."""

from __future__ import annotations

from collections.abc import Sequence

from swincompress_pl.cli.common import parser


def main(name: str, arguments: Sequence[str]) -> int:
    """Renders a run's report again; returns 0."""
    command = parser(
        name,
        "Renders report.md, report.html and the plots of a run again from its report.json.",
        "swincompress report runs/demo",
    )
    command.add_argument("run_dir", type=str, help="directory that holds a report.json")
    given = command.parse_args(list(arguments))
    from swincompress_pl.report import render_report

    print(render_report(given.run_dir))
    return 0
