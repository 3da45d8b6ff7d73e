"""The benchmark of ONNX in other runtimes, on small Programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.spiking_programs import spiking_program
from support.whole_programs import vit_program

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from benchmarks.interop import work
from benchmarks.interop.networks import images_of


def test_jobs_have_names_of_their_own() -> None:
    names = [job.name for job in work.all_jobs()]
    assert len(set(names)) == len(names)
    assert all("/" not in name and " " not in name for name in names)


def test_forms_are_compared(tmp_path: Path) -> None:
    found = work._forms(vit_program(), tmp_path)
    exact = found["exact"]
    assert all(exact[name] for name in exact if name != "openvino")
    assert set(found["qdq"]) == {"file_bytes", "onnxruntime", "openvino"}
    assert "no conventional form" in work._forms(spiking_program(), tmp_path)["qdq"]["refused"]


def test_a_difference_is_seen() -> None:
    images = images_of(vit_program(), 2)
    right, wrong = np.zeros((2, 3)), np.zeros((2, 3))
    wrong[1, 1] = 1
    assert work._equal(lambda _: [right], images, right)
    assert not work._equal(lambda _: [wrong], images, right)


def test_time_is_told_by_kind_of_operation(tmp_path: Path) -> None:
    from swincompress_pl import interop

    program = vit_program()
    file = interop.to_onnx(program, tmp_path / "model.onnx", gather_elements=True)
    kinds = work._by_kind(program, file, tmp_path)
    assert set(kinds["onnxruntime"]) <= {op.kind for op in program.operations} | {"output"}
    assert kinds["onnxruntime"]["linear"] > 0
    assert kinds["engine"]["attention"] > 0
