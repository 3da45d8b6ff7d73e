"""`python -m benchmarks.engine avx2-peers`: the engine with AVX2 alone against other runtimes that are held to it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from swincompress_pl import accel
from swincompress_pl.cli.common import integers
from swincompress_pl.progress import progress_bar
from swincompress_pl.report.comparison.runtimes import RUNTIMES, parse_runtimes
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from . import report
from .held import WATCH, check
from .hold_to_avx2 import HELD, build_library, check_tools, hold_to_avx2
from .measure import measure_model

IMPLEMENTATION = "avx2"
MODELS = ("swin_tiny_patch4_window7_224", "deit_tiny_patch16_224")
AGAINST = ("onnxruntime", "onnxruntime-qdq", "onnxruntime-safe", "openvino", "openvino-safe", "torch")
_RESULTS = Path(__file__).resolve().parent.parent / "results" / "avx2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Races the models on one CPU with every runtime held to AVX2, and writes the results; returns 1 when the engine's
    integers differ from the reference's."""
    given = _arguments(arguments)
    models = [name.strip() for name in given.model.split(",") if name.strip()]
    against, batches = parse_runtimes(given.against), integers(given.batch, "--batch")
    threads = integers(given.threads, "--threads")
    _check(against)
    equal = True
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        with progress_bar() as tell:
            tell("replacing cpuid in copies of the runtimes", 0, 1)
            hold = hold_to_avx2(folder)
            watch = build_library(WATCH, folder)
        for model in models:
            for figures in measure_model(
                model, against=against, batches=batches, threads=threads, rounds=given.rounds, turn_ms=given.turn_ms,
                images_checked=given.images_checked, implementation=IMPLEMENTATION, narrow=True,
                check=partial(check, hold=hold, watch=watch),
            ):  # fmt: skip
                equal = equal and figures["answers"]["equal_to_reference"]
                _write(figures, Path(given.output))
    return 0 if equal else 1


def _arguments(arguments: Sequence[str] | None) -> Namespace:
    command = ArgumentParser(prog="python -m benchmarks.engine avx2-peers", description=main.__doc__)
    command.add_argument("--model", type=str, default=",".join(MODELS), help="names for create_model")
    command.add_argument("--threads", type=str, default="1", help="numbers of threads, one race each")
    command.add_argument("--batch", type=str, default="1", help="numbers of images per call, with a file for each")
    command.add_argument("--against", type=str, default=",".join(AGAINST), help="peers")
    command.add_argument("--rounds", type=int, default=9, help="samples of each runtime")
    command.add_argument("--turn-ms", type=float, default=300.0, help="time of one runtime's turn in a round")
    command.add_argument("--images-checked", type=int, default=2, help="images whose integers are compared")
    command.add_argument("--output", type=str, default=str(_RESULTS), help="directory of the results")
    return command.parse_args(arguments)


def _check(against: Sequence[str]) -> None:
    """Raises what makes the race impossible, before any work."""
    check_tools()
    if IMPLEMENTATION not in accel.implementations():
        raise ValueError(f"this CPU has no AVX2; the engine runs {', '.join(accel.implementations())} here")
    loose = [name for name in against if RUNTIMES[name][0].runtime not in HELD]
    if loose:
        raise ValueError(f"--against: {', '.join(loose)} cannot be held to AVX2; runtimes of {', '.join(HELD)} can")


def _write(figures: Mapping[str, Any], folder: Path) -> None:
    name = f"peers-{figures['model']}-b{figures['batch']}"
    write_text(folder / f"{name}.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    parts = [f"# {report.title(figures)}, AVX2", *sections(figures), report.environment(figures["environment"])]
    text = "\n\n".join(parts) + "\n"
    print(text)
    print(write_text(folder / f"{name}.md", text))


def sections(figures: Mapping[str, Any], heading: str = "## {}") -> list[str]:
    """The races, and how each runtime was checked."""
    return [*report.race_sections(figures, heading), *_checks(figures["races"])]


def _checks(races: Sequence[Mapping[str, Any]]) -> list[str]:
    checks = {check["name"]: check for race in races for check in race["checks"]}
    header = ["runtime", "held: wide registers", "free: wide registers", "answers: load; call", "saturates"]
    return [
        "Before the race, each runtime ran twice: held to AVX2 as in the race, and free. After a warm call, the kernel "
        'said which registers of AVX-512 and AMX any of its threads had written ("wide registers"). A runtime that '
        "writes one while it is held does not race. onnxruntime and OpenVINO ask the CPU what it has. Their replaced "
        "answers are counted, while they load and in the call. onnxruntime's sums of 8-bit products are exact with "
        "VNNI, and saturate without it.",
        table(header, [_check_row(found) for found in checks.values()]),
    ]


def _check_row(found: Mapping[str, Any]) -> list[str]:
    held, free = found.get("held", {}), found.get("free", {})
    answers = f"{held['cpuid_answers']}; {held['cpuid_answers_in_call']}" if held.get("cpuid_answers") else "-"
    saturates = {None: "-", True: "yes", False: "no"}[held.get("saturates")]
    return [found["name"], _registers(held), _registers(free), answers, saturates]


def _registers(found: Mapping[str, Any]) -> str:
    return (", ".join(found["registers"]) or "none") if "registers" in found else "did not run"


if __name__ == "__main__":
    sys.exit(main())
