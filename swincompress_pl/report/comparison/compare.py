"""Measures runtimes against each other: each in a process of its own, in turns, so that none disturbs another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from swincompress_pl.report.latency import Latency, turned

Progress = Callable[[str, int, int], object]
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_LAST_WORDS = 300
_WORKER = "swincompress_pl.report.comparison.worker"
# Runs the worker of the checkout that is its argument. A path is not enough: an editable installation answers imports
# of the package before any path is searched.
_FROM_CHECKOUT = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Checkout:
    root = [sys.argv.pop()]

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] == {_WORKER.partition(".")[0]!r}:
            return PathFinder.find_spec(name, path or cls.root, target)

sys.meta_path.insert(0, Checkout)
runpy.run_module({_WORKER!r}, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What a worker process runs.

    Attributes:
        name: Its name in the results.
        runtime: A key of `worker.BUILDERS`.
        threads: Number of threads.
        batch: Images per pass.
        image_shape: (height, width, channels), or (time steps, height, width, channels) of events.
        file: Artifact or ONNX file.
        origin: From what torch rebuilds the architecture.
        implementation: Name of the engine's kernels.
        settings: Settings of OpenVINO, or `precision` ("fp32", "bf16") and `compile` of torch.
        unavailable: Why it cannot run, such as "not installed"; it is then listed but not started.
        checkout: A folder of this package's sources whose code the process runs; None for those that run here.
        environment: Variables of the process beside those of this one. Folders in PYTHONPATH come before all others.
    """

    name: str
    runtime: str
    threads: int
    batch: int
    image_shape: tuple[int, ...]
    file: str | None = None
    origin: Mapping[str, Any] | None = None
    implementation: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    checkout: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def task(self, warm_up: int, turn_ms: float) -> dict[str, Any]:
        """What the worker reads as its first line."""
        entries = ("runtime", "threads", "batch", "file", "origin", "implementation")
        task = {name: getattr(self, name) for name in entries}
        return task | {
            "image_shape": list(self.image_shape),
            "settings": dict(self.settings),
            "warm_up": warm_up,
            "turn_ms": turn_ms,
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one runner gave.

    Attributes:
        name: Name of the runner.
        latency: Its times; None if it could not run.
        peak_rss_bytes: Peak resident memory of its process.
        load_ms: Time from the imported runtime to the first answer.
        file_bytes: Bytes of the file that it read; for torch, of the float32 state_dict.
        logits: Its first answer, (batch, classes), on images that are the same for all runners.
        unavailable: Why it could not run.
    """

    name: str
    latency: Latency | None = None
    peak_rss_bytes: int | None = None
    load_ms: float | None = None
    file_bytes: int | None = None
    logits: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    unavailable: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures in JSON types, without the logits."""
        return {
            "name": self.name,
            "latency": None if self.latency is None else self.latency.to_dict(),
            "peak_rss_bytes": self.peak_rss_bytes,
            "load_ms": self.load_ms,
            "file_bytes": self.file_bytes,
            "unavailable": self.unavailable,
        }


def compare(
    runners: Sequence[Runner],
    *,
    rounds: int = 10,
    warm_up: int = 3,
    turn_ms: float = 100.0,
    limit_s: float = 600.0,
    on_progress: Progress | None = None,
) -> list[Result]:
    """Starts every runner, then gives each one turn per round; a sample is the median of a turn of about `turn_ms`.

    A runner that fails does not end the comparison: its result says why. So does that of one that is ended because it
    took longer than `limit_s` seconds to load, or for one turn. `on_progress` is called with (what, done, total). The
    k-th samples of all runners are from the same round, so `latency.ratio` may pair them. A ValueError is raised for a
    repeated name.
    """
    names = [runner.name for runner in runners]
    if len(set(names)) != len(names) or rounds < 1 or warm_up < 0 or not limit_s > 0:
        raise ValueError(
            f"runners {names}, rounds={rounds}, warm_up={warm_up}, limit_s={limit_s:g}: names must differ, rounds must "
            "be 1 or more, warm_up 0 or more, and limit_s more than 0"
        )
    report = on_progress or (lambda *_: None)
    total = len(runners) + rounds
    with ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        failed: dict[str, str] = {}
        for number, runner in enumerate(runners):
            report(f"starting {runner.name}", number, total)
            worker = stack.enter_context(_Worker(runner, warm_up, turn_ms, limit_s))
            (failed if worker.failure else workers)[runner.name] = worker.failure or worker  # type: ignore[assignment]
        for number in range(rounds):
            report(f"round {number + 1} of {rounds}", len(runners) + number, total)
            for name in turned(list(workers), number) if workers else []:
                if not workers[name].failure:
                    workers[name].turn()
        report("done", total, total)
        return [
            workers[name].result() if name in workers else Result(name=name, unavailable=failed[name]) for name in names
        ]


def process_environment(runner: Runner) -> dict[str, str]:
    """The variables of the process that runs `runner`."""
    threads, folders = str(runner.threads), [runner.environment.get("PYTHONPATH"), str(_PACKAGE_ROOT)]
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return {**os.environ, **limits, **runner.environment, "PYTHONPATH": path}


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, runner: Runner, warm_up: int, turn_ms: float, limit_s: float) -> None:
        self.runner = runner
        self._limit_s = limit_s
        self.failure = runner.unavailable
        self._samples: list[float] = []
        self._peak: int | None = None
        self._ready: Mapping[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        if self.failure is None:
            self._start(runner.task(warm_up, turn_ms))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()

    def turn(self) -> None:
        """Takes one more sample, or notes a failure."""
        answer = self._ask("turn")
        if answer is not None:
            self._samples.append(answer["sample_ms"])
            self._peak = answer["peak_rss_bytes"]

    def result(self) -> Result:
        """What the turns gave."""
        name = self.runner.name
        if self.failure:
            return Result(name=name, unavailable=self.failure)
        threads, batch = self.runner.threads, self.runner.batch
        latency = Latency(samples_ms=tuple(self._samples), batch=batch, threads=threads)
        return Result(
            name=name,
            latency=latency,
            peak_rss_bytes=self._peak,
            load_ms=self._ready["load_ms"],
            file_bytes=self._ready["file_bytes"],
            logits=np.asarray(self._ready["logits"], dtype=np.float32),
        )

    def _start(self, task: Mapping[str, Any]) -> None:
        checkout = self.runner.checkout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._process = subprocess.Popen(
            # -P: a source tree in the working directory must not hide the installed package
            [sys.executable, "-P", *(["-m", _WORKER] if checkout is None else ["-c", _FROM_CHECKOUT, str(checkout)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=process_environment(self.runner),
            text=True,
        )
        self._ready = self._ask(json.dumps(task)) or {}

    def _ask(self, line: str) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(self._limit_s, self._end, [late])
        timer.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer and late.is_set():
            self.failure = f"it gave no answer for {self._limit_s:g} s, and was ended"
            return None
        if not answer:
            self.failure = f"its process ended: {self._last_words()}"
            return None
        message: dict[str, Any] = json.loads(answer)
        if "error" in message:
            self.failure = str(message["error"])
            return None
        return message

    def _end(self, late: threading.Event) -> None:
        assert self._process is not None
        late.set()
        self._process.kill()

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", errors="replace").strip().splitlines()
        return (lines[-1] if lines else "without a message")[-_LAST_WORDS:]
