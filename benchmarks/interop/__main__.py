"""`python -m benchmarks.interop COMMAND`: see README.md in the folder above."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from swincompress_pl.report.plain import write_text

from .. import runner
from ..pruning.subjects import CACHE_HELP, DATA_HELP, Place

_RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    """Runs one command; 1 where a job failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run the jobs that have no result yet; speed wants a quiet machine")
    run.set_defaults(command=_run)
    run.add_argument("--filter", nargs="*", default=[], help="patterns of the names of jobs (fnmatch); default: all")
    run.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    run.add_argument("--cache", type=Path, required=True, help=CACHE_HELP)
    run.add_argument("--threads", type=int, default=2, help="of torch")
    run.add_argument("--rounds", type=int, default=9, help="samples of each runtime")
    run.add_argument("--commit", default=None)
    report = commands.add_parser("report", help="write benchmarks/results/interop.json and its page")
    report.set_defaults(command=_report)
    for command in (run, report):
        command.add_argument("--out", type=Path, required=True, help="of results")
    given = parser.parse_args()
    return int(given.command(given) or 0)


def _run(given: argparse.Namespace) -> int:
    from .work import all_jobs

    settings = {
        "place": Place(data=given.data, cache=given.cache),
        "commit": given.commit or runner.commit(),
        "rounds": given.rounds,
    }
    outcome = runner.run(
        runner.chosen(all_jobs(), given.filter), given.out, settings, work="benchmarks.interop.work",
        threads=given.threads,
    )  # fmt: skip
    print(outcome)
    return 1 if outcome.failed else 0


def _report(given: argparse.Namespace) -> None:
    from ..pages import write_pages

    kept = _RESULTS / "interop.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    results |= {file.stem: runner.read_result(given.out, file.stem) for file in sorted(given.out.glob("*.json"))}
    print(write_text(kept, json.dumps(results, indent=1, allow_nan=False) + "\n"))
    print(*write_pages(["interop"]), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
