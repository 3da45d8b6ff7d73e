"""Artifacts changed in one place, their checksum right again: what a stranger can write who knows the format."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from support.artifact_bytes import Array, parts, sealed
from swincompress_pl import spec

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
