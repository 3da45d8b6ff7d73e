"""Artifacts changed in one place, their checksum right again: what a stranger can write who knows the format."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from support.artifact_bytes import Array, container, header_of, parts, sealed
from swincompress_pl import spec
from swincompress_pl.accel import artifact, storage

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**33, 2**62, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**400, 1.0, 0.5, 1e300, "", "images", "uint8", "int8", "int4", "uint1", "int32", "NTHWC", "linear",
    "n" * 1024, "n" * 1025, "é" * 513, "\x1b[31m", "0x1p+2000", "0x1p-1074", "0x1.8p+0", "0x11p+0", "0x1.p+0", "0x0p+0",
    "inf", "nan", "0X1P+0", " 0x1p+0", "0x1p+0 ", "1.0", "0x1p5", "-0x1p+0", "0x1.00000000000001p+0", "0x1p\u0661",
    "add", [], [0], [1, 1], [2, 2], [2**63, 1], ["a", "b"], ["a", 1], [["a", 1]], [None], {}, {"a": 1}, {"channels": 4},
    [[]],
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _change_description(rng: random.Random, description: dict[str, Any]) -> None:
    places = list(_places(description))
    container, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(["time_steps", "x", "classes", "groups", "steps", "weight"])] = rng.choice(VALUES)
    elif how == 2:
        other, name = rng.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            container[key] = copy.deepcopy(other[name])
    elif how == 3 and type(container[key]) is int:
        container[key] += rng.choice([-1, 1, 2, 64])
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))


def _change_tensors(rng: random.Random, tensors: dict[str, Array]) -> None:
    key = rng.choice(sorted(tensors))
    tensor = tensors[key]
    how = rng.randrange(5)
    if how == 0:
        limits = np.iinfo(tensor.dtype)
        tensor.reshape(-1)[rng.randrange(tensor.size)] = rng.choice([limits.min, limits.max, 0, limits.max // 2])
    elif how == 1:
        tensors[key] = tensor.astype(rng.choice(["int8", "uint8", "int16", "int32", "int64"]))
    elif how == 2:
        tensors[key] = tensor.reshape(rng.choice([(-1,), (1, *tensor.shape), (*tensor.shape, 1)]))
    elif how == 3:
        tensors[rng.choice(["n" * 1024, "n" * 1025, "é" * 512, "stray"])] = tensors.pop(key)
    else:
        tensors[key] = tensor[: rng.randrange(1, tensor.shape[0] + 1)]


def mutant(programs: list[spec.Program], number: int) -> bytes:
    """The artifact of one of `programs`, changed as `number` says."""
    rng = random.Random(number)
    description, tensors = parts(rng.choice(programs))
    for _ in range(rng.choice([1, 1, 1, 2])):
        if rng.random() < 0.75:
            _change_description(rng, description)
        else:
            _change_tensors(rng, tensors)
    return sealed(description, tensors)


def stored_mutant(programs: list[spec.Program], number: int) -> bytes:
    """The artifact of one of `programs`, with what it says of its storage changed, or the bytes stored; the checksum
    is that of the Program."""
    rng = random.Random(number)
    description, tensors = parts(rng.choice(programs))
    stored, layout = storage.pack_tensors(tensors)
    layout = json.loads(json.dumps(layout or {"packed": {}}))
    if rng.random() < 0.5:
        _change_description(rng, layout)
    else:
        _change_tensors(rng, stored)
    return sealed(description, tensors, stored, layout)


def damaged(wholes: list[bytes], number: int) -> bytes:
    """One of these artifacts with bytes changed, or cut off, as `number` says; the checksum is wrong then."""
    rng = random.Random(number)
    content = bytearray(rng.choice(wholes))
    for _ in range(rng.choice([1, 1, 4])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.choice([len(content), len(content), rng.randrange(len(content))])])


def coded_mutant(programs: list[spec.Program], number: int) -> bytes:
    """A compressed artifact changed as `number` says, behind the coder or before it: what its description says with
    the right checksum, what it declares of its streams, or coded bytes."""
    rng = random.Random(number)
    program = rng.choice(programs)
    description, tensors = parts(program)
    roles = {key: role for op in program.operations for role, key in op.tensors.items()}
    layer = rng.randrange(5)
    if layer == 0:
        _change_description(rng, description)
    elif layer == 1:
        _change_tensors(rng, tensors)
    try:
        streams, entries = storage.compress_tensors(tensors, {key: roles.get(key, "weight") for key in tensors})
    except storage.StorageError:  # tensors that no stream takes
        return sealed(description, tensors)
    content: dict[str, Any] = {"description": description, "storage": {"streams": entries}}
    if layer == 2:
        _change_description(rng, content["storage"])
    plain = json.dumps(content).encode()
    coder, coded = storage.encode(plain)
    declaration: dict[str, Any] = {
        "format": artifact.FORMAT,
        "version": 2,
        "sha256": artifact.checksum(description, tensors),
        "content": {"coder": coder, "size_bytes": len(plain)},
    }
    if layer == 3:
        _change_description(rng, declaration)
    stored: dict[str, Array] = {"content": coded, **streams}
    if layer == 4:
        _change_coded(rng, stored)
    return container(*header_of(stored, json.dumps(declaration)))


def _change_coded(rng: random.Random, stored: dict[str, Array]) -> None:
    key = rng.choice(sorted(stored))
    coded = bytearray(stored[key].tobytes())
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.choice([1, 3])):
            coded[rng.randrange(len(coded))] = rng.randrange(256)
    elif how == 1:
        del coded[rng.randrange(len(coded)) :]
    elif how == 2:
        coded += rng.randbytes(rng.choice([1, 64]))
    else:
        stored[key], other = stored[rng.choice(sorted(stored))], stored[key]
        stored[rng.choice(sorted(stored))] = other
        return
    stored[key] = np.frombuffer(bytes(coded), np.uint8)


def any_mutant(programs: list[spec.Program], wholes: list[bytes], number: int) -> bytes:
    """Of every kind in turn: structure and tensors, storage, damaged bytes, coded streams. wholes: artifacts of
    `programs`."""
    if number % 8 == 0:
        return stored_mutant(programs, number)
    if number % 4 == 2:
        return damaged(wholes, number)
    return coded_mutant(programs, number) if number % 4 == 3 else mutant(programs, number)
