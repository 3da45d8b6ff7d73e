"""One runner of a comparison in a process of its own: `python -m swincompress_pl.report.comparison.worker`.

`compare.compare` drives it. It reads one JSON line that says what to run. When it is warm, it answers with the time to
its first answer, the size of the file that it read, and its logits. It answers every further line with the time of one
turn. Its answers go to the original standard output; whatever libraries print goes to the standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from swincompress_pl.report.latency import NANOSECONDS_A_MS, timed_ms

Call = Callable[[], object]
# A network that `models.rebuild` makes right after torch.manual_seed(SEED) has the same weights here as in the parent.
SEED = 0
# How other runtimes' images are normalized, in [0, 1] units.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A runtime that is ready to run.

    Attributes:
        call: Runs one forward pass.
        logits: Turns what `call` returned into floats (N, classes).
        file_bytes: Bytes of the file that was read; for torch, of the float32 state_dict.
    """

    call: Call
    logits: Callable[[Any], npt.NDArray[Any]]
    file_bytes: int


def main() -> None:
    """Serves one parent until the end of the input."""
    answers = _private_output()
    task = json.loads(sys.stdin.readline())
    try:
        loaded, ready = load(task)
        for _ in range(task["warm_up"]):
            loaded.call()
    except Exception as error:  # the parent reports every failure of a runtime, and none may end the comparison
        _send(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(answers, ready)
    for _ in sys.stdin:
        _send(answers, {"sample_ms": turn_ms(loaded.call, task["turn_ms"]), "peak_rss_bytes": peak_rss_bytes()})


def load(task: Mapping[str, Any]) -> tuple[Loaded, dict[str, Any]]:
    """The runtime of `task`, and the facts for the parent.

    `load_ms` covers reading or building the network, compiling it, and the first answer. Imports come before, since
    torch's worker needs more of them than a user of torch.
    """
    build = BUILDERS[task["runtime"]]
    for module in _IMPORTS[task["runtime"]]:
        importlib.import_module(module)
    pixels = random_images((task["batch"], *task["image_shape"]), SEED)
    images = pixels if task["runtime"] in _TAKE_PIXELS else normalized(pixels)
    start = time.perf_counter_ns()
    loaded = build(task, images)
    answer = loaded.call()
    load_ms = (time.perf_counter_ns() - start) / NANOSECONDS_A_MS
    logits = np.asarray(loaded.logits(answer), dtype=np.float32)
    return loaded, {"load_ms": load_ms, "file_bytes": loaded.file_bytes, "logits": logits.tolist()}


def turn_ms(call: Call, budget_ms: float) -> float:
    """The median time of a call in one turn.

    A turn is one untimed call, which wakes caches and threads, and then calls until the budget is used.
    """
    call()
    taken = [timed_ms(call)]
    while sum(taken) + taken[0] <= budget_ms:
        taken.append(timed_ms(call))
    return statistics.median(taken)


def peak_rss_bytes() -> int | None:
    """The peak resident memory of this process; getrusage's figure survives exec and may be the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _engine(task: Mapping[str, Any], images: npt.NDArray[Any]) -> Loaded:
    from swincompress_pl import accel

    engine = accel.load(task["file"], threads=task["threads"], implementation=task["implementation"])
    return Loaded(call=lambda: engine(images), logits=_answers, file_bytes=_file_bytes(task["file"]))


def _answers(result: Any) -> npt.NDArray[Any]:
    """The logits, or the mean of every named output, (N, outputs)."""
    if not isinstance(result, dict):
        return np.asarray(result)
    return np.stack([values.reshape(len(values), -1).mean(1) for values in result.values()], axis=1)


def _torch(task: Mapping[str, Any], images: npt.NDArray[Any]) -> Loaded:
    import torch

    from swincompress_pl import models

    torch.set_num_threads(task["threads"])
    torch.manual_seed(SEED)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[task["settings"].get("precision", "fp32")]
    network = models.rebuild(task["origin"]).eval()
    file_bytes = sum(value.nbytes for value in network.state_dict().values())
    network.to(precision)
    if task["settings"].get("compile"):
        network.compile()
    inputs = torch.from_numpy(images).to(precision)

    def call() -> object:
        with torch.inference_mode():
            return network(inputs)

    return Loaded(call=call, logits=lambda answer: answer.float().numpy(), file_bytes=file_bytes)


def _onnxruntime(task: Mapping[str, Any], images: npt.NDArray[Any]) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    options.inter_op_num_threads = 1
    for key, value in task["settings"].items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(task["file"], options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images}
    return Loaded(
        call=lambda: session.run(None, inputs),
        logits=lambda answers: answers[0],
        file_bytes=_file_bytes(task["file"]),
    )


def _openvino(task: Mapping[str, Any], images: npt.NDArray[Any]) -> Loaded:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": task["threads"], "PERFORMANCE_HINT": "LATENCY", **task["settings"]}
    request = core.compile_model(task["file"], "CPU", settings).create_infer_request()
    return Loaded(
        call=lambda: request.infer([images]),
        logits=lambda answers: answers[0],
        file_bytes=_file_bytes(task["file"]),
    )


def _mnn(task: Mapping[str, Any], images: npt.NDArray[Any]) -> Loaded:
    from MNN import expr, nn

    settings = {"backend": "CPU", "numThread": task["threads"], "precision": "high", **task["settings"]}
    module = nn.load_module_from_file(task["file"], [], [], runtime_manager=nn.create_runtime_manager((settings,)))
    inputs = expr.placeholder(list(images.shape), expr.NCHW, expr.float)
    inputs.write(images)

    def call() -> object:
        answers = module.forward([inputs])
        return np.array((answers[0] if isinstance(answers, list | tuple) else answers).read())  # it is lazy until then

    return Loaded(call=call, logits=np.asarray, file_bytes=_file_bytes(task["file"]))


def _executorch(task: Mapping[str, Any], images: npt.NDArray[Any]) -> Loaded:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(task["threads"])  # the only way to say how many
    program = Runtime.get().load_program(task["file"])
    method, inputs = program.load_method("forward"), [torch.from_numpy(images)]
    call = partial(_of_program, program, method, inputs)
    return Loaded(call=call, logits=lambda answers: answers[0].numpy(), file_bytes=_file_bytes(task["file"]))


def _of_program(_program: object, method: Any, inputs: list[Any]) -> object:
    """The method's answers; the program must outlive it."""
    return method.execute(inputs)


BUILDERS: dict[str, Callable[[Mapping[str, Any], npt.NDArray[Any]], Loaded]] = {
    "engine": _engine,
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "onnx program": _onnxruntime,
    "openvino": _openvino,
    "openvino pixels": _openvino,
    "mnn": _mnn,
    "executorch": _executorch,
}
# The engine and the files of `interop.to_onnx`; the other networks take normalized images.
_TAKE_PIXELS = ("engine", "onnx program", "openvino pixels")

_IMPORTS = {
    "engine": ("swincompress_pl.accel",),
    "torch": ("torch", "swincompress_pl.models"),
    "onnxruntime": ("onnxruntime",),
    "onnx program": ("onnxruntime",),
    "openvino": ("openvino",),
    "openvino pixels": ("openvino",),
    "mnn": ("MNN.nn",),
    "executorch": ("torch", "executorch.runtime"),
}


def _file_bytes(file: str) -> int:
    """The bytes of a file, and of the weights that OpenVINO keeps beside its XML."""
    path = Path(file)
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def random_images(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.uint8]:
    """Pixels (N, H, W, C), or counts of events (N, T, H, W, C), of uniform noise."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normalized(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Images (N, H, W, C) as the floats (N, C, H, W) that other runtimes take; (N, T, H, W, C) as (N, T, C, H, W)."""
    real = (images.astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
    return np.ascontiguousarray(np.moveaxis(real, -1, -3))


def _private_output() -> TextIO:
    """The original standard output, for answers only; descriptor 1 becomes the standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return answers


def _send(answers: TextIO, message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
