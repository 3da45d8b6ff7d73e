"""`python -m benchmarks.pruning COMMAND`: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from .. import runner
from . import jobs
from .subjects import CACHE_HELP, DATA_HELP, Place

_RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    """Runs one command; 1 where a job failed."""
    given = _arguments()
    return int(given.command(given) or 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning", description="See benchmarks/pruning/README.md."
    )
    commands = parser.add_subparsers(required=True)
    for name, function in _COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(command=function)
        for option in _OPTIONS_OF[name]:
            command.add_argument(f"--{option}", **_OPTIONS[option])
    return parser.parse_args()


def _prepare(given: argparse.Namespace) -> None:
    """decode the images, once"""
    from .images import prepare

    for name in given.sets.split(","):
        print(prepare(name, given.data, _cache(given)))


def _list(given: argparse.Namespace) -> None:
    """the jobs, and which of them have results"""
    for job in runner.chosen(jobs.all_jobs(), given.filter):
        print("done" if runner.result_file(given.out, job.name).is_file() else "    ", job.name)


def _run(given: argparse.Namespace) -> int:
    """run jobs that have no results yet"""
    wanted = runner.chosen(jobs.all_jobs(), given.filter)
    precision = given.precision or ("bf16-mixed" if given.device == "cuda" else "32-true")
    settings = {
        "place": Place(data=given.data, cache=_cache(given), device=given.device, precision=precision),
        "overrides": overrides(given.set),
        "commit": given.commit,
    }
    outcome = runner.run(
        wanted, given.out, settings, work="benchmarks.pruning.work", parallel=given.jobs, budget_s=given.budget_s,
        threads=given.threads, start_method=given.start,
    )  # fmt: skip
    print(outcome)
    if given.pack is not None:
        print(runner.pack(given.out, given.pack), "results in", given.pack)
    return 1 if outcome.failed else 0


def _pack(given: argparse.Namespace) -> None:
    """all results into one file"""
    print(runner.pack(given.out, given.file), "results in", given.file)


def _unpack(given: argparse.Namespace) -> None:
    """a packed file back into a folder, beside what is there"""
    print(runner.unpack(given.file, given.out), "results new in", given.out)


def _latency(given: argparse.Namespace) -> None:
    """Swin-T pruned by 20, 40 and 60 % against the dense one, on this CPU"""
    from swincompress_pl.progress import progress_bar

    from .latency import latency

    with progress_bar() as tell:
        figures = latency(
            given.model, None, threads=[int(n) for n in given.thread_counts.split(",")], rounds=given.rounds,
            turn_ms=given.turn_ms, tell=tell,
        )  # fmt: skip
    _write(given.out / "latency.json", figures)


def _memory(given: argparse.Namespace) -> None:
    """one round on Swin-T at full size: peak memory, and the time for ImageNet"""
    from .memory import memory
    from .tables import part_of_naive

    figures = memory(
        Place(data=given.data, cache=_cache(given), device=given.device),
        granularity=given.granularity,
        batches=given.batches,
        batch_size=given.batch_size,
        holdout=given.holdout,
        part_of_naive=part_of_naive(jobs.read_results(given.out)),
    )
    _write(given.out / f"memory-{given.granularity}.json", figures)
    estimate = figures["imagenet"]
    print(f"peak {figures['peak_rss_bytes'] / 1e9:.2f} GB; {figures['images_per_s']:.1f} images a second")
    print(
        f"ImageNet, {estimate['holdout']:,} images held out, {figures['targets']} targets: a round takes at most "
        f"{estimate['naive_hours_a_round']:.1f} h here"
        + (
            ""
            if estimate["hours_a_round"] is None
            else f", {estimate['hours_a_round']:.1f} h as scored on swin_cifar10"
        )
    )


def _compensation(given: argparse.Namespace) -> int:
    """pruning without training, with and without compensation; rows that have no results yet"""
    from . import compensation

    outcome = runner.run(
        runner.chosen(compensation.all_jobs(), given.filter), given.out,
        {"place": Place(data=given.data, cache=_cache(given), device=given.device)},
        work="benchmarks.pruning.compensation", threads=given.threads, start_method="spawn",
    )  # fmt: skip  # spawned: peak memory is a process's
    for name in outcome.done:
        test = runner.read_result(given.out, name)["test"]
        print(f"{name}: {test['points_lost']:.2f} points lost of {test['float_points']:.2f}")
    print(outcome)
    return 1 if outcome.failed else 0


def _compensation_report(given: argparse.Namespace) -> None:
    """the rows, beside those committed, as benchmarks/results/compensation.json and its page"""
    from ..pages import write_pages
    from . import compensation

    file = _RESULTS / "compensation.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = [job.name for job in compensation.all_jobs()]
    found = [name for name in names if runner.result_file(given.out, name).is_file()]
    rows |= {name: runner.read_result(given.out, name) for name in found}
    _write(file, {name: rows[name] for name in sorted(rows, key=[*names, *rows].index)})
    print(*write_pages(["compensation"]), sep="\n")


def _report(given: argparse.Namespace) -> None:
    """the results as benchmarks/results/pruning.json and its pages"""
    from ..pages import write_pages
    from .report import write

    print(write(given.out, _RESULTS), *write_pages(["pruning", "compensation"]), sep="\n")


def _cache(given: argparse.Namespace) -> Path:
    return Path(given.cache or given.out / "cache")


def overrides(entries: list[str]) -> dict[str, Any]:
    """["lr=0.001", "kinds=[\"mlp\"]"] -> fields of a recipe."""
    found = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _write(file: Path, figures: dict[str, Any]) -> None:
    from swincompress_pl.report.plain import write_text

    print(write_text(file, json.dumps(figures, indent=1, allow_nan=False) + "\n"))


_COMMANDS = {
    "prepare": _prepare, "list": _list, "run": _run, "pack": _pack, "unpack": _unpack, "latency": _latency,
    "memory": _memory, "compensation": _compensation, "compensation-report": _compensation_report,
    "report": _report,
}  # fmt: skip
_PLACE = ["data", "cache", "device"]
_OPTIONS_OF = {
    "prepare": ["out", "data", "cache", "sets"],
    "list": ["out", "filter"],
    "run": ["out", *_PLACE, "filter", "jobs", "budget-s", "precision", "threads", "set", "commit", "pack", "start"],
    "pack": ["out", "file"],
    "unpack": ["out", "file"],
    "latency": ["out", "model", "thread-counts", "rounds", "turn-ms"],
    "memory": ["out", *_PLACE, "granularity", "batches", "batch-size", "holdout"],
    "compensation": ["out", *_PLACE, "filter", "threads"],
    "compensation-report": ["out"],
    "report": ["out"],
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"type": Path, "required": True, "help": "folder of the results, one small file per job"},
    "data": {"type": Path, "default": Path("."), "help": f"{DATA_HELP}; default: this folder"},
    "cache": {"type": Path, "help": f"{CACHE_HELP}; default: OUT/cache"},
    "sets": {"default": "cifar10,imagenet_mini", "help": "image sets, separated by commas"},
    "filter": {"nargs": "*", "default": [], "help": "patterns of the names of jobs (fnmatch); default: all"},
    "jobs": {"type": int, "default": 1, "help": "processes at a time"},
    "budget-s": {"type": float, "default": 1e9, "help": "seconds after which what runs is stopped"},
    "device": {"choices": ["cpu", "cuda"], "default": "cpu"},
    "precision": {"help": "of training, as a Trainer takes it; default: bf16-mixed on cuda, 32-true on the cpu"},
    "threads": {"type": int, "default": 1, "help": "CPU threads of a job"},
    "set": {"nargs": "*", "default": [], "help": "fields of the recipe, e.g. epochs=12 lr=0.001"},
    "commit": {"default": os.environ.get("COMMIT"), "help": "recorded where the source tree cannot tell"},
    "start": {"choices": ["forkserver", "spawn"], "default": "forkserver", "help": "how processes are started"},
    "pack": {"type": Path, "help": "after the run, all results into this one file"},
    "file": {"type": Path, "required": True, "help": "the packed file"},
    "model": {"default": "swin_tiny_patch4_window7_224", "help": "a name for create_model"},
    "thread-counts": {"default": "1,2", "help": "a race for each"},
    "rounds": {"type": int, "default": 15, "help": "samples of each runtime"},
    "turn-ms": {"type": float, "default": 300.0, "help": "time of one runtime's turn in a round"},
    "granularity": {"default": "structured", "help": "structured, weight, n:m or block"},
    "batches": {"type": int, "default": 4, "help": "training steps of the one epoch"},
    "batch-size": {"type": int, "default": 16, "help": "images a training step"},
    "holdout": {"type": int, "default": 256, "help": "images to score on"},
}


if __name__ == "__main__":
    sys.exit(main())
