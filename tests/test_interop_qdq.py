"""The conventional form: near the engine's answers, in the structure that runtimes fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.counting_programs import counting_program, e_spikeformer_program
from support.spiking_programs import spiking_program
from support.whole_programs import images_of, vit_program

from swincompress_pl import interop, spec
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SMALL: dict[str, dict[str, Any]] = {
    "SwinTransformer": {"patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "VisionTransformer": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
}


@lru_cache
def quantized(name: str) -> spec.Program:
    """A fresh network of timm with 10 classes at 32 pixels."""
    torch.manual_seed(0)
    network = create_model(name, img_size=32, num_classes=10, **SMALL[name]).eval()
    images = torch.rand(16, 3, 32, 32) * 4 - 2
    return quantize(network, [images], method="max", preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3}).to_program()


PROGRAMS: dict[str, Callable[[], spec.Program]] = {name: partial(quantized, name) for name in SMALL}


def narrow(program: spec.Program) -> spec.Program:
    """The same with weights of 4 bits."""
    weights = {op.tensors["weight"] for op in program.operations if "weight" in op.tensors}
    tensors = {key: np.clip(t, -7, 7) if key in weights else t for key, t in program.tensors.items()}
    return spec.Program(**{**{name: getattr(program, name) for name in vars(program)}, "tensors": tensors})


def answers(path: Path, images: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


def correlations(program: spec.Program, path: Path, count: int = 6) -> Any:
    images = images_of(program, count)
    expected, found = spec.run(program, images) * program.logit_scale, answers(path, images)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(expected, found, strict=True)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_near_the_specification(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]()
    path = interop.to_onnx(program, tmp_path / "model.onnx", form="qdq")
    assert min(correlations(program, path)) > 0.95
    safe = interop.to_onnx(program, tmp_path / "safe.onnx", form="qdq", reduce_range=True)
    assert min(correlations(program, safe)) > 0.9
    assert safe.read_bytes() != path.read_bytes()


@pytest.mark.parametrize("name", PROGRAMS)
def test_four_bits_are_stored_as_such(name: str, tmp_path: Path) -> None:
    program = narrow(PROGRAMS[name]())
    path = interop.to_onnx(program, tmp_path / "model.onnx", form="qdq")
    model = onnx.load(path)
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)
    stored = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4]
    layers = [op for op in program.operations if "weight" in op.tensors]
    assert len(stored) == len({op.tensors["weight"] for op in layers})
    assert all(len(tensor.raw_data) <= (np.prod(tensor.dims) + 1) // 2 for tensor in stored if tensor.raw_data)
    assert min(correlations(program, path)) > 0.9


def test_the_structure_is_what_runtimes_fuse(tmp_path: Path) -> None:
    """Symmetric bytes: no zero point but 0, a scale per output channel of weights, all products between bytes."""
    model = onnx.load(interop.to_onnx(vit_program(), tmp_path / "model.onnx", form="qdq"))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    kinds = Counter(node.op_type for node in model.graph.node)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            assert not constants[node.input[2]].any()
        if node.op_type in ("MatMul", "Conv"):
            assert [maker[name].op_type for name in node.input[:2]] == ["DequantizeLinear", "DequantizeLinear"]
            weight = maker[node.input[1]]
            if weight.input[0] in constants:
                axis = next(attribute.i for attribute in weight.attribute if attribute.name == "axis")
                assert constants[weight.input[1]].shape == (constants[weight.input[0]].shape[axis],)
                assert axis == (1 if node.op_type == "MatMul" else 0)
    assert kinds["MatMul"] > 4
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("make", [counting_program, e_spikeformer_program])
def test_counts_are_bytes_with_a_ceiling(make: Callable[[], spec.Program], tmp_path: Path) -> None:
    program = make()
    model = onnx.load(interop.to_onnx(program, tmp_path / "model.onnx", form="qdq"))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantized = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert all(node.output[0] in quantized for node in clips)
    ceilings = Counter(tuple(float(constants[end]) for end in node.input[1:]) for node in clips)
    assert ceilings[0, 4] == sum("largest" in op.attributes for op in program.operations) > 10
    assert set(ceilings) <= {(0, 4), (0, 8)}, "and sums of two counts"


@pytest.mark.parametrize("most", [1, 4, 9])
def test_answers_of_counts_are_near_but_where_one_is_near_a_half(most: int, tmp_path: Path) -> None:
    program = counting_program(most, most)
    path = interop.to_onnx(program, tmp_path / "model.onnx", form="qdq")
    assert float(np.median(correlations(program, path, 12))) > 0.999


@pytest.mark.parametrize("make", [spiking_program, lambda: spec.binary_steps(counting_program())])
def test_what_has_no_conventional_form_is_named(make: Callable[[], spec.Program], tmp_path: Path) -> None:
    with pytest.raises(spec.ProgramError, match=r"'.*': .* no conventional form.*[Tt]he exact form has"):
        interop.to_onnx(make(), tmp_path / "model.onnx", form="qdq")
    assert not list(tmp_path.iterdir())


def test_wrong_options(tmp_path: Path) -> None:
    program, path = vit_program(), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="form is 'int8'; choose 'exact' or 'qdq'"):
        interop.to_onnx(program, path, form="int8")
    with pytest.raises(ValueError, match="gather_elements is of form='exact', and form is 'qdq'"):
        interop.to_onnx(program, path, form="qdq", gather_elements=True)
    with pytest.raises(ValueError, match="reduce_range is of form='qdq', and form is 'exact'"):
        interop.to_onnx(program, path, reduce_range=True)
    with pytest.raises(ValueError, match="opset is 21; this network is written with opset 17"):
        interop.to_onnx(program, path, form="qdq", opset=21)
    assert not list(tmp_path.iterdir())


def test_weights_of_seven_bits_are_not_shifted(tmp_path: Path) -> None:
    """Every odd weight is a tie."""
    program = quantized("VisionTransformer")
    found = {}
    for name, reduced in (("whole", False), ("reduced", True)):
        path = interop.to_onnx(program, tmp_path / f"{name}.onnx", form="qdq", reduce_range=reduced)
        found[name] = [
            onnx.numpy_helper.to_array(tensor).astype(int)
            for tensor in onnx.load(path).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
        ]
    for whole, reduced in zip(found["whole"], found["reduced"], strict=True):
        assert np.abs(reduced).max() <= 64
        difference = 2 * reduced - whole
        assert np.abs(difference).max() <= 1
        odd = np.abs(difference) == 1
        assert 0.4 < odd.mean() < 0.6
        assert abs(difference[odd].mean()) < 0.1
