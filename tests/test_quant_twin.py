"""The torch twin equals the norm to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from program_cases import operation_cases, small_program

from swincompress_pl.norm import run
from swincompress_pl.norm.kinds import KINDS, check_operation
from swincompress_pl.quant.twin import TorchTwin, run_operation


@pytest.mark.parametrize("seed", range(4))
def test_every_operation_equals_the_norm(seed: int) -> None:
    for op, inputs, tensors, value in operation_cases(500, seed=100 + seed):
        check_operation(op, [value] * len(inputs), tensors)
        expected = KINDS[op.kind].run(inputs, tensors, op.attributes, op.dtype)
        moved = {role: torch.from_numpy(tensor) for role, tensor in tensors.items()}
        result = run_operation(op, [torch.from_numpy(x) for x in inputs], moved).numpy()
        assert result.dtype == expected.dtype
        assert np.array_equal(result.reshape(expected.shape), expected), op


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
