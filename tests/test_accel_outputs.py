"""Programs with several named outputs: engine, reference and artifact agree on all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.whole_programs import PROGRAMS, ProgramBuilder, images_of, swin_program, vit_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import artifact
from swincompress_pl.accel.core import program_engine
from swincompress_pl.cli import bench, inspect


def with_outputs(program: spec.Program, chosen: list[str], **changes: Any) -> spec.Program:
    """The Program with these values as named outputs, and another scale for each."""
    values = spec.check(program)
    outputs = tuple(
        spec.Output(name=f"map {i}", value=name, scale=0.5 / (i + 1), shape=values[name].shape, **changes)
        for i, name in enumerate(chosen)
    )
    return dataclasses.replace(program, outputs=outputs, logit_scale=1.0, classes=None)


def possible(program: spec.Program) -> list[str]:
    values = spec.check(program)
    return [op.output for op in program.operations if values[op.output].dtype in ("int8", "int16", "int32")]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


BOTH = {family: make(0) for family, make in PROGRAMS.items()}


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("family", PROGRAMS)
def test_random_outputs_equal_the_reference(family: str, data: st.DataObject) -> None:
    """Values that kernels would fuse away, that many steps read and that none reads, in any order."""
    names = possible(BOTH[family])
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    program = with_outputs(BOTH[family], chosen)
    images = images_of(program, data.draw(st.sampled_from([1, 3, 9])))
    expected = spec.run_outputs(program, images)
    for implementation in accel.implementations():
        engine = accel.Engine(program, threads=data.draw(st.sampled_from([1, 2])), implementation=implementation)
        assert_same(engine.run_integer(images), expected)


@pytest.mark.parametrize("family", PROGRAMS)
def test_every_value_at_once_beyond_a_chunk(family: str) -> None:
    program = with_outputs(BOTH[family], possible(BOTH[family]))
    chunk = program_engine(program, implementation=None, threads=1).chunk
    images = images_of(program, 2 * chunk + 1)
    engine = accel.Engine(program, threads=2)
    found = engine.run_integer(images)
    assert_same(found, spec.run_outputs(program, images))
    assert all(len(np.unique(array)) > 30 for array in found.values())
    steps = program_engine(program, implementation=None, threads=1).steps
    assert sum(map(len, steps)) == len(program.operations)


def test_the_last_output_alone_is_the_logits() -> None:
    plain = vit_program()
    program = with_outputs(plain, [plain.operations[-1].output])
    images = images_of(program, 5)
    found = accel.Engine(program, threads=1).run_integer(images)
    np.testing.assert_array_equal(found["map 0"][:, 0], spec.run(plain, images))
    with pytest.raises(ValueError, match=r"1 named outputs and no logits; use spec.run_outputs"):
        spec.run(program, images)
    with pytest.raises(ValueError, match=r"no named outputs; use spec\.run"):
        spec.run_outputs(plain, images)


def feature_program() -> spec.Program:
    """A Swin-like Program with the residual streams of its two stages, as maps, and a vector."""
    plain = swin_program()
    values = spec.check(plain)
    adds = [op.output for op in plain.operations if op.kind == "add"]
    first = next(name for name in reversed(adds) if values[name].shape[-1] == 24)
    (mean,) = [op.output for op in plain.operations if op.kind == "mean"]
    shapes = {"layers.0": (first, (8, 8, 24)), "layers.1": (adds[-1], (4, 4, 48)), "pooled": (mean, (48,))}
    outputs = tuple(
        spec.Output(name=name, value=value, scale=0.25, shape=shape) for name, (value, shape) in shapes.items()
    )
    kept = plain.operations[: [op.output for op in plain.operations].index(mean) + 1]
    keys = {key for op in kept for key in op.tensors.values()}
    return dataclasses.replace(
        plain,
        operations=kept,
        tensors={key: plain.tensors[key] for key in keys},
        outputs=outputs,
        logit_scale=1.0,
        classes=None,
    )


@pytest.mark.parametrize("compression", [None, "lzma"])
def test_artifact_round_trip(compression: str | None, tmp_path: Path) -> None:
    program = feature_program()
    path = accel.export(program, tmp_path / "maps.safetensors", compression)
    engine, reference = accel.load(path, threads=2), accel.reference(path)
    images = images_of(program, 3)
    expected = spec.run_outputs(program, images)
    assert_same(engine.run_integer(images), expected)
    assert_same(reference.run_integer(images), expected)
    shapes = [("layers.0", (8, 8, 24), "int16"), ("layers.1", (4, 4, 48), "int16"), ("pooled", (48,), "int8")]
    assert [(o.name, o.shape, o.dtype) for o in engine.outputs] == shapes
    assert engine.outputs == reference.outputs == accel.Engine(program, threads=1).outputs
    maps = engine(images)
    assert {name: array.shape for name, array in maps.items()} == {n: (3, *shape) for n, shape, _ in shapes}
    for name, array in maps.items():
        np.testing.assert_array_equal(array, (expected[name] * 0.25).astype(np.float32))
    assert artifact.read(path).outputs == program.outputs
    assert path.read_bytes() == artifact.to_bytes(artifact.read(path), compression)


def test_an_engine_of_maps_tells_what_it_gives() -> None:
    engine = accel.Engine(feature_program(), threads=1)
    assert engine.num_classes == 0
    assert engine.classes is None
    assert "outputs layers.0, layers.1, pooled" in repr(engine)
    none = engine(np.zeros((0, 32, 32, 3), np.uint8))
    assert {name: array.shape for name, array in none.items()} == {
        "layers.0": (0, 8, 8, 24),
        "layers.1": (0, 4, 4, 48),
        "pooled": (0, 48),
    }
    with pytest.raises(ValueError, match=r"gives the outputs layers.0, layers.1, pooled, and no logits"):
        engine.classify("cat.jpg")
    images = images_of(engine.program, 2)
    assert_same(pickle.loads(pickle.dumps(engine)).run_integer(images), engine.run_integer(images))
    profile = engine.profile(images, repeats=1)
    assert profile.macs == 2 * sum(cost.macs for cost in spec.costs(engine.program))
    (only,) = accel.Engine(vit_program(), threads=1).outputs
    assert (only.name, only.shape, only.dtype, only.scale) == ("logits", (7,), "int32", 0.0123)


def test_the_description_of_logits_is_as_it_was() -> None:
    described = vit_program().describe()
    assert described["norm_version"] == 1
    assert "outputs" not in described
    described = feature_program().describe()
    assert described["norm_version"] == 2
    assert not {"logit_scale", "classes"} & set(described)
    again = spec.Program.from_description(json.loads(json.dumps(described)), feature_program().tensors)
    assert again.describe() == described


def changed(number: int = 0, **changes: Any) -> spec.Program:
    program = feature_program()
    outputs = list(program.outputs)
    outputs[number] = dataclasses.replace(outputs[number], **changes)
    return dataclasses.replace(program, outputs=tuple(outputs))


WRONG = {
    "taken name": (lambda: changed(name="pooled"), "output 'pooled': its name is taken"),
    "empty name": (lambda: changed(name=""), "output '': its name is empty"),
    "long name": (lambda: changed(name="n" * 1025), "at most 1024 are read|longer than 1024 bytes"),
    "pixels": (lambda: changed(value="images"), "output 'layers.0': gives .images., which no operation writes"),
    "unknown value": (lambda: changed(value="maps"), "output 'layers.0': gives .maps., which no operation writes"),
    "value twice": (
        lambda: changed(2, value=feature_program().outputs[1].value, shape=(4, 4, 48)),
        "output 'pooled': gives .*, as an earlier output does",
    ),
    "shape": (lambda: changed(shape=(8, 4, 48)), r"has shape \(8, 4, 48\), but its value is \(8, 8, 24\)"),
    "no shape": (lambda: changed(shape=()), r"output 'layers.0': has shape \(\), but its value is"),
    "empty shape": (lambda: changed(shape=(0, 24)), r"has shape \(0, 24\), but its value is"),
    "huge shape": (lambda: changed(shape=(2**62, 2**62, 24)), "but its value is|entry 'shape'"),
    "scale": (lambda: changed(scale=0.0), "its scale is .*; it must be positive and finite"),
    "infinite scale": (lambda: changed(scale=math.inf), "its scale is .*; it must be positive and finite"),
    "too many": (
        lambda: dataclasses.replace(feature_program(), outputs=feature_program().outputs * 86),
        "program of 258 outputs; it must have 1 to 256",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_outputs_are_refused_alike(case: str, tmp_path: Path) -> None:
    """By the checker, and by C++ in an artifact that was written by somebody else."""
    make, message = WRONG[case]
    with pytest.raises(spec.ProgramError, match=message):
        spec.check(make())
    with pytest.raises(accel.ArtifactError, match=message):
        accel.load(forged(make(), tmp_path))
    with pytest.raises(accel.ArtifactError, match=message):
        accel.reference(forged(make(), tmp_path))


def forged(program: spec.Program, folder: Path) -> Path:
    """An artifact of a Program that `export` would refuse."""
    path = folder / "forged.safetensors"
    described = program.describe()
    used = {key: np.ascontiguousarray(program.tensors[key]) for key in sorted(program.tensors)}
    content = {"format": artifact.FORMAT, "sha256": artifact.checksum(described, used)}
    stored, packed = artifact._packed(described, used)
    path.write_bytes(artifact.save(stored, {artifact.METADATA_KEY: artifact._json({**content, **packed})}))
    return path


def test_only_integers_of_whole_types_are_outputs(tmp_path: Path) -> None:
    build = ProgramBuilder(0, 8, 8)
    narrow = build.add("softmax", (build.conv("images", 3, 8, 4, "int8"),), "uint8", {}, mult=2**21, shift=21)
    plain = build.classifier(build.mean(narrow, 4, 8), 8, 3)
    program = with_outputs(plain, [narrow])
    with pytest.raises(spec.ProgramError, match="is uint8; it must be one of int8, int16, int32"):
        spec.check(program)
    with pytest.raises(accel.ArtifactError, match="is uint8; it must be one of int8, int16, int32"):
        accel.load(forged(program, tmp_path))


def test_logits_and_outputs_exclude_each_other() -> None:
    with pytest.raises(spec.ProgramError, match="has classes or a logit_scale, which only logits have"):
        spec.check(dataclasses.replace(feature_program(), logit_scale=2.0))
    with pytest.raises(spec.ProgramError, match="has classes or a logit_scale, which only logits have"):
        spec.check(dataclasses.replace(feature_program(), classes=("a",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("outputs"), "'outputs'"),
        (lambda d: d.update(outputs=[]), "program of 0 outputs; it must have 1 to 256"),
        (lambda d: d.update(outputs={}), "'outputs'"),
        (lambda d: d["outputs"][0].pop("scale"), "'scale'"),
        (lambda d: d["outputs"][0].update(shape=[8.5, 8, 24]), "ill-typed"),
        (lambda d: d["outputs"][0].update(name=7), "ill-typed"),
        (lambda d: d.update(norm_version=3), "specification version 3; this package runs versions 1 and 2"),
    ],
)
def test_bad_descriptions_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    program = feature_program()
    described = program.describe()
    change(described)
    with pytest.raises(spec.ProgramError, match=message):
        spec.Program.from_description(described, program.tensors)
    path = accel.export(program, tmp_path / "bad.safetensors")
    metadata, tensors = parts_of(path)
    change(metadata["description"])
    used = {key: np.ascontiguousarray(program.tensors[key]) for key in sorted(program.tensors)}
    metadata["sha256"] = artifact.checksum(metadata["description"], used)
    path.write_bytes(artifact.save(tensors, {artifact.METADATA_KEY: artifact._json(metadata)}))
    with pytest.raises(accel.ArtifactError, match=message):
        accel.load(path)


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][artifact.METADATA_KEY]), artifact.load(content)


def test_commands_show_the_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = accel.export(feature_program(), tmp_path / "maps.safetensors")
    assert inspect.main("inspect", [str(path)]) == 0
    shown = capsys.readouterr().out
    assert "output layers.0: int16 (N, 8, 8, 24), one step is 0.25" in shown
    assert "logits" not in shown
    assert inspect.main("inspect", [str(path), "--json"]) == 0
    assert [o["dtype"] for o in json.loads(capsys.readouterr().out)["outputs"]] == ["int16", "int16", "int8"]
    assert bench.main("bench", [str(path), "--rounds", "1", "--threads", "1"]) == 0
    assert "identical to the reference" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has named outputs, and torch would be compared by logits"):
        bench.main("bench", [str(path), "--against", "torch"])
