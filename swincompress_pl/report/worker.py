"""One contestant of a race in a process of its own: `python -m swincompress_pl.report.worker`, driven by `race.run`.

It reads one JSON line that says what to run, answers when it is warm, then answers every further line with the time of
one turn. Its answers go to the original standard output; whatever libraries print goes to the standard error.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from swincompress_pl.report.latency import timed_ms

Call = Callable[[], object]
_SEED = 0


def main() -> None:
    """Serves one parent until its end of input."""
    answers = _private_output()
    task = json.loads(sys.stdin.readline())
    try:
        call = BUILDERS[task["runtime"]](task)
        for _ in range(task["warm_up"]):
            call()
    except Exception as error:  # every failure of a peer is the parent's to report, none may end the race
        _send(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(answers, {"ready": True})
    for _ in sys.stdin:
        _send(answers, {"sample_ms": turn_ms(call, task["turn_ms"]), "peak_rss_bytes": peak_rss_bytes()})


def turn_ms(call: Call, budget_ms: float) -> float:
    """The median time of one call in a turn: one untimed call to wake caches and threads, then calls until the budget
    is used."""
    call()
    taken = [timed_ms(call)]
    while sum(taken) + taken[0] <= budget_ms:
        taken.append(timed_ms(call))
    return statistics.median(taken)


def peak_rss_bytes() -> int | None:
    """The peak resident memory of this process. Not getrusage: its figure survives exec and may be the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _engine(task: Mapping[str, Any]) -> Call:
    from swincompress_pl import accel

    engine = accel.load(task["file"], threads=task["threads"], implementation=task["implementation"])
    images = _images(task)
    return lambda: engine(images)


def _torch(task: Mapping[str, Any]) -> Call:
    import torch

    from swincompress_pl import models

    torch.set_num_threads(task["threads"])
    torch.manual_seed(_SEED)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[task["settings"].get("precision", "fp32")]
    network = models.rebuild(task["origin"]).eval().to(precision)
    if task["settings"].get("compile"):
        network.compile()
    images = torch.from_numpy(_normalized(task)).to(precision)

    def call() -> object:
        with torch.inference_mode():
            return network(images)

    return call


def _onnxruntime(task: Mapping[str, Any]) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(task["file"], options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: _normalized(task)}
    return lambda: session.run(None, inputs)


def _openvino(task: Mapping[str, Any]) -> Call:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": task["threads"], "PERFORMANCE_HINT": "LATENCY", **task["settings"]}
    compiled = core.compile_model(task["file"], "CPU", settings)
    request, images = compiled.create_infer_request(), _normalized(task)
    return lambda: request.infer([images])


BUILDERS: dict[str, Callable[[Mapping[str, Any]], Call]] = {
    "engine": _engine,
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _images(task: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    shape = (task["batch"], *task["image_shape"])
    return np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8)


def _normalized(task: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The same images as (N, C, H, W) floats of about the size of normalized ones."""
    real = (_images(task).astype(np.float32) / 255 - 0.5) / 0.25
    return np.ascontiguousarray(real.transpose(0, 3, 1, 2))


def _private_output() -> TextIO:
    """The original standard output for answers alone; descriptor 1 becomes the standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return answers


def _send(answers: TextIO, message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
