"""Bytes three ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from swincompress_pl.report import (
    Size,
    layer_sparsity,
    matrix_size,
    network_size,
    program_macs,
    program_parameters,
    program_size,
)
from swincompress_pl.spec import INPUT_VALUE, InputDescription, Operation, Program, multiplier

SPARSE = st.tuples(st.integers(1, 40), st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**16))


def sparse(rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((rows, columns)) < density).astype(np.int8)


@given(SPARSE)
def test_the_index_is_the_smallest_that_is_named(drawn: tuple[int, int, float, int]) -> None:
    values = sparse(*drawn)
    count, (rows, columns) = int(values.sum()), values.shape
    payload, indexed, index = matrix_size(values, 8)
    by_hand = {
        "dense": values.size,
        "1-bit mask": count + -(-values.size // 8),
        "CSR": count * (2 if columns <= 256 else 3) + 4 * (rows + 1),
    }
    assert payload == count
    assert indexed == min(by_hand.values()) == by_hand[index]


@pytest.mark.parametrize(("density", "index"), [(1.0, "dense"), (0.5, "1-bit mask"), (0.01, "CSR")])
def test_each_index_has_its_density(density: float, index: str) -> None:
    assert matrix_size(sparse(64, 256, density, 0), 8)[2] == index


def test_the_papers_size_counts_non_zeros_only() -> None:
    """Swin-T with 43.8 % of its block linears gone: 15.5 MiB of int8 non-zeros are 18.8 MiB with a mask."""
    weights, kept = 27_430_000, 27_430_000 - round(0.43802 * 27_430_000)
    values = np.zeros((10, weights // 10), dtype=np.int8)
    values.reshape(-1)[:kept] = 1
    payload, indexed, index = matrix_size(values, 8)
    rest = 28_288_354 - weights
    assert index == "1-bit mask"
    assert (payload + rest) / 2**20 == pytest.approx(15.5, abs=0.1)
    assert (indexed + rest) / 2**20 == pytest.approx(18.8, abs=0.1)


def test_a_float_networks_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    with torch.no_grad():
        network[0].weight[:, ::2] = 0
    size = network_size(network)
    file = tmp_path / "network.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    assert size.file_bytes == file.stat().st_size
    assert network_size(network, file=file) == size
    whole = 4 * (16 + 16 + 16 + 4)
    assert size.nonzero_bytes == whole + 4 * (64 + 64)
    assert size.indexed_bytes == whole + 4 * (64 + 64) + 128 // 8
    assert size.index == "5 dense, 1 by 1-bit mask"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        network_size(nn.Linear(2, 2), file=tmp_path / "gone.safetensors")


def program(largest: int = 100) -> Program:
    mult, shift = multiplier(np.full(5, 0.01))
    weight = np.full((5, 12), largest, dtype=np.int8)
    weight[:, :6] = 0
    tensors = {
        "w": weight,
        "b": np.zeros(5, dtype=np.int32),
        "m": mult,
        "s": shift,
        "i": np.arange(4, dtype=np.int32)[None, :],
    }
    return Program(
        input=InputDescription(height=2, width=2),
        operations=(
            Operation(
                kind="gather",
                name="flatten",
                inputs=(INPUT_VALUE,),
                output="x",
                dtype="uint8",
                attributes={"rows": 1, "joined": 4},
                tensors={"index": "i"},
            ),
            Operation(
                kind="linear",
                name="head",
                inputs=("x",),
                output="y",
                dtype="int32",
                attributes={"channels": 5},
                tensors={"weight": "w", "bias": "b", "mult": "m", "shift": "s"},
            ),
        ),
        tensors=tensors,
        logit_scale=1.0,
    )


def test_a_programs_size_counts_zeros_of_weights_only(tmp_path: Path) -> None:
    file = tmp_path / "artifact"
    file.write_bytes(b"x" * 321)
    size = program_size(program(), file=file)
    whole = 4 * 5 + 4 * 5 + 5 + 4 * 4
    assert size == Size(
        nonzero_bytes=30 + whole, indexed_bytes=30 + 8 + whole, index="4 dense, 1 by 1-bit mask", file_bytes=321
    )
    assert program_size(program()).file_bytes is None
    assert program_size(program(largest=7)).nonzero_bytes == 15 + whole  # four bits per weight


def test_parameters_and_macs_of_a_program() -> None:
    assert program_parameters(program()) == 60 + 5
    assert program_macs(program()) == 60


def test_negative_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="file_bytes=-1"):
        Size(nonzero_bytes=1, indexed_bytes=1, index="1 dense", file_bytes=-1)


def test_layer_sparsity_counts_slices_and_masks() -> None:
    before = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    after = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    nn.init.ones_(after[0].weight)
    nn.init.ones_(after[2].weight)
    with torch.no_grad():
        after[2].weight[0] = 0
    first, second = layer_sparsity(before, after)
    assert (first.name, first.weights_before, first.nonzeros_after, first.sparsity) == ("0", 128, 64, 0.5)
    assert (second.name, second.nonzeros_after) == ("2", 24)


def test_layer_sparsity_refuses_another_network() -> None:
    with pytest.raises(ValueError, match="no weight of Sequential is in Linear"):
        layer_sparsity(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
