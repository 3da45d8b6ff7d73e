"""The artifact: a Program as one safetensors file, with a versioned and checksummed description, and no pickle.

The header's metadata has one key, METADATA_KEY, which holds a JSON object: `format`, `version`, `description`
(`Program.describe()`) and `sha256` over the description and all tensors as they are in memory. Version 2 adds
`storage`, which says how the tensors lie in the file: weights below 8 bits are packed, and maps of biases are folded.
Version 3 also has sparse weights: a bitmap of the nonzeros, and their values. A file that needs none of these is of
version 1.

A compressed artifact is of version 2. It consists of streams (`storage.py`), and one more stream, `content`, holds
description and storage.

C++ reads the files (csrc/artifact/); compressed ones are decoded here first. A file is written beside its destination
and then renamed, so that an interrupted export leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from swincompress_pl import spec
from swincompress_pl.accel import storage
from swincompress_pl.accel.core import CodedError, Content, parse_content, read_artifact
from swincompress_pl.files import write_file
from swincompress_pl.printable import printable

FORMAT = "swincompress_pl.program"
METADATA_KEY = "swincompress_pl"
_CONTENT = "content"
_CODES = {"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"}
# The limits of the C++ reader (csrc/artifact/), and two for compressed files: a description may always
# decode to the free bytes, and beyond them to so many times the size of its stream.
_JSON_BYTES_MAX, _JSON_BYTES_FREE, _JSON_RATIO_MAX = 2**24, 2**20, 64
_MESSAGE_MAX = 2000
_CHECKPOINT_HINT = (
    ". It looks like a PyTorch checkpoint: load it into its module (load_from_checkpoint) and export the module"
)

Tensors = Mapping[str, npt.NDArray[Any]]
Result = TypeVar("Result")


class ArtifactError(ValueError):
    """A file is not an artifact that this package can run, or a Program cannot be written as one."""


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def checksum(description: Mapping[str, Any], tensors: Tensors) -> str:
    """The SHA-256 over the description and every tensor's name, type, shape and bytes, in hexadecimal digits."""
    digest = hashlib.sha256(_json(description).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(_json([key, tensor.dtype.name, list(tensor.shape)]).encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def require_compression(compression: str | None) -> None:
    """Raises a ValueError unless `compression` is None or known."""
    if compression is not None and compression not in storage.COMPRESSIONS:
        known = ", ".join(map(repr, storage.COMPRESSIONS))
        raise ValueError(f"compression is {compression!r}; choose None or {known}")


def to_bytes(program: spec.Program, compression: str | None = None) -> bytes:
    """The artifact's bytes, which are always the same for the same Program and compression.

    A ValueError is raised for an unknown compression, a spec.ProgramError for a Program that breaks a rule, and an
    ArtifactError for one that cannot be written.
    """
    require_compression(compression)
    spec.check(program)
    used = {key for op in program.operations for key in op.tensors.values()}
    unused = sorted(set(program.tensors) - used)
    if unused:
        raise ArtifactError(f"tensor {unused[0]!r} is not used by any operation; remove it from the Program")
    tensors = {key: np.ascontiguousarray(program.tensors[key]) for key in sorted(used)}
    description = program.describe()
    try:
        sha256 = checksum(description, tensors)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the Program's description cannot be written as JSON: {error}") from error
    if compression is None:
        stored, content = _packed(description, tensors)
    else:
        roles = {key: role for op in reversed(program.operations) for role, key in op.tensors.items()}
        stored, content = _compressed(description, tensors, roles)
    written = bytes(save(stored, {METADATA_KEY: _json({"format": FORMAT, "sha256": sha256, **content})}))
    try:
        from_bytes(written, read_artifact)
    except ValueError as error:
        raise ArtifactError(f"the Program makes an artifact that could not be read back: {error}") from error
    return written


def _packed(description: dict[str, Any], tensors: Tensors) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    stored, layout = storage.pack_tensors(tensors)
    stored, folded = storage.fold_maps(stored)
    if folded:
        layout["folded"] = folded
    if not layout:
        return stored, {"version": 1, "description": description}
    return stored, {"version": 3 if "sparse" in layout else 2, "description": description, "storage": layout}


def _compressed(
    description: dict[str, Any], tensors: Tensors, roles: Mapping[str, str]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    try:
        stored, streams = storage.compress_tensors(tensors, roles)
    except storage.StorageError as error:
        raise ArtifactError(f"the Program cannot be compressed ({error}); export it without compression") from error
    text = _json({"description": description, "storage": {"streams": streams}}).encode()
    coder, stored[_CONTENT] = storage.encode(text)
    return stored, {"version": 2, _CONTENT: {"coder": coder, "size_bytes": len(text)}}


def write(program: spec.Program, path: str | os.PathLike[str], compression: str | None = None) -> Path:
    """Writes the artifact and returns its path; a failure at any point leaves a previous file untouched.

    A FileNotFoundError is raised if the folder does not exist; the other errors are those of `to_bytes`.
    """
    destination = Path(path)
    content = to_bytes(program, compression)
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination}: the folder {destination.parent} does not exist; make it first")
    return write_file(destination, lambda file: file.write(content))


def _decoded(content: bytes) -> bytes:
    """The bytes of a compressed artifact as one of version 1; the container has been checked."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"][METADATA_KEY])
    try:
        description, tensors = _restored(metadata[_CONTENT], load(content))
        known = _json({"format": FORMAT, "version": 1, "sha256": metadata.get("sha256")})
        return _container(tensors, f'{known[:-1]},"description":{description}}}')
    except (ValueError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"truncated or damaged ({error}); copy or export it again") from error


def _container(tensors: Tensors, text: str) -> bytes:
    """The bytes of a safetensors file; each part is copied once."""
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    parts, end = [], 0
    for key in sorted(tensors, key=lambda key: -tensors[key].itemsize):  # so that all are aligned
        tensor = tensors[key]
        parts.append(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        offsets = [end, end := end + tensor.nbytes]
        entries[key] = {"dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
    header = _json(entries).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def _restored(declared: Any, stored: dict[str, npt.NDArray[Any]]) -> tuple[str, dict[str, npt.NDArray[Any]]]:
    """(description as JSON, tensors) of a compressed artifact; a StorageError if its parts do not fit together."""
    if not isinstance(declared, dict) or _CONTENT not in stored:
        raise storage.StorageError("it has no description")
    description, layout_text = _parsed(declared, stored.pop(_CONTENT))
    layout = None if layout_text is None else json.loads(layout_text)
    if not isinstance(layout, dict) or list(layout) != ["streams"]:
        raise storage.StorageError("it does not say how its tensors are stored")
    return description or "null", storage.decompress_tensors(stored, layout["streams"])


def _parsed(declared: Mapping[str, Any], coded: npt.NDArray[Any]) -> tuple[str | None, str | None]:
    """The parts of a compressed artifact's content; its size is checked before anything is made of it."""
    size_bytes = declared.get("size_bytes")
    limit = min(_JSON_BYTES_MAX, _JSON_BYTES_FREE + _JSON_RATIO_MAX * coded.size)
    if type(size_bytes) is not int or size_bytes > limit:
        raise storage.StorageError(f"its description takes {size_bytes!r} bytes; at most {limit} are read")
    text = storage.decode(declared.get("coder"), coded, size_bytes)
    try:
        return parse_content(text)
    except ValueError as error:
        raise storage.StorageError(f"its description is not JSON: {error}") from error


class StoredArtifact:
    """An artifact in its file, which is read when its bytes are asked for, so that memory need not hold them.

    The file stays open: one that is deleted or replaced afterwards still gives what it gave. Copies share it, and
    pickles hold the bytes. A FileNotFoundError is raised if there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        source = Path(path)
        if not source.is_file():
            what = "a folder" if source.is_dir() else "no such file"
            raise FileNotFoundError(f"{source}: {what}; write one with swincompress_pl.accel.export(model, path)")
        self._path = source
        self._descriptor = os.open(source, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._close.atexit = False  # a daemon thread may still read when the interpreter ends
        self._first = self._state()

    def through(self, reader: Callable[[Content], Result]) -> Result:
        """What `reader` returns for the bytes, which are decoded first if they are compressed; it may overwrite them.

        A ValueError of `reader` becomes an ArtifactError that names the file. An ArtifactError is raised, too, for a
        file that was written to since it was opened.
        """
        try:
            return from_bytes(self._read(), reader)
        except ValueError as error:
            hint = _CHECKPOINT_HINT if _is_checkpoint(self._path) else ""
            raise ArtifactError(f"{printable(str(self._path))}: {_told(error)}{hint}") from error

    def __deepcopy__(self, memo: object) -> StoredArtifact:
        return self

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (self.through(bytes),)

    def close(self) -> None:
        """Closes the file."""
        self._close()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _read(self) -> npt.NDArray[np.uint8]:
        if self._state() != self._first:
            raise ValueError("written to after it was loaded; load it again")
        content = np.empty(self._first[0], np.uint8)
        rest = memoryview(content.data)
        while rest:  # not from the position of the descriptor, which forked processes share
            read = os.preadv(self._descriptor, [rest], len(content) - len(rest))
            if read == 0:
                raise ValueError("cut short while it was read; copy or export it again")
            rest = rest[read:]
        return content


def through(path: str | os.PathLike[str], reader: Callable[[Content], Result]) -> Result:
    """What `reader` returns for the bytes of an artifact, which are decoded first if it is compressed.

    A FileNotFoundError is raised if there is no such file; a ValueError of `reader` becomes an ArtifactError that names
    the file.
    """
    with contextlib.closing(StoredArtifact(path)) as stored:
        return stored.through(reader)


def _told(error: Exception) -> str:
    """The message of an error, made safe for a terminal, since it may quote the file."""
    text = str(error)
    return printable(text if len(text) <= _MESSAGE_MAX else f"{text[:_MESSAGE_MAX]} ...")


def _is_checkpoint(source: Path) -> bool:
    """Whether the file begins like one of torch.save."""
    with open(source, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def from_bytes(content: Content, reader: Callable[[Content], Result]) -> Result:
    """What `reader` returns for an artifact's bytes, which are decoded first if they are compressed."""
    try:
        return reader(content)
    except CodedError:
        pass
    return reader(_decoded(bytes(content)))


def unproved_program(content: Content) -> spec.Program:
    """The Program of an artifact's bytes, from the C++ reader, which checks format, version and checksum.

    The rules of the specification are not checked. A CodedError is raised for a compressed artifact, and a ValueError
    for bytes that are not an artifact.
    """
    description, tensors = read_artifact(content)
    try:
        return spec.Program.from_description(json.loads(description), tensors)
    except ValueError as error:  # such as a logit_scale that is not a number
        raise spec.ProgramError(str(error)) from error


def read(path: str | os.PathLike[str]) -> spec.Program:
    """The Program of an artifact; format, version, checksum and then every rule of the specification are checked.

    A FileNotFoundError is raised if there is no such file, and an ArtifactError that names the file and its fault
    otherwise.
    """

    def proved(content: Content) -> spec.Program:
        program = unproved_program(content)
        spec.check(program)
        return program

    return through(path, proved)
