"""`python -m benchmarks.spiking COMMAND`: see README.md in the folder above."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from swincompress_pl.quant.quantize import ROUNDINGS

from .. import runner
from ..primesvt.subjects import SUBJECTS
from ..pruning.subjects import CACHE_HELP, CIFAR_HELP, Place
from .exact import BUILDERS, COUNTING
from .work import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command (default: what stands on the command line); 1 where a job failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spiking")
    commands = parser.add_subparsers(required=True)
    exact = commands.add_parser("exact", help="compare reference, twin and engine on every builder")
    exact.set_defaults(command=_exact)
    exact.add_argument("--models", default=",".join(BUILDERS), help="names, with commas between them")
    exact.add_argument("--steps", default="1,2,4", help="numbers of time steps")
    exact.add_argument("--batches", default="1,3")
    speed = commands.add_parser("speed", help="race the engine with torch and onnxruntime; leave the machine alone")
    speed.set_defaults(command=_speed)
    speed.add_argument("--models", default=",".join(BUILDERS))
    speed.add_argument("--steps", type=int, default=4)
    speed.add_argument("--thread-counts", default="1,2", help="one race each")
    speed.add_argument("--implementation", default=None, help="the engine's; with avx2, all are held to AVX2")
    speed.add_argument("--density", type=float, default=0.2, help="synaptic operations a multiplication")
    speed.add_argument("--rounds", type=int, default=7, help="samples of each runtime")
    speed.add_argument("--turn-ms", type=float, default=300.0)
    accuracy = commands.add_parser("accuracy", help="of the trained baselines, in the engine")
    accuracy.set_defaults(command=_accuracy)
    accuracy.add_argument("--models", default=",".join(SUBJECTS))
    accuracy.add_argument("--bits", default="W8A8,W4A8", help="widths; `float` is the control, with --tuned")
    accuracy.add_argument("--tuned", action="store_true", help="after fine-tuning, by the recipe of its subject")
    accuracy.add_argument("--rounding", default="nearest", choices=ROUNDINGS, help="of the weights, without --tuned")
    accuracy.add_argument("--data", type=Path, required=True, help=CIFAR_HELP)
    accuracy.add_argument("--cache", type=Path, required=True, help=CACHE_HELP)
    accuracy.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of training; the engine has none")
    tuning = commands.add_parser("tuning", help="of the trained baselines' layers; leave the machine alone")
    tuning.set_defaults(command=_tuning)
    tuning.add_argument("--models", default=",".join(SUBJECTS))
    tuning.add_argument("--thread-counts", default="1,2")
    tuning.add_argument("--data", type=Path, required=True, help=CIFAR_HELP)
    tuning.add_argument("--cache", type=Path, required=True, help=CACHE_HELP)
    steps = commands.add_parser("steps", help="of training, quantized beside float; leave the machine alone")
    steps.set_defaults(command=_steps)
    steps.add_argument("--models", default=",".join(SUBJECTS))
    steps.add_argument("--data", type=Path, required=True, help=CIFAR_HELP)
    steps.add_argument("--cache", type=Path, required=True, help=CACHE_HELP)
    report = commands.add_parser("report", help="write benchmarks/results/spiking.json and its pages")
    report.set_defaults(command=_report)
    report.add_argument("--controls", type=Path, default=None, help="results of benchmarks.primesvt, for its controls")
    for command in (exact, speed, accuracy, tuning, steps, report):
        command.add_argument("--out", type=Path, required=True, help="of results")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    return int(given.command(given) or 0)


def _exact(given: argparse.Namespace) -> int:
    batches = [int(count) for count in given.batches.split(",")]
    jobs = [
        Job(
            name=f"exact-{name}-{steps}",
            kind="exact",
            arguments={"name": name, "steps": int(steps), "batches": batches},
        )
        for name in given.models.split(",")
        for steps in given.steps.split(",")
        if name not in COUNTING or steps in ("1", "4")  # all at once, or each of up to four spikes in a step of its own
    ]
    return _run(given, jobs)


def _speed(given: argparse.Namespace) -> int:
    common = {
        "threads": [int(count) for count in given.thread_counts.split(",")],
        "density": given.density,
        "rounds": given.rounds,
        "turn_ms": given.turn_ms,
        "implementation": given.implementation,
    }
    of = f"-{given.implementation}" if given.implementation else ""
    steps = {name: 1 if name in COUNTING else given.steps for name in given.models.split(",")}
    jobs = [
        Job(name=f"speed-{name}-{count}{of}", kind="speed", arguments={"name": name, "steps": count, **common})
        for name, count in steps.items()
    ]
    return _run(given, jobs)


def _accuracy(given: argparse.Namespace) -> int:
    if given.tuned and given.rounding != "nearest":
        raise SystemExit(f"--rounding {given.rounding} goes with networks that are not trained; leave out --tuned")
    kind = "-tuned" if given.tuned else "" if given.rounding == "nearest" else f"-{given.rounding}"
    place = Place(data=given.data, cache=given.cache, device=given.device, precision="32-true")
    common = {
        "tuned": given.tuned,
        "place": place,
        "commit": given.commit or runner.commit(),
        "rounding": given.rounding,
    }
    jobs = [
        Job(
            name=f"{name}-{bits}{kind}",
            kind="accuracy",
            arguments={"subject_name": name, "bits": None if bits == "float" else bits, **common},
        )
        for name in given.models.split(",")
        for bits in given.bits.split(",")
    ]
    return _run(given, jobs)


def _tuning(given: argparse.Namespace) -> int:
    common = {
        "place": Place(data=given.data, cache=given.cache),
        "threads": [int(count) for count in given.thread_counts.split(",")],
    }
    jobs = [
        Job(name=f"tuning-{name}", kind="tuning", arguments={"name": name, **common})
        for name in given.models.split(",")
    ]
    return _run(given, jobs)


def _steps(given: argparse.Namespace) -> int:
    common = {"place": Place(data=given.data, cache=given.cache), "threads": given.threads}
    jobs = [
        Job(name=f"steps-{name}", kind="steps", arguments={"name": name, **common}) for name in given.models.split(",")
    ]
    return _run(given, jobs)


def _run(given: argparse.Namespace, jobs: list[Job]) -> int:
    """Runs what has no result yet."""
    settings = {"commit": given.commit or runner.commit()}
    outcome = runner.run(jobs, given.out, settings, work="benchmarks.spiking.work", threads=given.threads)
    for name in outcome.done:
        found = runner.read_result(given.out, name)
        print(name, {key: value for key, value in found.items() if not isinstance(value, dict | list)})
    print(outcome)
    return 1 if outcome.failed else 0


def _report(given: argparse.Namespace) -> None:
    from ..pages import write_pages
    from .report import write

    print(write(given.out, Path(__file__).resolve().parent.parent / "results", given.controls))
    print(*write_pages(["spiking", "primesvt"]), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
