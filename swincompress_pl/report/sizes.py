"""Bytes three ways, and the parameters and MACs of a Program.

What pruning papers count (non-zeros times bits) is not what a disk holds, so every size here comes as three: the
non-zeros; the non-zeros with the index that finds them again; the bytes of the file. A claim is made with the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from swincompress_pl.accel.storage import weight_bits
from swincompress_pl.report.plain import Plain
from swincompress_pl.spec import Program, costs

if TYPE_CHECKING:
    from torch import nn

_POINTER_BYTES = 4
# Tensors of a Program that are learned, in contrast to scales, index arithmetic and tables that follow from them.
_LEARNED_ROLES = frozenset({"weight", "bias", "gain", "offset", "bias_table", "constant", "rows"})


@dataclass(frozen=True, kw_only=True)
class Size(Plain):
    """Bytes three ways. index says how the non-zeros are found again, e.g. "12 dense, 40 by 1-bit mask"; file_bytes
    may be unknown."""

    nonzero_bytes: int
    indexed_bytes: int
    index: str
    file_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("nonzero_bytes", "indexed_bytes", "file_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}={value!r}: it has to be a number of bytes, an integer of 0 or more")


class MatrixSize(NamedTuple):
    """Bytes of the non-zeros, bytes with the smallest index, and that index: "dense", "1-bit mask" or "CSR"."""

    nonzero_bytes: int
    indexed_bytes: int
    index_kind: str


def matrix_size(values: npt.NDArray[Any], bits: int) -> MatrixSize:
    """The size of one weight of `bits` a value.

    values: (N, ...), viewed as N rows. CSR takes a column number of 1, 2 or 4 bytes a non-zero, by the number of
    columns, and a pointer of 4 bytes a row. "dense" stores the zeros too: without many of them that is smallest.
    """
    count = int(np.count_nonzero(values))
    payload = _bytes(count * bits)
    rows = values.shape[0] if values.ndim else 1
    columns = values.size // rows if rows else 0
    column_bytes = 1 if columns <= 2**8 else 2 if columns <= 2**16 else 4
    choices = {
        "dense": _bytes(values.size * bits),
        "1-bit mask": payload + _bytes(values.size),
        "CSR": payload + count * column_bytes + (rows + 1) * _POINTER_BYTES,
    }
    index = min(choices, key=lambda name: choices[name])
    return MatrixSize(payload, choices[index], index)


def network_size(network: nn.Module, *, file: str | Path | None = None) -> Size:
    """The size of a torch network's state: its weights as matrices, everything else stored whole.

    file: where the network was saved; without it the bytes are those of a safetensors file of the state, which is then
    built in memory. Raises FileNotFoundError when `file` is not there.
    """
    import safetensors.torch
    import torch

    state = {
        name: tensor.detach().cpu() for name, tensor in network.state_dict().items() if isinstance(tensor, torch.Tensor)
    }
    learned = {name for name, _ in network.named_parameters()}
    stored = [
        _stored(tensor.float().numpy(), 8 * tensor.element_size(), name in learned and tensor.ndim > 1)
        for name, tensor in state.items()
    ]
    if file is None:
        file_bytes = len(safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in state.items()}))
    else:
        file_bytes = Path(file).stat().st_size
    return _total(stored, file_bytes)


def program_size(program: Program, *, file: str | Path | None = None) -> Size:
    """The size of a Program's tensors: its weights as matrices of 2 to 8 bits a value, everything else stored whole.
    file: its artifact, if written."""
    weights = {key for op in program.operations for role, key in op.tensors.items() if role == "weight"}
    stored = [
        _stored(tensor, weight_bits(tensor) if key in weights else 8 * tensor.itemsize, key in weights)
        for key, tensor in program.tensors.items()
    ]
    return _total(stored, None if file is None else Path(file).stat().st_size)


def program_parameters(program: Program) -> int:
    """The learned integers of a Program: weights, biases, gains, offsets, embeddings; not scales, tables and
    indices."""
    learned = {key for op in program.operations for role, key in op.tensors.items() if role in _LEARNED_ROLES}
    return sum(program.tensors[key].size for key in learned)


def program_macs(program: Program) -> int:
    """Multiply-accumulates for one image: linear layers, convolutions and both products of attention."""
    return sum(cost.macs for cost in costs(program))


def _stored(values: npt.NDArray[Any], bits: int, is_matrix: bool) -> MatrixSize:
    if is_matrix:
        return matrix_size(values, bits)
    whole = _bytes(values.size * bits)
    return MatrixSize(whole, whole, "dense")


def _total(stored: Iterable[MatrixSize], file_bytes: int | None) -> Size:
    tensors = list(stored)
    used = Counter(tensor.index_kind for tensor in tensors)
    named = {"dense": "dense", "1-bit mask": "by 1-bit mask", "CSR": "by CSR"}
    return Size(
        nonzero_bytes=sum(tensor.nonzero_bytes for tensor in tensors),
        indexed_bytes=sum(tensor.indexed_bytes for tensor in tensors),
        index=", ".join(f"{used[index]} {text}" for index, text in named.items() if used[index]) or "no tensors",
        file_bytes=file_bytes,
    )


def _bytes(bits: int) -> int:
    return (bits + 7) // 8
