"""`python -m benchmarks.primesvt COMMAND`: see README.md beside this file."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swincompress_pl.report.plain import write_text

from .. import runner
from ..pruning.subjects import CACHE_HELP, CIFAR_HELP, Place
from .subjects import SUBJECTS

if TYPE_CHECKING:
    from .work import Job


def main() -> int:
    """Runs one command; 1 where a job failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.primesvt")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train baselines and write their weights into the tree")
    train.set_defaults(command=_train)
    train.add_argument("--models", default=",".join(SUBJECTS), help="names, with commas between them")
    run = commands.add_parser("run", help="run the jobs that have no result yet")
    run.set_defaults(command=_run)
    run.add_argument("--filter", default="*", help="of jobs, patterns with commas between them")
    run.add_argument("--single-shot", action="store_true", help="search now, fine-tune in a later run")
    run.add_argument("--seed", type=int, default=0, help="of the fine-tuning: others than 0 repeat what 0 has tuned")
    run.add_argument("--jobs", type=int, default=1, help="processes at a time")
    run.add_argument("--list", action="store_true", help="only say which there are")
    for command in (train, run):
        command.add_argument("--data", type=Path, required=True, help=CIFAR_HELP)
        command.add_argument("--cache", type=Path, required=True, help=CACHE_HELP)
        command.add_argument("--out", type=Path, required=True, help="of checkpoints and results")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--precision", default="32-true")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--commit", default=None)
    latency = commands.add_parser("latency", help="time the networks that the jobs left, in torch")
    latency.set_defaults(command=_latency)
    latency.add_argument("--models", default=",".join(SUBJECTS))
    report = commands.add_parser("report", help="write benchmarks/results/primesvt.json, its page and plots")
    report.set_defaults(command=_report)
    for command in (latency, report):
        command.add_argument("--out", type=Path, required=True, help="of results")
    latency.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(getattr(given, "threads", 1))
    return int(given.command(given) or 0)


def _train(given: argparse.Namespace) -> None:
    from .baselines import train

    place = Place(data=given.data, cache=given.cache, device=given.device, precision=given.precision)
    for name in given.models.split(","):
        record = train(SUBJECTS[name], place, given.out, given.commit or runner.commit())
        print(json.dumps({"model": name, "test": record["test"], "seconds": record["seconds"]}), flush=True)


def _run(given: argparse.Namespace) -> int:
    from .work import Run, all_jobs

    if given.seed and given.single_shot:
        raise SystemExit(f"--seed {given.seed} is of the fine-tuning, which --single-shot leaves out; give one of them")
    patterns = given.filter.split(",")
    jobs = [job for job in all_jobs() if any(fnmatch.fnmatchcase(job.key, pattern) for pattern in patterns)]
    runs = [Run(job=job, seed=given.seed, tune=not given.single_shot) for job in jobs]
    states = {
        run.name: _state(run.job, _read(given.out, run.job.key), _read(given.out, run.name), given) for run in runs
    }
    for name, state in states.items():
        if given.list or state != "to do":
            print(f"{name}: {state}", flush=True)
    if given.list:
        return 0
    place = Place(data=given.data, cache=given.cache, device=given.device, precision=given.precision)
    outcome = runner.run(
        runs, given.out, {"place": place, "commit": given.commit or runner.commit()}, work="benchmarks.primesvt.work",
        parallel=given.jobs, threads=given.threads, to_do=lambda run: states[run.name] == "to do",
    )  # fmt: skip
    for name in outcome.done:
        result = runner.read_result(given.out, name)
        shown = {key: result[key]["test"]["percent"] for key in ("given", "single_shot", "tuned") if key in result}
        print(f"{name}: {shown}, {result['seconds']} s", flush=True)
    print(outcome)
    return 1 if outcome.failed else 0


def _state(job: Job, first: dict[str, Any] | None, found: dict[str, Any] | None, given: argparse.Namespace) -> str:
    """What to say of it. first: the result with seed 0; found: that with the seed asked for."""
    if found is not None and (given.single_shot or not job.tuned or "tuned" in found):
        return "done"
    ready = SUBJECTS[job.subject].weights.is_file() and (job.options is not None or not given.single_shot)
    if given.seed:
        ready = job.tuned and first is not None and "tuned" in first
    return "to do" if ready else "nothing to do here"


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    return runner.read_result(folder, name) if runner.result_file(folder, name).is_file() else None


def _latency(given: argparse.Namespace) -> None:
    from .latency import measure

    for name in given.models.split(","):
        if any(given.out.glob(f"{name}-*.json")):
            write_text(given.out / f"{name}_latency.json", json.dumps(measure(name, given.out, runner.commit())))


def _report(given: argparse.Namespace) -> None:
    from ..pages import DOCS, write_pages
    from .report import write

    for file in write(given.out, Path(__file__).resolve().parent.parent / "results", DOCS / "results"):
        print(file)
    print(*write_pages(["primesvt"]), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
