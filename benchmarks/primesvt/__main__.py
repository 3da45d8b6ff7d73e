"""`python -m benchmarks.primesvt COMMAND`: see README.md beside this file."""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
from pathlib import Path

import torch

from swincompress_pl.report.record import write_text

from ..pruning.subjects import Place
from .subjects import SUBJECTS


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.primesvt")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train baselines and write their weights into the tree")
    train.set_defaults(command=_train)
    train.add_argument("--models", default=",".join(SUBJECTS), help="names, with commas between them")
    run = commands.add_parser("run", help="run the jobs that have no result yet")
    run.set_defaults(command=_run)
    run.add_argument("--filter", default="*", help="of jobs, patterns with commas between them")
    run.add_argument("--single-shot", action="store_true", help="search now, fine-tune in a later run")
    run.add_argument("--list", action="store_true", help="only say which there are")
    for command in (train, run):
        command.add_argument("--data", type=Path, required=True, help="the folder with cifar10_jpeg.tar.xz")
        command.add_argument("--cache", type=Path, required=True, help="of decoded images")
        command.add_argument("--out", type=Path, required=True, help="of checkpoints and results")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--precision", default="32-true")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--commit", default=None)
    latency = commands.add_parser("latency", help="time the networks that the jobs left, in torch")
    latency.set_defaults(command=_latency)
    latency.add_argument("--models", default=",".join(SUBJECTS))
    report = commands.add_parser("report", help="write benchmarks/results/primesvt.md and .json")
    report.set_defaults(command=_report)
    for command in (latency, report):
        command.add_argument("--out", type=Path, required=True, help="of results")
    latency.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(getattr(given, "threads", 1))
    given.command(given)


def _train(given: argparse.Namespace) -> None:
    from .baselines import train

    place = Place(data=given.data, cache=given.cache, device=given.device, precision=given.precision)
    for name in given.models.split(","):
        record = train(SUBJECTS[name], place, given.out, given.commit or _commit())
        print(json.dumps({"model": name, "test": record["test"], "seconds": record["seconds"]}), flush=True)


def _run(given: argparse.Namespace) -> None:
    from .work import all_jobs, result_file, run

    patterns = given.filter.split(",")
    jobs = [job for job in all_jobs() if any(fnmatch.fnmatchcase(job.key, pattern) for pattern in patterns)]
    place = Place(data=given.data, cache=given.cache, device=given.device, precision=given.precision)
    for job in jobs:
        file = result_file(given.out, job)
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        done = known is not None and (given.single_shot or not job.tuned or "tuned" in known)
        ready = SUBJECTS[job.subject].weights.is_file() and (job.options is not None or not given.single_shot)
        state = "done" if done else "to do" if ready else "nothing to do here"
        if given.list or state != "to do":
            print(f"{job.key}: {state}", flush=True)
            continue
        commit = given.commit or _commit()
        result = run(job, place, commit, given.out, known=known, tune=not given.single_shot)
        write_text(file, json.dumps(result))
        shown = {key: result[key]["test"]["percent"] for key in ("given", "single_shot", "tuned") if key in result}
        print(f"{job.key}: {shown}, {result['seconds']} s", flush=True)


def _latency(given: argparse.Namespace) -> None:
    from .latency import measure

    for name in given.models.split(","):
        if any(given.out.glob(f"{name}-*.json")):
            (given.out / f"{name}_latency.json").write_text(json.dumps(measure(name, given.out)), encoding="utf-8")


def _report(given: argparse.Namespace) -> None:
    from .report import write

    for file in write(given.out, Path(__file__).resolve().parent.parent / "results"):
        print(file)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
