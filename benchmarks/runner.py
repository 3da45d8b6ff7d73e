"""What the benchmarks share: jobs with a file of results each, run in processes until they are done or time is up.

A job is a small value with a name; what it does is `do(job, folder, **settings)` of a module, which writes the file.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, TypeVar

_POLL_S = 0.2
_GRACE_S = 3.0
_LAST_LINES = 4


class Named(Protocol):
    """A job of any benchmark. One that needs the results of another names it: `reference`."""

    @property
    def name(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=Named)


def chosen(jobs: Iterable[AnyJob], patterns: Sequence[str]) -> list[AnyJob]:
    """The jobs whose names match a pattern (fnmatch), all without patterns; ValueError for one that matches none."""
    jobs = list(jobs)
    for pattern in patterns:
        if not any(fnmatchcase(job.name, pattern) for job in jobs):
            raise ValueError(f"--filter: {pattern!r} matches no job; `list` shows the {len(jobs)} there are")
    return [job for job in jobs if not patterns or any(fnmatchcase(job.name, pattern) for pattern in patterns)]


def result_file(folder: Path, name: str) -> Path:
    """Where the results of the job `name` are."""
    return folder / f"{name}.json"


def read_result(folder: Path, name: str) -> dict[str, Any]:
    """What a job wrote."""
    return dict(json.loads(result_file(folder, name).read_text(encoding="utf-8")))


def commit() -> str:
    """The commit of the working directory, short; "unknown" outside a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@dataclass(kw_only=True)
class Outcome:
    """Names of jobs: done now, failed now, stopped by the budget, and never begun."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{len(self.done)} done, {len(self.failed)} failed, {len(self.stopped)} stopped by the budget, "
            f"{len(self.waiting)} not begun"
        )


@dataclass(frozen=True, kw_only=True)
class Running:
    """A job at work."""

    job: Named
    process: Any
    started: float


def run(
    jobs: Sequence[Named],
    folder: Path,
    settings: dict[str, Any],
    *,
    work: str,
    parallel: int = 1,
    budget_s: float = math.inf,
    threads: int = 1,
    start_method: str = "forkserver",
    to_do: Callable[[Named], bool] | None = None,
) -> Outcome:
    """Runs the jobs in order, `parallel` at a time; at the end of the budget the rest is stopped.

    work: the module whose `do(job, folder, **settings)` runs a job, in a process of its own with so many `threads`. A
    job whose reference is not finished waits for it. A job that was stopped leaves nothing and begins anew in the next
    run. A job that failed leaves its log, logs/<name>.log.
    start_method: of the processes; "spawn" is slower and shares nothing.
    to_do: which jobs are run; without it those that have no result yet.
    """
    # A server with the imports done, from which each job's process is forked: seconds less a job. CUDA begins there.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else a look for a GPU there would spoil the forks
    context: Any = multiprocessing.get_context(start_method)
    context.set_forkserver_preload([work])
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    to_do = to_do or (lambda job: not result_file(folder, job.name).is_file())
    queue = [job for job in jobs if to_do(job)]
    running: list[Running] = []
    outcome = Outcome()
    try:
        while (queue or running) and time.monotonic() < deadline:
            running = _collect(running, folder, outcome)
            queue = _start_some(context, queue, running, folder, (work, settings, threads), parallel)
            if queue and not running:
                break  # all that is left waits for jobs that are not here
            time.sleep(_POLL_S)
    finally:
        for item in running:
            item.process.terminate()
        for item in running:
            item.process.join(_GRACE_S)  # Lightning ends at its next batch
            item.process.kill()
            item.process.join()
            (outcome.done if _ended_well(item, folder) else outcome.stopped).append(item.job.name)
    outcome.waiting = [job.name for job in queue]
    return outcome


def _start_some(
    context: Any, queue: list[Named], running: list[Running], folder: Path, how: tuple[Any, ...], parallel: int
) -> list[Named]:
    """Starts what fits, adds it to `running`, and gives what is left."""
    left = []
    for job in queue:
        reference = getattr(job, "reference", None)
        ready = reference is None or result_file(folder, reference).is_file()
        if ready and len(running) < parallel:
            process = context.Process(target=_work, args=(job, folder, *how), name=job.name)
            process.start()
            running.append(Running(job=job, process=process, started=time.monotonic()))
        else:
            left.append(job)
    return left


def _collect(running: list[Running], folder: Path, outcome: Outcome) -> list[Running]:
    """What is still at work; what has ended is reported."""
    still = []
    for item in running:
        if item.process.is_alive():
            still.append(item)
            continue
        seconds = time.monotonic() - item.started
        if _ended_well(item, folder):
            outcome.done.append(item.job.name)
            print(f"{seconds:7.1f} s  {item.job.name}", flush=True)
        else:
            outcome.failed.append(item.job.name)
            print(f"{seconds:7.1f} s  FAILED {item.job.name}: {_last_lines(folder, item.job)}", flush=True)
    return still


def _ended_well(item: Running, folder: Path) -> bool:
    return item.process.exitcode == 0 and result_file(folder, item.job.name).is_file()


def _work(job: Named, folder: Path, work: str, settings: dict[str, Any], threads: int) -> None:
    """The job's own process: all output into its log."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(folder / "logs" / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    import torch

    torch.set_num_threads(threads)
    try:
        importlib.import_module(work).do(job, folder, **settings)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _last_lines(folder: Path, job: Named) -> str:
    log = folder / "logs" / f"{job.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return " | ".join(lines[-_LAST_LINES:])


def pack(folder: Path, file: Path) -> int:
    """All results of a folder into one file, a line each, for a machine that gives few files back; how many."""
    results = {found.stem: json.loads(found.read_text(encoding="utf-8")) for found in sorted(folder.glob("*.json"))}
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"name": name, "results": entry}) + "\n" for name, entry in results.items()]
    file.write_text("".join(lines), encoding="utf-8")
    return len(results)


def unpack(file: Path, folder: Path) -> int:
    """The results of a packed file as files of their own; those that are there already stay. How many were written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        target = result_file(folder, entry["name"])
        if not target.is_file():
            target.write_text(json.dumps(entry["results"]) + "\n", encoding="utf-8")
            written += 1
    return written
