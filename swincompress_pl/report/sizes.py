"""Bytes counted in three ways, and the parameters and MACs of a Program.

Pruning papers count non-zeros times bits, which is not what a disk holds. So every size here has three parts: the
non-zeros, the non-zeros with the index that locates them, and the bytes of the file. Use the last one for claims.
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
    """Bytes counted in three ways.

    Attributes:
        nonzero_bytes: Non-zeros times bits.
        indexed_bytes: The same with the smallest index that locates the non-zeros.
        index: How many tensors use which index, e.g. "12 dense, 40 by 1-bit mask".
        file_bytes: Bytes of the file; None if there is none.

    Raises:
        ValueError: If a number of bytes is not an integer of 0 or more.
    """

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
    """The size of one tensor.

    Attributes:
        nonzero_bytes: Bytes of the non-zeros.
        indexed_bytes: Bytes with the smallest index.
        index_kind: That index: "dense", "1-bit mask" or "CSR".
    """

    nonzero_bytes: int
    indexed_bytes: int
    index_kind: str


def matrix_size(values: npt.NDArray[Any], bits: int) -> MatrixSize:
    """Computes the size of one weight with the index that makes it smallest.

    "dense" stores the zeros too, which is smallest if there are few. CSR takes a column number of 1, 2 or 4 bytes per
    non-zero, by the number of columns, and a pointer of 4 bytes per row.

    Args:
        values: (N, ...), viewed as N rows.
        bits: Bits per value.

    Returns:
        The bytes of the non-zeros, the bytes with the index, and the index.
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
    """Computes the size of a torch network's state: its weights as matrices, everything else stored whole.

    Args:
        network: The network.
        file: Where it was saved. Without it, `file_bytes` is the size of a safetensors file, which is built in memory.

    Returns:
        The size.

    Raises:
        FileNotFoundError: If `file` is missing.
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
    """Computes the size of a Program's tensors: its weights as matrices, everything else stored whole.

    Args:
        program: The Program; its weights count with 2 to 8 bits per value, as an artifact packs them.
        file: Its artifact, for `file_bytes`.

    Returns:
        The size.

    Raises:
        FileNotFoundError: If `file` is missing.
    """
    weights = {key for op in program.operations for role, key in op.tensors.items() if role == "weight"}
    stored = [
        _stored(tensor, weight_bits(tensor) if key in weights else 8 * tensor.itemsize, key in weights)
        for key, tensor in program.tensors.items()
    ]
    return _total(stored, None if file is None else Path(file).stat().st_size)


def program_parameters(program: Program) -> int:
    """Counts the learned integers of a Program: weights, biases, gains, offsets, embeddings and position biases.

    Scales, look-up tables and indices are not counted.

    Args:
        program: The Program.

    Returns:
        The number of learned integers.
    """
    learned = {key for op in program.operations for role, key in op.tensors.items() if role in _LEARNED_ROLES}
    return sum(program.tensors[key].size for key in learned)


def program_macs(program: Program) -> int:
    """Counts the multiply-accumulates per image: linear layers, convolutions and both products of an attention.

    Args:
        program: The Program; it is checked first.

    Returns:
        The number of multiply-accumulates.

    Raises:
        ProgramError: If the Program breaks a rule of the specification.
    """
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
