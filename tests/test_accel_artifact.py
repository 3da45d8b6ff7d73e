"""The artifact: the same bytes again, and a clear refusal of whatever is not one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.whole_programs import images_of, swin_program, vit_program

from swincompress_pl import accel, files, spec
from swincompress_pl.accel import ArtifactError, artifact
from swincompress_pl.cli.inspect import describe_artifact


@pytest.fixture(scope="module")
def program() -> spec.Program:
    return vit_program()


@pytest.fixture
def path(program: spec.Program, tmp_path: Path) -> Path:
    return accel.export(program, tmp_path / "model.safetensors")


def metadata_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == [artifact.METADATA_KEY]
    return json.loads(header["__metadata__"][artifact.METADATA_KEY])


def rewrite(path: Path, metadata: Any, tensors: dict[str, Any] | None = None) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors if tensors is not None else load_file(path), path, {artifact.METADATA_KEY: text})


@pytest.mark.parametrize("make", [swin_program, vit_program])
def test_export_read_export_is_byte_identical(make: Any, tmp_path: Path) -> None:
    first = accel.export(make(), tmp_path / "first.safetensors")
    second = accel.export(artifact.read(first), tmp_path / "second.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["first.safetensors", "second.safetensors"]


def test_read_gives_the_program_back(program: spec.Program, path: Path) -> None:
    given = artifact.read(path)
    assert given.describe() == program.describe()
    assert given.classes == program.classes
    assert set(given.tensors) == set(program.tensors)
    for key, tensor in program.tensors.items():
        assert given.tensors[key].dtype == tensor.dtype
        np.testing.assert_array_equal(given.tensors[key], tensor)


def test_the_loaded_engine_equals_the_program(program: spec.Program, path: Path) -> None:
    images = images_of(program, 5)
    np.testing.assert_array_equal(accel.load(path, threads=1).run_integer(images), spec.run(program, images))
    np.testing.assert_array_equal(accel.reference(path).run_integer(images), spec.run(program, images))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        accel.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file of pickles", b"\xff" * 100, b"{}"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"other\.pt: not a safetensors file"):
        accel.load(other)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_files_are_refused(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: max(int(len(content) * share), 9)])
    with pytest.raises(ArtifactError, match="truncated"):
        accel.load(path)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, dtype=np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="not an artifact of swincompress_pl"):
        accel.load(tmp_path / "weights.safetensors")


def test_foreign_descriptions_are_refused(path: Path) -> None:
    rewrite(path, "{")
    with pytest.raises(ArtifactError, match="not JSON"):
        accel.load(path)
    for foreign in ([], {"format": "other"}):
        rewrite(path, foreign)
        with pytest.raises(ArtifactError, match="is not a swincompress_pl"):
            accel.load(path)


def test_other_versions_are_refused(path: Path) -> None:
    for version in (4, 0, -1, 2**63, "1", 1.0, None):
        rewrite(path, {**metadata_of(path), "version": version})
        message = f"artifact version {json.dumps(version)}; this package reads versions 1 to 3: update it, or export"
        with pytest.raises(ArtifactError, match=re.escape(message)):
            accel.load(path)


@pytest.mark.parametrize("compression", [None, "lzma"])
@pytest.mark.parametrize("load", [accel.load, accel.reference, describe_artifact])
def test_another_version_is_not_said_to_be_altered(
    program: spec.Program, tmp_path: Path, compression: str | None, load: Callable[[Path], object]
) -> None:
    """Versions come first: the checksum of another version, and its tensors, may be of another kind."""
    path = accel.export(program, tmp_path / "model.safetensors", compression)
    rewrite(path, {**metadata_of(path), "version": 4})
    with pytest.raises(ArtifactError, match="artifact version 4; this package reads versions 1 to 3: update"):
        load(path)
    save_file({"weight": np.zeros(3, dtype=np.float32)}, path, {artifact.METADATA_KEY: json.dumps(metadata_of(path))})
    with pytest.raises(ArtifactError, match="artifact version 4; this package reads versions 1 to 3: update"):
        load(path)


@pytest.mark.parametrize("load", [accel.load, accel.reference, describe_artifact])
def test_another_specification_is_not_said_to_be_altered(path: Path, load: Callable[[Path], object]) -> None:
    metadata = metadata_of(path)
    metadata["description"]["norm_version"] = 3
    rewrite(path, metadata)
    with pytest.raises(ArtifactError, match=r"specification version 3; this package runs versions 1 and 2: export"):
        load(path)


@pytest.mark.parametrize("seed", range(20))
def test_an_altered_byte_is_refused(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[int(np.random.default_rng(seed).integers(start, len(content)))] ^= 1 << seed % 8
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        accel.load(path)


@pytest.mark.parametrize("change", ["logit_scale", "operations", "missing"])
def test_an_altered_description_is_refused(path: Path, change: str) -> None:
    metadata = metadata_of(path)
    if change == "logit_scale":
        metadata["description"]["logit_scale"] = (1.0).hex()
    elif change == "operations":
        metadata["description"]["operations"][0]["attributes"]["stride"] = [1, 1]
    else:
        del metadata["description"]
    rewrite(path, metadata)
    with pytest.raises(ArtifactError, match="altered"):
        accel.load(path)


def test_a_right_checksum_over_a_wrong_program_is_refused(path: Path) -> None:
    metadata, tensors = metadata_of(path), load_file(path)
    metadata["description"]["operations"][0]["attributes"]["stride"] = [1, 1]
    metadata["sha256"] = artifact.checksum(metadata["description"], tensors)
    rewrite(path, metadata, tensors)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: add_constant"):
        accel.load(path)
    metadata["description"]["norm_version"] = 99
    metadata["sha256"] = artifact.checksum(metadata["description"], tensors)
    rewrite(path, metadata, tensors)
    with pytest.raises(ArtifactError, match="specification version 99"):
        accel.load(path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_export_leaves_the_old_file(
    program: spec.Program, path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        accel.export(dataclasses.replace(program, logit_scale=2.0), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_midway_leaves_the_old_file(
    program: spec.Program, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        accel.export(dataclasses.replace(program, logit_scale=2.0), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_export_names_a_missing_folder(program: spec.Program, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        accel.export(program, tmp_path / "missing" / "model.safetensors")


def test_export_takes_models_with_to_program(program: spec.Program, tmp_path: Path) -> None:
    quantized = SimpleNamespace(to_program=lambda: program)
    for number, model in enumerate((program, quantized, SimpleNamespace(net=quantized))):
        path = accel.export(model, tmp_path / f"{number}.safetensors")
        assert artifact.read(path).describe() == program.describe()


def test_export_refuses_what_is_not_quantized(tmp_path: Path) -> None:
    for model in (object(), SimpleNamespace(net=object()), None):
        with pytest.raises(TypeError, match=r"is not quantized.*quantize it first"):
            accel.export(model, tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match=r"to_program\(\) returned dict"):
        accel.export(SimpleNamespace(to_program=dict), tmp_path / "x.safetensors")


def test_export_refuses_programs_that_break_the_norm(program: spec.Program, tmp_path: Path) -> None:
    with pytest.raises(spec.ProgramError, match="logit_scale"):
        accel.export(dataclasses.replace(program, logit_scale=float("nan")), tmp_path / "x.safetensors")
    extra = dataclasses.replace(program, tensors={**program.tensors, "stray": np.zeros(1, dtype=np.int8)})
    with pytest.raises(ArtifactError, match="'stray' is not used"):
        accel.export(extra, tmp_path / "x.safetensors")
    unwritable = dataclasses.replace(program, origin={"model": object()})
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        accel.export(unwritable, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []
