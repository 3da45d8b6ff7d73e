"""ONNX whose integers equal the specification's: every operation, whole Programs, both ways to shift, and bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.counting_programs import counting_program, e_spikeformer_program
from support.program_cases import masked, small_program, with_maps
from support.random_operations import random_cases
from support.spiking_programs import SpikingCase, layers_of_spikes, spiking_cases, spiking_program
from support.whole_programs import images_of, swin_program, vit_program

from swincompress_pl import interop, spec
from swincompress_pl.interop import files
from swincompress_pl.interop.arithmetic import Wide, held, held_type, shifted
from swincompress_pl.interop.exact import IR_VERSION, OPSET, Call, exact_graph
from swincompress_pl.interop.graph import OnnxGraph
from swincompress_pl.interop.layers import LAYERS
from swincompress_pl.interop.spiking import SPIKING
from swincompress_pl.spec.kinds import KINDS, check_operation

onnx = pytest.importorskip("onnx")
evaluator = pytest.importorskip("onnx.reference")
ort = pytest.importorskip("onnxruntime")

Array = npt.NDArray[Any]
TRANSLATED = {**LAYERS, **SPIKING}
QUIET = 4


def checked(model: Any) -> bytes:
    """The model's bytes, after the checks of onnx; only standard operators are in it."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {node.domain for node in model.graph.node} == {""}
    return bytes(model.SerializeToString())


def session(content: bytes | str, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = QUIET, threads
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def operation_model(op: spec.Operation, inputs: list[spec.Value], tensors: Mapping[str, Array]) -> Any:
    output = check_operation(op, inputs, tensors)
    graph = OnnxGraph(onnx, opset=OPSET, ir_version=IR_VERSION)
    names = tuple(f"x{number}" for number in range(len(inputs)))
    for name, value in zip(names, inputs, strict=True):
        graph.input(name, held_type(value.dtype), value.shape)
    graph.at("operation")
    found = TRANSLATED[op.kind](
        Call(graph=graph, op=op, tensors=tensors, inputs=tuple(inputs), names=names, output=output)
    )
    graph.output(found, "y", held_type(output.dtype), output.shape)
    return graph.model("operation", producer="test", version="0", metadata={})


def assert_equals_specification(case: Any, inputs: list[spec.Value], *, reference: bool = False) -> None:
    model = operation_model(case.operation, inputs, case.tensors)
    output = check_operation(case.operation, inputs, case.tensors)
    expected = held(case.expected().reshape(len(case.arrays[0]), *output.shape), output.dtype)
    fed = {f"x{n}": held(x, v.dtype) for n, (x, v) in enumerate(zip(case.arrays, inputs, strict=True))}
    answers = [session(checked(model)).run(None, fed)[0]]
    if reference:
        answers.append(evaluator.ReferenceEvaluator(model).run(None, fed)[0])
    for answer in answers:
        assert answer.dtype == expected.dtype
        assert answer.shape == expected.shape
        assert np.array_equal(answer, expected), case


def test_every_kind_is_translated() -> None:
    assert set(TRANSLATED) == set(KINDS)


@pytest.mark.parametrize("seed", range(3))
def test_operations_equal_the_specification(seed: int) -> None:
    for case in random_cases(seed, 150):
        assert_equals_specification(case, case.inputs)
    for spiking in spiking_cases(60, seed):
        assert_equals_specification(spiking, spiking.values)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # numpy pads int32 with -inf in the evaluator
def test_the_reference_evaluator_agrees() -> None:
    for case in random_cases(11, 60):
        assert_equals_specification(case, case.inputs, reference=True)
    for spiking in spiking_cases(30, 11):
        assert_equals_specification(spiking, spiking.values, reference=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_4000_operations_equal_the_specification(seed: int) -> None:
    for case in random_cases(seed, 700):
        assert_equals_specification(case, case.inputs)
    for spiking in spiking_cases(300, seed):
        assert_equals_specification(spiking, spiking.values)


@pytest.mark.parametrize("depth", [1, 3, 384, 4097])
@pytest.mark.parametrize("weight", [-127, 127])
@pytest.mark.parametrize(("dtype", "value"), [("uint8", 255), ("int8", 127), ("int8", -127)])
def test_products_of_corners_do_not_saturate(dtype: str, value: int, weight: int, depth: int) -> None:
    """Pairs of 255 * 127 pass 16 bits, where uint8 by int8 saturates on a CPU without VNNI."""
    tensors = {
        "weight": np.full((40, depth), weight, np.int8),
        "bias": np.zeros(40, np.int32),
        "mult": np.full(40, 2**21, np.int32),
        "shift": np.full(40, 21, np.uint8),
    }
    op = spec.Operation(
        kind="linear", name="corner", inputs=("x",), output="y", dtype="int32", attributes={"channels": 40},
        tensors={role: role for role in tensors},
    )  # fmt: skip
    model = operation_model(op, [spec.Value(dtype=dtype, shape=(9, depth))], tensors)
    x = held(np.full((2, 9, depth), value), dtype)
    assert np.array_equal(session(checked(model)).run(None, {"x0": x})[0], np.full((2, 9, 40), value * weight * depth))


@pytest.mark.parametrize("bias", [0, -(2**31), 2**31 - 1])
@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**31 - 1), ("int32", -(2**31) + 1), ("uint8", 255)])
def test_sums_over_255_steps_pass_neither_53_bits_nor_int32_unseen(dtype: str, value: int, bias: int) -> None:
    """255 times the largest int32 is about 2^39, and times the largest multiplier 2^61."""
    mult, shift = np.array([2**22 - 1, 2**22 - 1, 2**21, 1, 0]), np.array([1, 52, 21, 22, 1])
    for result, bound in (("int32", {}), ("int16", {}), ("uint8", {"largest": 4})):
        case = SpikingCase(
            kind="integrate", dtype=result, dtypes=(dtype,), attributes={"steps": 255, **bound},
            arrays=(np.full((1, 255, 5), value).astype(spec.STORAGE[dtype]),),
            tensors={
                "bias": np.full(5, bias, np.int32), "mult": mult.astype(np.int32), "shift": shift.astype(np.uint8)
            },
        )  # fmt: skip
        assert_equals_specification(case, case.values, reference=True)


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_neurons_are_charged_with_streams_of_both_widths(dtype: str) -> None:
    low, high = spec.LIMITS[dtype]
    numbers = [low, -3, -1, 0, 1, 2, 3, 4, 5, 7, high]
    case = SpikingCase(
        kind="fire", dtype="uint1", dtypes=(dtype,), attributes={"steps": 4},
        arrays=(np.array(numbers)[None, :, None].repeat(4, 2).astype(dtype),),
        tensors={
            "mult": np.array([2**21, 2**21, 2**22 - 1, 0], np.int32), "shift": np.array([21, 22, 1, 52], np.uint8)
        },
    )  # fmt: skip
    assert_equals_specification(case, case.values, reference=True)


@given(
    numbers=st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=40),
    mult=st.one_of(st.integers(0, 2**22 - 1), st.sampled_from([0, 1, 2**21, 2**22 - 1])),
    shift=st.integers(1, 52),
    near=st.booleans(),
    added=st.one_of(st.just(0), st.integers(-(2**53), 2**53)),
    raised=st.sampled_from([0, 128]),
)
def test_a_shift_rounds_once_in_float64_and_in_int64(
    numbers: list[int], mult: int, shift: int, near: bool, added: int, raised: int
) -> None:
    if near and mult:  # numbers whose product is about half of a step
        numbers = [min(max((n << shift >> 16) // mult, -(2**31) + 1), 2**31 - 1) for n in numbers]
    reach = max(map(abs, numbers))
    expected = [(n * mult + added + 2 ** (shift - 1)) >> shift for n in numbers]
    for bound in (reach, 2**31 - 1):  # what is proved decides the way
        graph = OnnxGraph(onnx, opset=OPSET, ir_version=IR_VERSION)
        graph.input("x", "int32", ())
        found = shifted(graph, Wide(name="x", dtype="int32"), mult, shift, bound, added=added, raised=raised)
        needed = bound * mult + abs(added) + 2 ** (shift - 1)
        assert found.dtype == ("float64" if needed < 2**53 else "int64")
        assert found.raised == (raised if needed + raised * 2**shift < 2**53 else 0)
        graph.output(graph.cast(found.name, "int64"), "y", "int64", ())
        model = graph.model("shift", producer="test", version="0", metadata={})
        answer = session(checked(model)).run(None, {"x": np.array(numbers, np.int32)})[0]
        assert (answer - found.raised).tolist() == expected


PROGRAMS: dict[str, Callable[[], spec.Program]] = {
    "swin": swin_program,
    "vit": vit_program,
    "all kinds": small_program,
    "masked": lambda: masked(small_program(), 0.6),
    "maps": lambda: with_maps(small_program()),
    "spiking": spiking_program,
    "spikes": layers_of_spikes,
    "counts": lambda: counting_program(0, 4),
    "counts of one": lambda: counting_program(1, 1),
    "counts, binary steps": lambda: spec.binary_steps(counting_program(2, 9)),
    "e-spikeformer": e_spikeformer_program,
    "e-spikeformer, binary steps": lambda: spec.binary_steps(e_spikeformer_program()),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_programs_equal_the_specification(name: str, threads: int, tmp_path: Path) -> None:
    program = PROGRAMS[name]()
    path = interop.to_onnx(program, tmp_path / "model.onnx")
    checked(onnx.load(path))
    runtime = session(str(path), threads)
    for count in (1, 3):
        images = images_of(program, count)
        answers = dict(zip([o.name for o in runtime.get_outputs()], runtime.run(None, {"images": images}), strict=True))
        if program.outputs:
            expected = spec.run_outputs(program, images)
            for output in program.outputs:
                integers = answers[f"integer_{output.name}"]
                assert integers.dtype == expected[output.name].dtype
                assert np.array_equal(integers, expected[output.name].reshape(integers.shape))
                real = (integers * output.scale).astype(np.float32)
                assert np.array_equal(answers[output.name], real)
        else:
            expected = spec.run(program, images)
            assert np.array_equal(answers["integer_logits"], expected)
            assert np.array_equal(answers["logits"], (expected * program.logit_scale).astype(np.float32))


def test_both_readings_of_counts_have_one_answer(tmp_path: Path) -> None:
    """In onnxruntime and in onnx's evaluator."""
    program = e_spikeformer_program()
    images = images_of(program, 1)
    expected = spec.run(program, images)
    for number, reading in enumerate((program, spec.binary_steps(program))):
        path = interop.to_onnx(reading, tmp_path / f"{number}.onnx")
        assert np.array_equal(session(str(path)).run(["integer_logits"], {"images": images})[0], expected)
        evaluated = evaluator.ReferenceEvaluator(onnx.load(path)).run(["integer_logits"], {"images": images})
        assert np.array_equal(evaluated[0], expected)


def test_what_an_artifact_says_is_in_the_metadata(tmp_path: Path) -> None:
    program = small_program()
    model = onnx.load(interop.to_onnx(program, tmp_path / "model.onnx"))
    given = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    described = program.describe()
    for key in ("input", "origin", "logit_scale"):
        assert given[f"swincompress_pl.{key}"] == described[key]
    assert given.get("swincompress_pl.classes") == described["classes"]
    assert given["swincompress_pl.form"] == "exact"
    assert model.producer_name == "swincompress_pl"
    assert (model.opset_import[0].version, model.ir_version) == (OPSET, IR_VERSION)


# Bad input


def test_wrong_arguments(tmp_path: Path) -> None:
    program, path = small_program(), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="opset is 17; this network is written with opset 18"):
        interop.to_onnx(program, path, opset=17)
    with pytest.raises(TypeError, match=r"takes a spec\.Program, not str; `accel\.load\(file\)\.program`"):
        interop.to_onnx("model.safetensors", path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist; make it first"):
        interop.to_onnx(program, tmp_path / "missing" / "model.onnx")
    broken = spec.Program(**{**vars(program), "logit_scale": float("nan")})
    with pytest.raises(spec.ProgramError, match="logit_scale is nan"):
        interop.to_onnx(broken, path)
    assert not list(tmp_path.iterdir())


def test_an_operation_without_translation_is_named() -> None:
    kinds = {kind: translate for kind, translate in TRANSLATED.items() if kind != "lif"}
    with pytest.raises(spec.ProgramError, match=r"lif '.*': has no exact form in ONNX; kinds are linear, "):
        exact_graph(onnx, spiking_program(), kinds)


def test_an_interrupted_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = interop.to_onnx(small_program(), tmp_path / "model.onnx")
    before = path.read_bytes()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        interop.to_onnx(swin_program(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(OSError, match=r"model\.onnx"):
        interop.to_onnx(small_program(), tmp_path / "model.onnx")


def test_a_model_beyond_a_message_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BYTES_MAX", 1000)
    with pytest.raises(ValueError, match=r"the model has [\d,]+ bytes; an ONNX file holds less than 2 GB"):
        interop.to_onnx(small_program(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install swincompress_pl\[onnx\]"):
        interop.to_onnx(small_program(), tmp_path / "model.onnx")


def test_a_folder_without_rights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root may write anywhere, the refusal is the test's."""

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("swincompress_pl.files._open_beside", refused)
    with pytest.raises(PermissionError, match=r"model\.onnx"):
        interop.to_onnx(small_program(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
