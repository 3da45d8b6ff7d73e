"""onnxruntime on a CPU without VNNI, which qemu emulates: the exact form is exact there, where others saturate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.program_cases import small_program
from support.spiking_programs import layers_of_spikes, spiking_program
from support.whole_programs import images_of, swin_program, vit_program

from swincompress_pl import interop, spec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

PROGRAMS = {
    "swin": swin_program, "vit": vit_program, "all kinds": small_program, "spiking": spiking_program,
    "spikes": layers_of_spikes,
}  # fmt: skip
RUN = """
import json, sys
import numpy as np, onnxruntime
wrong = {}
for name, outputs in json.loads(sys.argv[2]).items():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    file = f"{sys.argv[1]}/{name}"
    session = onnxruntime.InferenceSession(file + ".onnx", options, providers=["CPUExecutionProvider"])
    arrays = np.load(file + ".npz")
    found = session.run([outputs], {session.get_inputs()[0].name: arrays["given"]})[0]
    wrong[name] = int((found != arrays["expected"]).sum())
print(json.dumps(wrong))
"""


def product(folder: Path, name: str, weight: Any, zero_point: Any) -> None:
    """A model of one product of corner values, 255 by 127."""
    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    x = np.full((9, 384), 255, np.uint8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero", "at"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
        initializer=[tensor(weight, "w"), tensor(np.uint8(0), "zero"), tensor(zero_point, "at")],
    )
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", given=x, expected=np.full((9, 40), 255 * 127 * 384))


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="emulates x86-64 on Linux")
def test_the_exact_form_is_exact_without_vnni(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64: not installed; on Debian `apt-get install qemu-user` brings it.")
    product(tmp_path, "signed", np.full((384, 40), 127, np.int8), np.int8(0))
    product(tmp_path, "unsigned", np.full((384, 40), 255, np.uint8), np.uint8(128))
    outputs = {"signed": "y", "unsigned": "y"}
    for name, make in PROGRAMS.items():
        program = make()
        images = images_of(program, 2)
        interop.to_onnx(program, tmp_path / f"{name}.onnx")
        expected = spec.run(program, images)
        np.savez(tmp_path / f"{name}.npz", given=images, expected=expected)
        outputs[name] = "integer_logits"
    command = [emulator, "-cpu", "max", os.path.realpath(sys.executable), "-c", RUN, str(tmp_path), json.dumps(outputs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = json.loads(done.stdout)
    if wrong.pop("signed") == 0:
        pytest.skip("this emulator has VNNI: nothing saturates")
    assert wrong == dict.fromkeys(["unsigned", *PROGRAMS], 0)
