"""`python -m benchmarks.gallery COMMAND`: the reports of docs/gallery. See README.md in the folder above."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..pruning.subjects import CACHE_HELP, DATA_HELP, Place
from .pages import GALLERY, render, shoot
from .runs import RUNS


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run compressions and write their records and pages")
    run.set_defaults(command=_run)
    run.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all if left out")
    run.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    run.add_argument("--cache", type=Path, required=True, help=CACHE_HELP)
    again = commands.add_parser("render", help="write the pages again from the committed records")
    again.set_defaults(command=_render)
    shots = commands.add_parser("shoot", help="take pictures of the pages with Chromium")
    shots.set_defaults(command=_shoot)
    shots.add_argument("--browser", default="chromium", help="its command")
    for command in (run, again, shots):
        command.add_argument("--out", type=Path, default=GALLERY, help="folder of records and pages")
    given = parser.parse_args()
    given.command(given)


def _run(given: argparse.Namespace) -> None:
    names = given.names or list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: choose of {', '.join(RUNS)}")
    place = Place(data=given.data, cache=given.cache)
    for name in names:
        RUNS[name](place).save(given.out / f"{name}.json")
        print(*render(given.out, [name]))


def _render(given: argparse.Namespace) -> None:
    print(*render(given.out), sep="\n")


def _shoot(given: argparse.Namespace) -> None:
    print(*shoot(given.out, given.browser), sep="\n")


if __name__ == "__main__":
    main()
