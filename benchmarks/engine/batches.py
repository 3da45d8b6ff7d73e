"""`python -m benchmarks.engine.batches`: an image alone against an image of a batch, in turns in one process."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from swincompress_pl import accel
from swincompress_pl.cli.common import integers
from swincompress_pl.report import describe_environment
from swincompress_pl.report.latency import Latency, measure, ratio
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from .measure import export_random

_RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes batches.json and batches.md; returns 1 when the two ways give other integers."""
    command = ArgumentParser(prog="python -m benchmarks.engine.batches", description=main.__doc__)
    command.add_argument("--model", type=str, default="swin_tiny_patch4_window7_224", help="names for create_model")
    command.add_argument("--batch", type=int, default=8, help="images per call")
    command.add_argument("--threads", type=str, default="1,2", help="numbers of threads")
    command.add_argument("--rounds", type=int, default=25, help="samples of each way")
    command.add_argument("--output", type=str, default=str(_RESULTS), help="directory of the results")
    given = command.parse_args(arguments)
    rows = []
    for model in given.model.split(","):
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.safetensors"
            export_random(model, file)
            for threads in integers(given.threads, "--threads"):
                rows.append({"model": model} | compare(file, threads, given.batch, given.rounds))
    figures = {"batch": given.batch, "rows": rows, "environment": describe_environment()}
    write_text(Path(given.output) / "batches.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    text = markdown(figures)
    print(text)
    print(write_text(Path(given.output) / "batches.md", text))
    return 0 if all(row["equal"] for row in rows) else 1


def compare(file: Path, threads: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times an image by calls of one and by calls of `batch`, a sample of each in every round."""
    engine = accel.load(file, threads=threads)
    images = np.random.default_rng(0).integers(0, 256, (batch, *engine.input_shape), dtype=np.uint8)

    def alone() -> list[Any]:
        return [engine.run_integer(images[number : number + 1]) for number in range(batch)]

    equal = bool(np.array_equal(np.concatenate(alone()), engine.run_integer(images)))
    ways = {"alone": alone, "batch": lambda: engine.run_integer(images)}
    passes = measure(ways, rounds=rounds, threads=threads)
    an_image = {
        way: Latency(samples_ms=tuple(ms / batch for ms in found.samples_ms), threads=threads)
        for way, found in passes.items()
    }
    of_batch = ratio(an_image["batch"], an_image["alone"])
    return {
        "threads": threads,
        "equal": equal,
        "ratio": of_batch.median,
        "ratio_quartiles": list(of_batch.quartiles),
        **{way: found.to_dict() for way, found in an_image.items()},
    }


def markdown(figures: dict[str, Any]) -> str:
    """The results as a page."""
    return "\n\n".join([f"# {title(figures)}", *sections(figures)]) + "\n"


def title(figures: dict[str, Any]) -> str:
    """What is compared."""
    return f"One image per call against {figures['batch']} images per call"


def sections(figures: dict[str, Any]) -> list[str]:
    """Text, table and machine."""
    batch, environment = figures["batch"], figures["environment"]
    header = [
        "model", "threads", "ms per image, alone", f"ms per image, in a batch of {batch}", "ratio [quartiles]",
        "answers equal",
    ]  # fmt: skip
    lines = [
        [
            row["model"],
            str(row["threads"]),
            *(f"{row[way]['median_ms']:.2f}" for way in ("alone", "batch")),
            f"{row['ratio']:.3f} [{row['ratio_quartiles'][0]:.3f}, {row['ratio_quartiles'][1]:.3f}]",
            "yes" if row["equal"] else "**NO**",
        ]
        for row in figures["rows"]
    ]
    return [
        "The engine runs both ways in turns, in one process, with random weights. Times are medians; ratios are taken "
        "round by round.",
        table(header, lines),
        f"{environment['date']}, commit {environment['commit']}, {environment['cpu']} "
        f"({', '.join(environment['cpu_flags'])}), {environment['cores']} cores.",
    ]


if __name__ == "__main__":
    sys.exit(main())
