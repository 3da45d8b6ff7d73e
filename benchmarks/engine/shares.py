"""`python -m benchmarks.engine.shares`: what part of the products' peak whole networks reach, by kind of operation."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from swincompress_pl import accel
from swincompress_pl.accel.profile import Profile
from swincompress_pl.cli.common import integers
from swincompress_pl.progress import progress_bar
from swincompress_pl.report import describe_environment
from swincompress_pl.report.latency import turned
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from .measure import export_random
from .report import counted, environment

TITLE = "Shares of the peak"
MODELS = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "deit_small_patch16_224",
    "deit_tiny_patch16_224",
)
_RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes shares.json and shares.md; returns 1 when implementations give other integers."""
    command = ArgumentParser(prog="python -m benchmarks.engine.shares", description=main.__doc__)
    command.add_argument("--model", type=str, default=",".join(MODELS), help="names for create_model")
    command.add_argument(
        "--implementation", type=str, default=None, help="names, separated by commas; without it all but scalar"
    )
    command.add_argument("--threads", type=str, default="1,2", help="numbers of threads")
    command.add_argument("--rounds", type=int, default=7, help="samples of each number of threads")
    command.add_argument("--repeats", type=int, default=5, help="profiled calls of a sample")
    command.add_argument("--output", type=str, default=str(_RESULTS), help="directory of the results")
    given = command.parse_args(arguments)
    best = [name for name in accel.implementations() if name != "scalar"]
    names = given.implementation.split(",") if given.implementation else best
    rows: list[dict[str, Any]] = []
    with progress_bar() as tell, tempfile.TemporaryDirectory() as directory:
        for number, model in enumerate(given.model.split(",")):
            tell(model, number, len(given.model.split(",")))
            file = Path(directory) / "model.safetensors"
            export_random(model, file)
            rows += measure(model, file, names, integers(given.threads, "--threads"), given.rounds, given.repeats)
    figures = {"rows": rows, "environment": describe_environment()}
    write_text(Path(given.output) / "shares.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    text = "\n\n".join([f"# {TITLE}", *sections(figures)]) + "\n"
    print(text)
    print(write_text(Path(given.output) / "shares.md", text))
    return 0 if all(row["equal"] for row in rows) else 1


def measure(
    model: str, file: Path, names: Sequence[str], threads: Sequence[int], rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """A row per implementation and number of threads; they take turns, and each profile measures the peak again."""
    engines = {
        (name, count): accel.load(file, threads=count, implementation=name) for name in names for count in threads
    }
    first = next(iter(engines.values()))
    image = np.random.default_rng(0).integers(0, 256, (1, *first.input_shape), dtype=np.uint8)
    answers = [engine.run_integer(image) for engine in engines.values()]
    profiles: dict[tuple[str, int], list[Profile]] = {key: [] for key in engines}
    labels = {f"{name} {count}": (name, count) for name, count in engines}
    for number in range(rounds):
        for label in turned(list(labels), number):
            key = labels[label]
            profiles[key].append(engines[key].profile(image, repeats=repeats))
    equal = all(bool(np.array_equal(answer, answers[0])) for answer in answers)
    return [
        {"model": model, "implementation": name, "threads": count, "equal": equal} | summary(found)
        for (name, count), found in profiles.items()
    ]


def summary(profiles: Sequence[Profile]) -> dict[str, Any]:
    """Medians over the samples: the whole time, and per kind its time and rate; the peak is the best of all samples."""
    times: dict[str, list[float]] = defaultdict(list)
    macs: dict[str, int] = defaultdict(int)
    for profile in profiles:
        found: dict[str, float] = defaultdict(float)
        for row in profile:
            found[row.kind.split("+")[0]] += row.time_ms
        for kind, time_ms in found.items():
            times[kind].append(time_ms)
    for row in profiles[0]:
        macs[row.kind.split("+")[0]] += row.macs
    whole = [sum(row.time_ms for row in profile) for profile in profiles]
    return {
        "samples_ms": whole,
        "median_ms": float(np.median(whole)),
        "macs": profiles[0].macs,
        "peak_gmacs_per_second": max(profile.peak_gmacs_per_s or 0.0 for profile in profiles),
        "kinds": {kind: {"median_ms": float(np.median(times[kind])), "macs": macs[kind]} for kind in times},
    }


def share(row: dict[str, Any], kind: str | None = None) -> float:
    """The part of the peak that a network, or one kind of its operations, reaches."""
    part = row if kind is None else row["kinds"][kind]
    return float(part["macs"] / part["median_ms"] / 1e6 / row["peak_gmacs_per_second"])


def _gain(row: dict[str, Any], alone: dict[str, Any] | None) -> str:
    """How many times faster than one thread, and the same of the peak."""
    if alone is None or row is alone:
        return "-"
    peak = row["peak_gmacs_per_second"] / alone["peak_gmacs_per_second"]
    return f"{alone['median_ms'] / row['median_ms']:.2f}; {peak:.2f}"


def sections(figures: dict[str, Any]) -> list[str]:
    """A table of all rows, and how it was measured."""
    alone = {(row["model"], row["implementation"]): row for row in figures["rows"] if row["threads"] == 1}
    lines = []
    for row in figures["rows"]:
        low, high = np.quantile(row["samples_ms"], (0.25, 0.75))
        lines.append(
            [
                row["model"],
                row["implementation"],
                str(row["threads"]),
                f"{row['median_ms']:.2f} [{low:.2f}, {high:.2f}]",
                f"{row['peak_gmacs_per_second']:.0f}",
                f"{share(row):.0%}",
                *(f"{share(row, kind):.0%}" if kind in row["kinds"] else "-" for kind in ("linear", "attention")),
                _gain(row, alone.get((row["model"], row["implementation"]))),
            ]
        )
    header = [
        "network",
        "instructions",
        "threads",
        "ms",
        "peak, GMAC/s",
        "whole",
        "linear",
        "attention",
        "threads gain; the peak",
    ]
    samples = len(figures["rows"][0]["samples_ms"])
    equal = all(row["equal"] for row in figures["rows"])
    return [
        "Whole networks with random weights, batch 1: sums over the steps of the engine's profile, medians of "
        f"{counted(samples, 'sample')} in turns, quartiles in brackets. The peak is what the products of the linear "
        "layers reach on operands in registers, the best of those measured beside each sample, and a share is the part "
        "of it that multiply-accumulates per second make. The integers of all rows of a network "
        f"{'are equal' if equal else '**DIFFER**'}.",
        table(header, lines),
        environment(figures["environment"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
