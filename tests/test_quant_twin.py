"""The torch twin equals the specification to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.program_cases import MAKERS, operation_cases, small_program

from swincompress_pl.quant import twin
from swincompress_pl.quant.twin import TorchTwin, run_operation
from swincompress_pl.spec import LIMITS, STORAGE, Operation, run
from swincompress_pl.spec.integer import SIGNED_BYTES, UNSIGNED_BYTES
from swincompress_pl.spec.kinds import KINDS, check_operation


@pytest.fixture(params=["_int_mm", "floats"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to an integer product, whichever of them this CPU would take."""
    if request.param == "_int_mm" and not twin._int_mm_is_exact():
        pytest.skip("torch._int_mm saturates on this CPU")
    monkeypatch.setattr(twin, "_int_mm_pays", lambda: request.param == "_int_mm")


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("seed", range(4))
def test_every_operation_equals_the_norm(seed: int) -> None:
    for op, inputs, tensors, value in operation_cases(500, seed=100 + seed):
        check_operation(op, [value] * len(inputs), tensors)
        expected = KINDS[op.kind].run(inputs, tensors, op.attributes, op.dtype)
        moved = {role: torch.from_numpy(tensor) for role, tensor in tensors.items()}
        for types in ([value.dtype] * len(inputs), None):
            result = run_operation(op, [torch.from_numpy(x) for x in inputs], moved, types).numpy()
            assert result.dtype == expected.dtype
            assert np.array_equal(result.reshape(expected.shape), expected), op


@given(st.integers(0, 2**32 - 1), st.sampled_from([maker.__name__ for maker in MAKERS]), st.booleans())
@settings(max_examples=300)
def test_any_operation_of_any_width_equals_the_norm(seed: int, maker: str, corners: bool) -> None:
    make = next(candidate for candidate in MAKERS if candidate.__name__ == maker)
    op, inputs, tensors, value = make(np.random.default_rng(seed), corners)
    expected = KINDS[op.kind].run(inputs, tensors, op.attributes, op.dtype)
    moved = {role: torch.from_numpy(tensor) for role, tensor in tensors.items()}
    result = run_operation(op, [torch.from_numpy(x) for x in inputs], moved, [value.dtype] * len(inputs)).numpy()
    assert result.dtype == expected.dtype
    assert np.array_equal(result.reshape(expected.shape), expected), op
    low, high = LIMITS[op.dtype]
    assert low <= result.min() <= result.max() <= high


@pytest.mark.parametrize(("byte", "weight"), [("int8", "int4"), ("int6", "int6"), ("int4", "int4"), ("int3", "int3")])
def test_narrow_programs_equal_the_reference(byte: str, weight: str) -> None:
    for seed in range(3):
        program = small_program(seed, byte=byte, weight=weight)
        images = np.random.default_rng(seed).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
        expected = run(program, images)
        assert len(np.unique(expected)) > 15, "the program's values have died; the test would see nothing"
        logits = TorchTwin(program, torch.device("cpu"))(torch.from_numpy(images))
        assert np.array_equal(logits.numpy(), expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SIGNED_BYTES), st.sampled_from(SIGNED_BYTES), st.integers(1, 5))
@settings(max_examples=25)
def test_any_program_of_any_width_equals_the_reference(seed: int, byte: str, weight: str, batch: int) -> None:
    program = small_program(seed, byte=byte, weight=weight)
    images = np.random.default_rng(seed).integers(0, 256, (batch, 8, 8, 3)).astype(np.uint8)
    logits = TorchTwin(program, torch.device("cpu"))(torch.from_numpy(images))
    assert np.array_equal(logits.numpy(), run(program, images))


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("source", [*SIGNED_BYTES, *UNSIGNED_BYTES])
@pytest.mark.parametrize("depth", [8, 3072])
def test_extreme_products_of_every_width_equal_the_norm(source: str, depth: int) -> None:
    low, high = LIMITS[source]
    x = np.array([[[low] * depth, [high] * depth, [low, high] * (depth // 2)] * 7]).astype(STORAGE[source])
    weight = np.array([[-127] * depth, [127] * depth, [127, -127] * (depth // 2)], np.int8)
    ones = {"mult": np.full(3, 2**21, np.int32), "shift": np.full(3, 21, np.uint8)}
    tensors = {"weight": weight, "bias": np.zeros(3, np.int32), **ones}
    op = Operation(kind="linear", name="l", inputs=("x",), output="y", dtype="int32", attributes={"channels": 3})
    expected = KINDS["linear"].run([x], tensors, op.attributes, op.dtype)
    assert np.array_equal(expected[0, :3, 1], 127 * x[0, :3].astype(np.int64).sum(1))
    moved = {role: torch.from_numpy(tensor) for role, tensor in tensors.items()}
    assert np.array_equal(run_operation(op, [torch.from_numpy(x)], moved, [source]).numpy(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_whole_program_equals_the_reference(seed: int) -> None:
    program = small_program(seed)
    images = np.random.default_rng(seed).integers(0, 256, (7, 8, 8, 3)).astype(np.uint8)
    logits = TorchTwin(program, torch.device("cpu"))(torch.from_numpy(images))
    assert logits.dtype == torch.int32
    assert np.array_equal(logits.numpy(), run(program, images))


def test_autocast_changes_nothing() -> None:
    program = small_program(9)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    twin = TorchTwin(program, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(twin(images), torch.from_numpy(run(program, images.numpy())))


@pytest.mark.parametrize("images", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_wrong_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        TorchTwin(small_program(), torch.device("cpu"))(images)
