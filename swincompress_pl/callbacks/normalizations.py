"""Finds the means and deviations that a loader holds: in a transform of its dataset, of any name, or anywhere else.

Attributes are only read, never computed: no property and no method runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from torch import Tensor

from swincompress_pl.arguments import as_float

_DEPTH = 16  # of datasets, transforms, lists and attributes inside each other
_LENGTH = 64  # of lists and dictionaries; longer ones hold samples
_OBJECTS = 10_000  # that are looked at in all
_SKIPPED = (
    *(str, bytes, int, float, complex, Tensor, np.ndarray, np.generic, type, ModuleType, BuiltinFunctionType),
    *(LightningModule, Trainer),  # a whole fit, which holds other normalizations too
)
_NAMES = (("mean", "std"), ("image_mean", "image_std"))  # the latter in processors of transformers
_SAME = 5e-4  # an eighth of a pixel step


@dataclass(frozen=True)
class Held:
    """A mean and deviation per channel, in [0, 1] units, and the place where they are."""

    place: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def preprocessing(self) -> dict[str, list[float]]:
        """As a callback's argument."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def is_as(self, other: Held) -> bool:
        """Whether both turn pixels into the same values, but for rounding."""
        pairs = zip(self.mean + self.std, other.mean + other.std, strict=True)
        return all(abs(one - another) <= _SAME for one, another in pairs)

    def __str__(self) -> str:
        return f"{self.place} (mean {list(self.mean)}, std {list(self.std)})"


def normalizations_in(loaders: Iterable[Any], channels: int) -> list[Held]:
    """The different means and deviations per channel that the loaders and their datasets hold, the nearest first."""
    found: list[Held] = []
    for place, entries in _reachable((type(loader).__name__, loader) for loader in loaders):
        for names in _NAMES:
            mean, std = (_per_channel(entries.get(name), channels) for name in names)
            if mean is None or std is None:
                continue
            scale = 255 if max(mean + std) > 1 else 1  # of pixels up to 255
            held = Held(place, *(tuple(round(value / scale, 6) for value in values) for values in (mean, std)))
            in_range = min(held.mean) >= 0 and min(held.std) > 0 and max(held.mean + held.std) <= 1
            if in_range and not any(held.is_as(other) for other in found):
                found.append(held)
    return found


def _per_channel(value: Any, channels: int) -> tuple[float, ...] | None:
    """One number per channel; None if `value` is something else. A single number is that of all channels."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.reshape(-1).tolist() if 0 < np.prod(value.shape) <= _LENGTH else None
    listed = list(value) if isinstance(value, list | tuple) else [value]
    numbers = [as_float(each) for each in listed]
    known = tuple(number for number in numbers if number is not None)
    if len(known) < len(numbers) or len(known) not in (1, channels):
        return None
    return known if len(known) == channels else known * channels


def _reachable(roots: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, attributes or entries) of the roots and of what they hold, each object once."""
    waiting = deque((place, value, 0) for place, value in roots)
    seen: dict[int, Any] = {}  # with the object, so that no other one gets its id
    while waiting and len(seen) < _OBJECTS:
        place, value, depth = waiting.popleft()
        if value is None or issubclass(type(value), _SKIPPED) or id(value) in seen:
            continue
        seen[id(value)] = value
        entries = _entries(value)
        yield place, {name[1:] if name.startswith(".") else name[2:-2]: part for name, part in entries.items()}
        if depth < _DEPTH:
            waiting += [(place + name, part, depth + 1) for name, part in (*entries.items(), *_listed(value))]


def _entries(value: Any) -> dict[str, Any]:
    """The attributes of an object, or the entries of a dictionary, by ".name" and "['name']"."""
    if isinstance(value, dict):
        return {f"[{key!r}]": part for key, part in value.items() if type(key) is str} if len(value) <= _LENGTH else {}
    if isinstance(value, MethodType):
        return {".__self__": value.__self__}
    if isinstance(value, FunctionType):
        return _closure(value)
    found: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        for name, part in vars(kind).items():
            if name.startswith("__"):
                continue
            if isinstance(part, MemberDescriptorType):  # __slots__, functools.partial
                found[name] = _slot(part, value)
            elif not hasattr(type(part), "__get__"):
                found[name] = part
    found |= _own(value)
    if isinstance(value, tuple):  # a NamedTuple
        found |= dict(zip(getattr(type(value), "_fields", ()), value, strict=False))
    return {f".{name}": part for name, part in found.items() if type(name) is str}


def _own(value: Any) -> dict[str, Any]:
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return dict(own) if isinstance(own, dict) else {}


def _slot(member: MemberDescriptorType, value: Any) -> Any:
    try:
        return member.__get__(value, type(value))
    except AttributeError:  # not set
        return None


def _closure(function: FunctionType) -> dict[str, Any]:
    """The variables that a function has taken from around it, and its defaults."""
    found: dict[str, Any] = {".__defaults__": function.__defaults__, ".__kwdefaults__": function.__kwdefaults__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[f".{name}"] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return found


def _listed(value: Any) -> Sequence[tuple[str, Any]]:
    """The parts of a list, a tuple, a set or a deque, and of a dictionary those without a name."""
    if isinstance(value, dict):
        parts: Any = [part for key, part in value.items() if type(key) is not str] if len(value) <= _LENGTH else []
    else:
        parts = value if isinstance(value, list | tuple | set | frozenset | deque) and len(value) <= _LENGTH else []
    return [(f"[{number}]", part) for number, part in enumerate(parts)]
