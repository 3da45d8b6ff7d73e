"""`python -m benchmarks.engine.gemm`: the int8 linear layers of Swin-T alone, in every implementation in turns."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from swincompress_pl.cli.common import integers
from swincompress_pl.progress import progress_bar
from swincompress_pl.report import describe_environment
from swincompress_pl.report.comparison.kernels import bench_linear
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from .report import counted

TITLE = "int8 linear layers of Swin-T, alone"
_RESULTS = Path(__file__).resolve().parent.parent / "results"
# (rows, outputs, inputs) of the four stages at 224 pixels: qkv, projection, fc1, fc2, and the merging before a stage.
_STAGES = ((3136, 96), (784, 192), (196, 384), (49, 768))
SHAPES = tuple(
    shape
    for number, (rows, width) in enumerate(_STAGES)
    for shape in (
        *(((rows, width, 2 * width),) if number else ()),
        (rows, 3 * width, width),
        (rows, width, width),
        (rows, 4 * width, width),
        (rows, width, 4 * width),
    )
)


def main() -> int:
    """Runs the benchmark and writes its results; returns 1 when an answer differs from the specification's."""
    command = ArgumentParser(prog="python -m benchmarks.engine.gemm", description=main.__doc__)
    command.add_argument("--threads", type=str, default="1,2", help="numbers of threads")
    command.add_argument("--rounds", type=int, default=50, help="samples of each implementation")
    command.add_argument("--output", type=str, default=str(_RESULTS), help="directory of the results")
    given = command.parse_args()
    rows = []
    with progress_bar() as tell:
        for threads in integers(given.threads, "--threads"):
            for number, (m, n, k) in enumerate(SHAPES):
                tell(f"{m} x {n} x {k}, {threads} thread(s)", number, len(SHAPES))
                benches = bench_linear(rows=m, outputs=n, inputs=k, threads=threads, rounds=given.rounds)
                rows += [{"shape": (m, n, k), "threads": threads} | bench.to_dict() for bench in benches]
    figures = {"rows": rows, "environment": describe_environment()}
    write_text(Path(given.output) / "gemm.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    text = markdown(figures)
    print(text)
    print(write_text(Path(given.output) / "gemm.md", text))
    return 0 if all(row["equal_to_norm"] for row in rows) else 1


def markdown(figures: dict[str, Any]) -> str:
    """The results as a page."""
    return "\n\n".join([f"# {TITLE}", *sections(figures)]) + "\n"


def sections(figures: dict[str, Any], heading: str = "## {}") -> list[str]:
    """GMAC/s by shape, the median and the best sample, under a heading for each number of threads."""
    rows: Sequence[dict[str, Any]] = figures["rows"]
    environment = figures["environment"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    parts = [
        "GMAC/s of one layer with bias and requantization to int8, batch 1 at 224 pixels. The figures are medians. "
        "Brackets hold the fastest sample and the median's share of the peak. The peak is what the same products reach "
        "on operands in registers, measured between the samples. Times are those of the engine's step in its profile. "
        "The answers of every implementation are compared with the specification in the same run.",
    ]
    for threads in dict.fromkeys(row["threads"] for row in rows):
        lines = []
        for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
            found = {
                row["implementation"]: row for row in rows if row["threads"] == threads and tuple(row["shape"]) == shape
            }
            lines.append(["x".join(map(str, shape)), *(_cell(found[name]) for name in names)])
        peaks = [f"{max(_peaks(rows, threads, name)):.0f}" for name in names]
        lines.append(["peak", *peaks])
        parts += [heading.format(counted(threads, "thread")), table(["rows x outputs x inputs", *names], lines)]
    equal = all(row["equal_to_norm"] for row in rows)
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    parts.append(f"Answers {'equal' if equal else '**DIFFER from**'} the specification's.")
    parts.append(
        f"{environment['date']}, commit {environment['commit']}, {environment['cpu']} "
        f"({', '.join(environment['cpu_flags'])}), {environment['cores']} cores, Python {environment['python']}, "
        f"{packages}."
    )
    return parts


def _peaks(rows: Sequence[dict[str, Any]], threads: int, name: str) -> list[float]:
    return [row["peak_gmacs_per_second"] for row in rows if row["threads"] == threads and row["implementation"] == name]


def _cell(row: dict[str, Any]) -> str:
    best = row["macs"] / min(row["latency"]["samples_ms"]) / 1e6
    return f"{row['gmacs_per_second']:.0f} ({best:.0f}, {row['gmacs_per_second'] / row['peak_gmacs_per_second']:.0%})"


if __name__ == "__main__":
    sys.exit(main())
