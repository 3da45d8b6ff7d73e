"""`python -m benchmarks.pages`: writes docs/results and docs/assets from the committed JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from .write import DOCS, PAGES, RESULTS, write_headline, write_pages


def main() -> None:
    """Writes every page with its plots, and the README's plot."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=main.__doc__)
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    command.add_argument("--docs", type=Path, default=DOCS, help="folder to write results/ and assets/ into")
    given = command.parse_args()
    for file in [*write_pages(list(PAGES), given.results, given.docs), *write_headline(given.results, given.docs)]:
        print(file)


if __name__ == "__main__":
    main()
