"""The artifact: a Program as one safetensors file, with a versioned and checksummed description, and no pickle.

The header's metadata has one key, METADATA_KEY, that holds a JSON object: `format`, `version`, `description`
(`Program.describe()`) and `sha256` over the description and all tensors as they are in memory. Version 2 adds
`storage`, which says how they lie in the file: weights below 8 bits are packed, maps of biases are folded, and a
compressed artifact has streams (`storage.py`) and keeps description and storage in one more, `content`. A file that
needs none of these stays version 1.
Files are written beside their destination and renamed, so that an interrupted export leaves the old file as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from swincompress_pl import norm
from swincompress_pl.accel import storage

FORMAT = "swincompress_pl.program"
VERSIONS = (1, 2)
METADATA_KEY = "swincompress_pl"
_CONTENT = "content"
_HEADER_BYTES_MAX = 100_000_000

Tensors = Mapping[str, npt.NDArray[Any]]


class ArtifactError(ValueError):
    """A file is not an artifact that this package can run; the message names the file, the fault and the remedy."""


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def checksum(description: Mapping[str, Any], tensors: Tensors) -> str:
    """SHA-256 over the description and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(_json(description).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(_json([key, tensor.dtype.name, list(tensor.shape)]).encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def require_compression(compression: str | None) -> None:
    """Raises ValueError unless `compression` is None or a known one."""
    if compression is not None and compression not in storage.COMPRESSIONS:
        known = ", ".join(map(repr, storage.COMPRESSIONS))
        raise ValueError(f"compression is {compression!r}; choose None or {known}")


def to_bytes(program: norm.Program, compression: str | None = None) -> bytes:
    """The artifact's bytes: the same Program and compression always give the same bytes."""
    require_compression(compression)
    norm.check(program)
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
    return bytes(save(stored, {METADATA_KEY: _json({"format": FORMAT, "sha256": sha256, **content})}))


def _packed(description: dict[str, Any], tensors: Tensors) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    stored, packed = storage.pack_tensors(tensors)
    stored, folded = storage.fold_maps(stored)
    layout = {name: entries for name, entries in (("packed", packed), ("folded", folded)) if entries}
    if not layout:
        return stored, {"version": 1, "description": description}
    return stored, {"version": 2, "description": description, "storage": layout}


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


def write(program: norm.Program, path: str | os.PathLike[str], compression: str | None = None) -> Path:
    """Writes the artifact and returns its path; a failure at any point leaves a previous file untouched."""
    destination = Path(path)
    content = to_bytes(program, compression)
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination}: the folder {destination.parent} does not exist; make it first")
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    return destination


def _refuse_foreign_bytes(path: Path) -> None:
    """Tells a truncated safetensors file from one that never was, before the library reads it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or header > _HEADER_BYTES_MAX:
        raise ArtifactError(f"{path}: not a safetensors file; export a model with swincompress_pl.accel.export")
    if size < 8 + header:
        raise ArtifactError(f"{path}: truncated within its header ({size} bytes); copy or export it again")


def _load(path: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    _refuse_foreign_bytes(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: truncated or damaged ({error}); copy or export it again") from error


def _parse(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{path}: a safetensors file, but not an artifact of swincompress_pl (perhaps a model's weights); "
            "build the model and export it with swincompress_pl.accel.export"
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its description is not JSON ({error}); export it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path}: its description is not a {FORMAT}; export it again")
    if content.get("version") not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ArtifactError(
            f"{path}: artifact version {content.get('version')!r}; this package reads versions {known}: "
            "export the model again with this package, or install the package that wrote it"
        )
    return content


def _restored(content: Mapping[str, Any], stored: dict[str, npt.NDArray[Any]]) -> tuple[Any, Tensors]:
    """(description, tensors) from what lies in the file; StorageError where the two do not fit."""
    if content["version"] == 1:
        return content.get("description"), stored
    if _CONTENT in content:
        declared = content[_CONTENT]
        if not isinstance(declared, dict) or _CONTENT not in stored:
            raise storage.StorageError("it has no description")
        text = storage.decode(declared.get("coder"), stored.pop(_CONTENT), declared.get("size_bytes"))
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise storage.StorageError(f"its description is not JSON: {error}") from error
    layout = content.get("storage") if isinstance(content, dict) else None
    if isinstance(layout, dict) and layout and set(layout) <= {"packed", "folded"}:
        tensors = storage.unpack_tensors(stored, layout.get("packed", {}))
        return content.get("description"), storage.unfold_maps(tensors, layout.get("folded", {}))
    if isinstance(layout, dict) and list(layout) == ["streams"]:
        return content.get("description"), storage.decompress_tensors(stored, layout["streams"])
    raise storage.StorageError("it does not say how its tensors are stored")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a ProgramError into an ArtifactError that names the file."""
    try:
        yield
    except norm.ProgramError as error:
        raise ArtifactError(f"{Path(path)}: {error}") from error


def read(path: str | os.PathLike[str]) -> norm.Program:
    """The Program of an artifact, checked: format, version, checksum, then every rule of the norm.

    Raises FileNotFoundError, or ArtifactError naming the file and what is wrong with it.
    """
    program = read_unproved(path)
    with naming(path):
        norm.check(program)
    return program


def read_unproved(path: str | os.PathLike[str]) -> norm.Program:
    """`read` without the rules of the norm, for a caller who checks those (an engine does, and once is enough)."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; write one with swincompress_pl.accel.export(model, path)")
    metadata, stored = _load(source)
    content = _parse(source, metadata)
    try:
        description, tensors = _restored(content, stored)
    except storage.StorageError as error:
        raise ArtifactError(f"{source}: truncated or damaged ({error}); copy or export it again") from error
    if not isinstance(description, dict) or content.get("sha256") != checksum(description, tensors):
        raise ArtifactError(f"{source}: altered after it was written (its checksum differs); copy or export it again")
    with naming(source):
        try:
            return norm.Program.from_description(description, tensors)
        except ValueError as error:  # such as a logit_scale that is no number
            raise norm.ProgramError(str(error)) from error
