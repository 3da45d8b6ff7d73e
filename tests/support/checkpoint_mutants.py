"""Checkpoints whose plain data was changed: a key gone, another type, another name, odd numbers, lists mixed up."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# What a mutant changes: the record, the arguments, what callbacks and loops keep.
PARTS = ("swincompress_pl", "swincompress_pl_input", "swincompress_pl_teacher_taken", "hyper_parameters", "callbacks")
_ODD: list[Any] = [
    None, True, -1, 0, 3, 10**12, -(10**30), 0.5, float("nan"), float("inf"), "", "x", "W99A99", [], [[1]], {},
    {"x": 1}, [None], "9" * 400,
]  # fmt: skip


def mutants(checkpoint: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was changed, a changed copy of the checkpoint); its tensors are shared with the original."""
    generator = random.Random(seed)
    places = [place for part in PARTS if part in checkpoint for place in _places(checkpoint[part], (part,))]
    for _ in range(count):
        # First how deep, then where: a long list deep down is not all that is tried.
        depth = generator.choice(sorted({len(place) for place in places}))
        place = generator.choice([place for place in places if len(place) == depth])
        mutant = _copied(checkpoint)
        yield _mutate(mutant, place, generator), mutant


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list | tuple) and len(value) < 30:
        for number, inner in enumerate(value):
            yield from _places(inner, (*path, number))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    if isinstance(value, Tensor):
        return value
    return copy.deepcopy(value)


def _mutate(mutant: dict[str, Any], place: tuple[Any, ...], generator: random.Random) -> str:
    *path, key = place
    holder: Any = mutant
    for step in path:
        if isinstance(holder[step], tuple):
            holder[step] = list(holder[step])
        holder = holder[step]
    kind = generator.choice(("gone", "odd", "renamed", "nested", "mixed", "odd", "doubled"))
    value = holder[key]
    if kind == "gone":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        del holder[key]
        holder[generator.choice([f"{key}_", "x", 7])] = value
    elif kind == "nested":
        for _ in range(generator.choice([1, 1, 3000])):
            value = [value] if generator.random() < 0.5 else {"x": value}
        holder[key] = value
    elif kind == "mixed" and isinstance(value, list | tuple) and len(value) > 1:
        holder[key] = generator.sample(list(value), len(value))
    elif kind == "doubled" and isinstance(value, list | tuple):
        holder[key] = [*value, *value]
    else:
        kind, holder[key] = "odd", copy.deepcopy(generator.choice(_ODD))
    now = holder.get(key, "gone") if isinstance(holder, dict) else "changed"
    shown = "a deep nest" if kind == "nested" else repr(now)[:60]
    return f"{'.'.join(map(str, place))} {kind}: {shown}"
