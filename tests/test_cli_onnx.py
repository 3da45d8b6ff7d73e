"""`swincompress export`, `inspect` and `bench` with ONNX files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.program_cases import small_program
from support.spiking_programs import spiking_program
from support.whole_programs import swin_program, vit_program

from swincompress_pl import accel, interop
from swincompress_pl.cli import main
from swincompress_pl.interop import files

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A small ViT that says how a picture becomes pixels."""
    preprocessing = {"height": 24, "width": 24, "resize": 24, "crop_mode": "center", "interpolation": "bilinear"}
    program = accel.with_preprocessing(vit_program(), preprocessing)
    named = type(program)(**{**vars(program), "classes": tuple("abcdefghij"[: program_classes(program)])})
    return accel.export(named, tmp_path / "model.safetensors")


def program_classes(program: Any) -> int:
    return len(program.tensors[program.operations[-1].tensors["bias"]])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


def test_an_artifact_becomes_onnx_and_is_compared(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = artifact.with_suffix(".onnx")
    code, out, _ = run(["export", str(artifact), "-o", str(output), "--reference-check", "3"], capsys)
    assert code == 0
    assert "reference and onnxruntime: identical integer logits on 3 random images" in out
    code, out, _ = run(["inspect", str(output)], capsys)
    assert code == 0
    assert "ONNX, form exact, opset 18" in out
    assert "input images: uint8 (N, 24, 24, 3)" in out
    assert "output integer_logits: int32 (N, " in out
    assert "MatMulInteger" in out
    code, out, _ = run(["inspect", str(output), "--json"], capsys)
    assert json.loads(out)["macs"] > 0
    bench = ["bench", str(output), "--against", "engine", "--threads", "1", "--rounds", "1"]
    code, out, _ = run(bench, capsys)
    assert code == 0
    assert "onnxruntime, exact" in out
    assert "integer logits of 2 random images: identical to the reference" in out
    code, out, _ = run([*bench, "--json"], capsys)
    assert [result["name"] for result in json.loads(out)["results"]] == ["engine", "onnxruntime, exact"]


@pytest.mark.parametrize("make", [small_program, spiking_program, swin_program])
def test_every_kind_of_network_is_compared(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = accel.export(make(), tmp_path / "model.safetensors")
    code, out, _ = run(["export", str(file), "-o", str(tmp_path / "m.onnx"), "--gather-elements"], capsys)
    assert code == 0
    assert "identical integer logits on 2 random images" in out


def test_wrong_integers_are_told(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = accel.artifact.read(artifact)
    key = program.operations[-1].tensors["bias"]
    other = {**program.tensors, key: program.tensors[key] + 1}
    wrong = type(program)(**{**vars(program), "tensors": other})
    written = interop.to_onnx

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interop, "to_onnx", lambda _, path, **options: written(wrong, path, **options))
        code, _, err = run(["export", str(artifact), "-o", str(artifact.with_suffix(".onnx"))], capsys)
    assert code == 1
    assert "onnxruntime's integers differ from the reference on 2 of 2 images" in err


def test_the_conventional_form_is_verified_on_pictures(
    artifact: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(artifact.with_suffix(".onnx"))
    qdq = ["export", str(artifact), "-o", output, "--form", "qdq", "--verify"]
    code, out, _ = run([*qdq, str(pictures)], capsys)
    assert code == 0
    assert "6 pictures: onnxruntime and the engine agree on " in out
    assert "accuracy in engine: " in out
    assert "accuracy in onnxruntime: " in out
    (pictures / "b").rename(pictures / "unknown")
    code, out, _ = run([*qdq, str(pictures), "--reduce-range"], capsys)
    assert code == 0
    assert "no accuracy: the folders are not the classes of the network" in out
    empty = pictures.parent / "empty"
    empty.mkdir()
    code, _, err = run([*qdq, str(empty)], capsys)
    assert code != 0
    assert "no pictures" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "m.safetensors", "--form", "qdq"], "--form: only for ONNX; name an output that ends in .onnx"),
        (["-o", "m.safetensors", "--float"], "--float: only for ONNX"),
        (["-o", "m.onnx", "--compression", "lzma"], "--compression lzma is of artifacts"),
        (["-o", "m.onnx", "--float", "--form", "qdq"], "--float writes the network before quantization; leave --form"),
        (["-o", "m.onnx", "--verify", "gone"], "--verify gone: there is no such folder"),
        (["-o", "m.onnx", "--float"], "is no Lightning checkpoint; it has no float network"),
        (["-o", "m.onnx", "--form", "qdq", "--gather-elements"], "gather_elements is of form='exact'"),
        (["-o", "gone/m.onnx"], "the folder gone does not exist"),
    ],
)
def test_contradictory_options_are_refused(
    artifact: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, _, err = run(["export", str(artifact), *options], capsys)
    assert code != 0
    assert message in " ".join(err.split())
    assert sorted(tmp_path.iterdir()) == before


def test_files_of_another_origin_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    helper = onnx.helper
    info = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [info], [out]))
    foreign, cut, noise, letters = (tmp_path / f"{name}.onnx" for name in ("foreign", "cut", "noise", "letters"))
    onnx.save(model, foreign)
    letters.write_bytes(foreign.read_bytes().replace(b"Abs", b"A\xffs"))  # not UTF-8
    cut.write_bytes(interop.to_onnx(small_program(), tmp_path / "whole.onnx").read_bytes()[:-1000])
    noise.write_bytes(b"no protobuf at all")
    for command in ("inspect", "bench"):
        code, _, err = run([command, str(foreign)], capsys)
        assert code != 0
        assert "an ONNX file of an unknown producer, which swincompress_pl did not write" in err
        for file in (cut, noise, letters):
            code, _, err = run([command, str(file)], capsys)
            assert code != 0
            assert "is no whole ONNX file" in err


def test_bench_needs_the_artifact_of_the_same_network(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_file = str(interop.to_onnx(accel.artifact.read(artifact), tmp_path / "other.onnx"))
    for arguments, message in (
        (["--against", "engine"], "other.safetensors: there is no such file; name the artifact of"),
        (["--against", "torch"], "an ONNX file is compared with `engine`"),
        (["--artifact", str(artifact)], "goes with --against engine"),
        (["--operations"], "--operations: only for an artifact"),
    ):
        code, _, err = run(["bench", onnx_file, *arguments], capsys)
        assert code != 0
        assert message in err
    stranger = accel.export(swin_program(), tmp_path / "stranger.safetensors")
    code, _, err = run(["bench", onnx_file, "--against", "engine", "--artifact", str(stranger)], capsys)
    assert code != 0
    assert "is of another network than" in err
    code, _, err = run(["bench", str(artifact), "--artifact", str(stranger)], capsys)
    assert code != 0
    assert "only for an ONNX file" in err


def test_without_onnxruntime_nothing_is_compared(
    artifact: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export = ["export", str(artifact), "-o", str(artifact.with_suffix(".onnx"))]
    code, _, err = run(export, capsys)
    assert code == 0
    assert "onnxruntime is not installed, so its answers were not compared" in err
    code, _, err = run([*export, "--verify", str(pictures)], capsys)
    assert code != 0
    assert "pip install swincompress_pl[onnx]" in err


def test_descriptions_of_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx: there is no such file"):
        files.describe_onnx(tmp_path / "gone.onnx")
