"""Which names of timm, torchvision and transformers work: the table of docs/reference/coverage.md.

python -m benchmarks.coverage              (all rows, several minutes; writes the JSON and the page)
python -m benchmarks.coverage --only swin  (names with that text, printed only)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.coverage.networks import CASES
from benchmarks.coverage.page import page
from benchmarks.coverage.rows import row_of
from swincompress_pl.report.plain import write_text

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/coverage.json", ROOT / "docs/reference/coverage.md"


def main() -> None:
    """Runs the rows; the files are written only if all were run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the names that contain this")
    only = parser.parse_args().only
    rows = []
    for case in CASES:
        if only in case.name:
            rows.append(row_of(case))
            print(json.dumps(rows[-1]), flush=True)
    if not only:
        write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
        write_text(PAGE, page(rows))


if __name__ == "__main__":
    main()
