"""Checks that a runner is held to AVX2: `python -m benchmarks.engine.held` runs it once in a process of its own.

The process reads a JSON line of what to run. It says which registers beyond those of AVX2 the first warm call wrote, in
any thread, how often the CPU's answers were replaced while the runtime loaded and in that call, and whether
onnxruntime's products of 8 bits saturate, which they do not where it uses VNNI.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from swincompress_pl.report.comparison import worker
from swincompress_pl.report.comparison.compare import Runner, process_environment

from .hold_to_avx2 import EVERY_PROCESS, Hold

WATCH = Path(__file__).with_name("wide_registers.c")
_ROOT = Path(__file__).resolve().parents[2]
_STATES = {5: "opmask", 6: "ZMM 0 to 15", 7: "ZMM 16 to 31", 17: "AMX", 18: "AMX"}  # {bit of XCR0: registers}
_LIMIT_S = 600.0
_LAST_WORDS = 300


def check(runner: Runner, hold: Hold, watch: Path) -> tuple[Runner, dict[str, Any]]:
    """The runner as it is held, unavailable where it is not, and what was found of it.

    watch: the library built of WATCH.
    """
    held = replace(runner, environment=hold.environment(runner.runtime))
    if runner.unavailable:
        return held, {"name": runner.name, "why_not": runner.unavailable}
    found = run_once(held, watch)
    why_not = reason(found, asks=runner.runtime in hold.sites)
    free = run_once(replace(runner, environment=EVERY_PROCESS), watch)
    return replace(held, unavailable=why_not), {"name": runner.name, "why_not": why_not, "held": found, "free": free}


def reason(found: Mapping[str, Any], *, asks: bool) -> str | None:
    """Why a runner is not held, or None; asks: whether its package asks the CPU, which must have been answered."""
    if "error" in found:
        return str(found["error"])
    if found["registers"]:
        return f"not held to AVX2: it writes {', '.join(found['registers'])}"
    if asks and not found["cpuid_answers"]:
        return "not held to AVX2: its questions to the CPU were not answered by the handler"
    if found["saturates"] is False:
        return "not held to AVX2: its products of 8 bits do not saturate, as without VNNI"
    return None


def run_once(runner: Runner, watch: Path) -> dict[str, Any]:
    """What the process says of a runner; {"error": why} where it fails."""
    environment = process_environment(runner)
    environment["PYTHONPATH"] += f":{_ROOT}"
    command = [sys.executable, "-P", "-m", __name__, str(watch)]
    task = json.dumps(runner.task(0, 0.0))
    try:
        done = subprocess.run(
            command, input=task, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it gave no answer for {_LIMIT_S:g} s, and was ended"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["without a message"]
        return {"error": f"its process ended with {done.returncode}: {lines[-1][-_LAST_WORDS:]}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main(watch: str) -> None:
    """Runs the task of the standard input and prints what was found."""
    task = json.loads(sys.stdin.readline())
    try:
        loaded, _ = worker.load(task)
        answers = cpuid_answers()
        found = {
            "registers": written_by(loaded.call, ctypes.CDLL(watch)),
            "cpuid_answers": answers,
            "cpuid_answers_in_call": cpuid_answers() - answers,
            "saturates": products_saturate() if task["runtime"] == "onnxruntime" else None,
        }
    except Exception as error:  # a runtime that fails is a row with the reason
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


def written_by(call: worker.Call, watch: ctypes.CDLL) -> list[str]:
    """The registers beyond those of AVX2 that a call writes."""
    take = watch.take_wide_registers
    take.restype = ctypes.c_int64
    before = take()
    call()
    states = take()
    if min(before, states) < 0:
        raise RuntimeError("not all threads came to rest and said which registers they wrote")
    return list(dict.fromkeys(name for bit, name in _STATES.items() if states >> bit & 1))


def cpuid_answers() -> int:
    """How often the handler has answered in this process; 0 where it is not loaded."""
    try:
        count = ctypes.CDLL(None).cpuid_answers
    except AttributeError:
        return 0
    count.restype = ctypes.c_uint64
    return int(count())


def products_saturate() -> bool:
    """Whether sums of two products of 255 and 127 saturate at 16 bits in onnxruntime."""
    import numpy as np
    import onnx
    import onnxruntime

    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    x, weight = np.full((9, 384), 255, np.uint8), np.full((384, 40), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero", "at"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
        initializer=[tensor(weight, "w"), tensor(np.array(0, np.uint8), "zero"), tensor(np.array(0, np.int8), "at")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((session.run(None, {"x": x})[0] != 255 * 127 * x.shape[1]).any())


if __name__ == "__main__":
    main(sys.argv[1])
