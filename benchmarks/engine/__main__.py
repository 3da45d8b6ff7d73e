"""`python -m benchmarks.engine`: see benchmarks/README.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from swincompress_pl.cli.common import integers
from swincompress_pl.report.comparison.runtimes import parse_runtimes
from swincompress_pl.report.plain import write_text

from . import avx2_peers, report
from .measure import measure_model

_RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Races every model in every batch and writes the results; returns 1 when the engine's integers differ from the
    reference's. `avx2-peers` as the first argument runs `avx2_peers` instead."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["avx2-peers"]:
        return avx2_peers.main(arguments[1:])
    given = _arguments(arguments)
    models = list(dict.fromkeys(name.strip() for name in given.model.split(",") if name.strip()))
    if not models:
        raise ValueError(f"--model is {given.model!r}; name models separated by commas")
    parse_runtimes(given.against)  # errors of the arguments before any work
    if given.before is not None and not list(Path(given.before).glob("swincompress_pl/accel/_core.*.so")):
        raise ValueError(f"--before is {given.before!r}; it must be a checkout with swincompress_pl/accel/_core.*.so")
    integers(given.threads, "--threads"), integers(given.batch, "--batch")
    output, equal = Path(given.output), True
    for figures in (each for model in models for each in _measure(given, model)):
        equal = equal and figures["answers"]["equal_to_reference"]
        name = f"engine-{figures['model']}-b{figures['batch']}"
        write_text(output / f"{name}.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
        print(report.page(figures))
        print(write_text(output / f"{name}.md", report.page(figures)))
        report.write(output)  # after each, so that a run that is stopped leaves it complete
    return 0 if equal else 1


def _arguments(arguments: Sequence[str] | None) -> Namespace:
    command = ArgumentParser(prog="python -m benchmarks.engine", description=main.__doc__)
    command.add_argument(
        "--model", type=str, default="swin_tiny_patch4_window7_224", help="names for create_model, separated by commas"
    )
    command.add_argument("--threads", type=str, default="1,2", help="numbers of threads, one race each")
    command.add_argument(
        "--batch", type=str, default="1", help="numbers of images per call, with a results file for each"
    )
    command.add_argument("--against", type=str, default="torch,onnxruntime,openvino", help="peers")
    command.add_argument("--implementation", type=str, default=None, help="of the engine; without it the best")
    command.add_argument(
        "--before", type=str, default=None, help="checkout of another commit, with its engine built, that joins in"
    )
    command.add_argument("--rounds", type=int, default=15, help="samples of each runtime")
    command.add_argument("--turn-ms", type=float, default=300.0, help="time of one runtime's turn in a round")
    command.add_argument("--images-checked", type=int, default=2, help="images whose integers are compared")
    command.add_argument("--output", type=str, default=str(_RESULTS), help="directory of the results")
    return command.parse_args(arguments)


def _measure(given: Namespace, model: str) -> Iterator[dict[str, Any]]:
    return measure_model(
        model,
        against=parse_runtimes(given.against),
        batches=integers(given.batch, "--batch"),
        threads=integers(given.threads, "--threads"),
        rounds=given.rounds,
        turn_ms=given.turn_ms,
        images_checked=given.images_checked,
        implementation=given.implementation,
        before=None if given.before is None else Path(given.before).resolve(),
    )


if __name__ == "__main__":
    sys.exit(main())
