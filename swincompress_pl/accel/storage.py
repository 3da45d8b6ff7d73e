"""How tensors lie in an artifact: packed, sparse and folded, or in coded streams; all forms are lossless.

Packed int8 weights take only the bits that their values need. Sparse ones are a bitmap of the nonzeros, and these,
packed. Folded maps of biases leave out rows and columns that repeat. Packing keeps the low bits of each value (two's
complement), with the first value in the highest bits and zeros after the last.

A stream holds all tensors of one role, type and width. Their values are packed to 2, 4 or 8 bits, so that the coder
sees whole values; wider integers become byte planes, the lowest first.

What a file declares is checked before memory is allocated for it. C++ reads packed, sparse and folded tensors
(csrc/artifact/storage.cpp); streams are read here.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl.spec.program import NAME_BYTES_MAX

Tensor = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

COMPRESSIONS = ("lzma",)
_TYPES = ("int8", "uint8", "int16", "int32", "int64")
_AXES_MAX = 8
_SPARSE_GAIN_BYTES = 64  # a sparse tensor has to save what its entry in the header takes
# Tensors may always decode to the free bytes, and beyond them to so many times their streams: far more than weights do.
_DECODED_BYTES_FREE = 2**24
_DECODED_RATIO_MAX = 128

# Weights are noise with a skewed histogram, so settings without a context of neighboring bytes and without alignment
# (lc, lp and pb) are best (spec.md, section 11). The dictionary's size is fixed here, so that it bounds the decoder.
_LZMA_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**20}
]


class StorageError(ValueError):
    """The stored bytes contradict what the file declares about them."""


def weight_bits(tensor: Tensor) -> int:
    """Returns the bits that the values of a tensor need.

    Args:
        tensor: A tensor of a Program.

    Returns:
        The width of the narrowest signed type that holds all values of an int8 tensor with two or more axes, 2 to 8; 8
        for any other tensor.
    """
    if not _is_weight(tensor):
        return 8
    largest = int(np.abs(tensor.astype(np.int16)).max())
    return min(max(largest.bit_length() + 1, 2), 8)


def _is_weight(tensor: Tensor) -> bool:
    return tensor.dtype == np.int8 and tensor.ndim >= 2 and tensor.size > 0


def pack(tensor: Tensor, bits: int) -> Bytes:
    """The low `bits` of every int8 value, one after another: uint8, (ceil(size * bits / 8),)."""
    codes = np.ascontiguousarray(tensor).reshape(-1, 1).view(np.uint8)
    return np.packbits(np.unpackbits(codes, axis=1)[:, 8 - bits :])


def unpack(packed: Bytes, bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The inverse of `pack`; a StorageError is raised if the length or the padding does not fit."""
    count = math.prod(shape)
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size != (count * bits + 7) // 8:
        raise StorageError(f"{packed.size} bytes do not hold {count} values of {bits} bits")
    digits = np.unpackbits(packed)
    if digits[count * bits :].any():
        raise StorageError("padding bits are set")
    codes = np.packbits(digits[: count * bits].reshape(count, bits), axis=1)[:, 0]  # in the high bits of each byte
    values: npt.NDArray[np.int8] = (codes.view(np.int8) >> (8 - bits)).reshape(shape)
    return values


def pack_sparse(tensor: Tensor, bits: int) -> Bytes:
    """A bit per int8 value, set where it is not 0, and behind these bytes `pack` of the values that are not 0."""
    values = np.ascontiguousarray(tensor).reshape(-1)
    nonzero = values != 0
    return np.concatenate([np.packbits(nonzero), pack(values[nonzero], bits)])


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(the tensors to store, {"packed": {key: [bits, shape]}, "sparse": likewise}), where a form has any."""
    stored: dict[str, Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        bits = weight_bits(tensor)
        if _is_weight(tensor) and _sparse_bytes(tensor, bits) + _SPARSE_GAIN_BYTES <= (tensor.size * bits + 7) // 8:
            form, stored[key] = "sparse", pack_sparse(tensor, bits)
        elif bits < 8:
            form, stored[key] = "packed", pack(tensor, bits)
        else:
            stored[key] = tensor
            continue
        layout.setdefault(form, {})[key] = [bits, list(tensor.shape)]
    return stored, layout


def _sparse_bytes(tensor: Tensor, bits: int) -> int:
    return (tensor.size + 7) // 8 + (int(np.count_nonzero(tensor)) * bits + 7) // 8


def fold_maps(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors to store, {key: [number of each row, number of each column]} for the folded int32 maps (H, W, C)).

    A convolution's map of biases has few different rows and columns: those near the border, and one for all others.
    """
    stored, folded = dict(tensors), {}
    for key, tensor in tensors.items():
        if tensor.dtype != np.int32 or tensor.ndim != 3:
            continue
        (first_rows, rows), (first_columns, columns) = _distinct(tensor), _distinct(tensor.swapaxes(0, 1))
        small = np.ascontiguousarray(tensor[first_rows][:, first_columns])
        if 2 * small.nbytes <= tensor.nbytes:
            stored[key], folded[key] = small, [rows, columns]
    return stored, folded


def _distinct(slices: Tensor) -> tuple[list[int], list[int]]:
    """(the index at which each different slice occurs first, the number of each slice among the different ones)."""
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    which: list[int] = []
    for at, part in enumerate(slices):
        number = numbers.setdefault(part.tobytes(), len(numbers))
        first += [at] if number == len(first) else []
        which.append(number)
    return first, which


def _shape(key: str, sizes: Any) -> tuple[int, ...]:
    if (
        not isinstance(sizes, list)
        or not 1 <= len(sizes) <= _AXES_MAX
        or not all(type(size) is int and size >= 1 for size in sizes)
    ):
        raise StorageError(f"tensor {key!r} has shape {sizes!r}")
    return tuple(sizes)


# Coders, from bytes to fewer bytes


def _encode_lzma(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_LZMA_FILTERS)


def _decode_lzma(coded: bytes, size_bytes: int) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
    try:
        data = decoder.decompress(coded, size_bytes + 1)  # one byte more than due reveals a stream that is too long
    except lzma.LZMAError as error:
        raise StorageError(f"LZMA stream: {error}") from error
    if not decoder.eof or decoder.unused_data:
        raise StorageError("LZMA stream does not end where it should")
    return data


def _encode_huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _decode_huffman(coded: bytes, size_bytes: int) -> bytes:
    decoder = zlib.decompressobj(-15)
    try:
        data = decoder.decompress(coded, size_bytes + 1)
    except zlib.error as error:
        raise StorageError(f"deflate stream: {error}") from error
    if not decoder.eof or decoder.unused_data or decoder.unconsumed_tail:
        raise StorageError("deflate stream does not end where it should")
    return data


_CODERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]] = {
    "none": (lambda data: data, lambda coded, _: coded),
    "huffman": (_encode_huffman, _decode_huffman),
    "lzma": (_encode_lzma, _decode_lzma),
}


def encode(data: bytes) -> tuple[str, Bytes]:
    """(name of the coder, coded bytes) for the coder that gives the fewest bytes.

    Order-0 Huffman codes are often shorter than LZMA on weights.
    """
    coded = {name: coder[0](data) for name, coder in _CODERS.items()}
    best = min(coded, key=lambda name: len(coded[name]))
    return best, np.frombuffer(coded[best], np.uint8)


def decode(coder: Any, coded: Tensor, size_bytes: Any) -> bytes:
    """The inverse of `encode`; a StorageError is raised if the stream does not hold exactly `size_bytes`.

    No more than that is decoded, so a false declaration costs no memory.
    """
    if not isinstance(coder, str) or coder not in _CODERS:
        raise StorageError(f"coder {coder!r} is unknown")
    if type(size_bytes) is not int or size_bytes < 0 or coded.dtype != np.uint8 or coded.ndim != 1:
        raise StorageError("a stream's declaration is wrong")
    require_bounded(size_bytes, coded.size)
    data = _CODERS[coder][1](coded.tobytes(), size_bytes)
    if len(data) != size_bytes:
        raise StorageError(f"a stream does not hold the {size_bytes} bytes that it declares")
    return data


def require_bounded(decoded_bytes: int, coded_bytes: int) -> None:
    """Raises a StorageError if the coded bytes declare more decoded ones than any network has in so few."""
    limit = _DECODED_BYTES_FREE + _DECODED_RATIO_MAX * coded_bytes
    if decoded_bytes > limit:
        raise StorageError(f"{coded_bytes} coded bytes declare {decoded_bytes}; at most {limit} are accepted")


# Streams: tensors of one kind, coded together


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """Tensors (key, shape) of one type, one after another, with `bits` per value."""

    coder: str
    dtype: str
    bits: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def values(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Length before coding."""
        return (self.values * self.bits + 7) // 8

    @property
    def memory_bytes(self) -> int:
        """The size of the tensors in memory, where every value has a whole byte or more."""
        return self.values * np.dtype(self.dtype).itemsize

    def entry(self) -> dict[str, Any]:
        tensors = [[key, list(shape)] for key, shape in self.tensors]
        return {"coder": self.coder, "dtype": self.dtype, "bits": self.bits, "tensors": tensors}


def _listed(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise TypeError(f"{given!r} is not a list")
    return given


def _stream(entry: Any) -> _Stream:
    try:
        coder, dtype, bits, tensors = (entry[key] for key in ("coder", "dtype", "bits", "tensors"))
        members = tuple((key, _shape(key, sizes)) for key, sizes in _listed(tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"a stream's declaration is wrong: {error!r}") from error
    if dtype not in _TYPES or not all(isinstance(key, str) for key, _ in members):
        raise StorageError(f"a stream of type {dtype!r}; types are {', '.join(_TYPES)}")
    if any(len(key) > NAME_BYTES_MAX for key, _ in members):
        raise StorageError(f"a tensor name of more than {NAME_BYTES_MAX} bytes")
    if type(bits) is not int or (bits != 8 * np.dtype(dtype).itemsize and (dtype != "int8" or bits not in (2, 4))):
        raise StorageError(f"a stream of {dtype} in {bits!r} bits per value")
    return _Stream(coder=coder, dtype=dtype, bits=bits, tensors=members)


def _lay_out(values: Tensor, bits: int) -> bytes:
    if bits < 8:
        return pack(values, bits).tobytes()
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _values(data: bytes, stream: _Stream) -> Tensor:
    """The inverse of `_lay_out`."""
    if stream.bits < 8:
        return unpack(np.frombuffer(data, np.uint8), stream.bits, (stream.values,))
    native = np.dtype(stream.dtype)
    planes = np.frombuffer(data, np.uint8).reshape(native.itemsize, -1)
    values: Tensor = np.ascontiguousarray(planes.T).reshape(-1).view(native.newbyteorder("<"))
    return values.astype(native)


def compress_tensors(
    tensors: Mapping[str, Tensor], roles: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(the streams to store, by name, and what each holds); `roles` has "weight", "bias", ... for each key."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for key in sorted(tensors):
        bits = weight_bits(tensors[key])
        whole = 2 if bits == 2 else 4 if bits <= 4 else 8 * tensors[key].itemsize
        groups.setdefault((roles[key], tensors[key].dtype.name, whole), []).append(key)
    stored: dict[str, Tensor] = {}
    entries = []
    for number, ((_, dtype, bits), keys) in enumerate(sorted(groups.items())):
        data = _lay_out(np.concatenate([tensors[key].reshape(-1) for key in keys]), bits)
        coder, stored[f"stream{number}"] = encode(data)
        members = tuple((key, tensors[key].shape) for key in keys)
        entries.append(_Stream(coder=coder, dtype=dtype, bits=bits, tensors=members).entry())
    require_bounded(sum(_stream(entry).memory_bytes for entry in entries), sum(s.nbytes for s in stored.values()))
    return stored, entries


def decompress_tensors(stored: Mapping[str, Tensor], entries: Any) -> dict[str, Tensor]:
    """The inverse of `compress_tensors`; a StorageError is raised, before memory is taken, for what does not fit."""
    if not isinstance(entries, list) or set(stored) != {f"stream{number}" for number in range(len(entries))}:
        raise StorageError("its streams are not those that it declares")
    streams = [_stream(entry) for entry in entries]
    _require_each_once([key for stream in streams for key, _ in stream.tensors])
    require_bounded(sum(stream.memory_bytes for stream in streams), sum(s.nbytes for s in stored.values()))
    tensors: dict[str, Tensor] = {}
    for number, stream in enumerate(streams):
        values = _values(decode(stream.coder, stored[f"stream{number}"], stream.size_bytes), stream)
        start = 0
        for key, shape in stream.tensors:
            stop = start + math.prod(shape)
            tensors[key], start = values[start:stop].reshape(shape), stop
    return tensors


def _require_each_once(keys: Sequence[str]) -> None:
    if len(set(keys)) != len(keys):
        raise StorageError("it declares a tensor twice")
