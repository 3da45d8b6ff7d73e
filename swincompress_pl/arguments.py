"""Checks arguments when they are given: one function per type, which returns the value in that type.

Errors are ValueErrors that name the argument, the value and what it has to be, such as "start_epoch=1.5: it has to be 0
or more, an integer".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def require(name: str, value: object, holds: bool, wanted: str) -> None:
    """Raises a ValueError that names the argument, its value and what it has to be, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={shown(value)}: it has to be {wanted}")


def shown(value: object) -> str:
    """`value` for a message: its repr, cut if it is long, or its type if it has no repr."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever the repr of a foreign object raises
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(name: str, value: object, *, least: int | None = None, wanted: str = "") -> int:
    """An integer of any type, or a whole float, but not a bool; `wanted` says what it has to be, in other words."""
    wanted = wanted or ("an integer" if least is None else f"{least} or more, an integer")
    found = as_float(value)
    require(name, value, found is not None and math.isfinite(found), wanted)
    result = int(value)  # type: ignore[call-overload]  # a real number
    require(name, value, result == value and (least is None or result >= least), wanted)
    return int(result)


def number(name: str, value: object, holds: Callable[[float], bool], wanted: str) -> float:
    """A finite real number of any type but bool, for which `holds`; an int stays an int."""
    found = as_float(value)
    require(name, value, found is not None and math.isfinite(found) and holds(found), wanted)
    assert found is not None
    return value if type(value) is int else found


def optional(check: Callable[..., T], name: str, value: object, *args: Any, **limits: Any) -> T | None:
    """`check(name, value, ...)`, or None."""
    return None if value is None else check(name, value, *args, **limits)


def flag(name: str, value: object) -> bool:
    """True or False, including NumPy's."""
    require(name, value, isinstance(value, bool) or _is_numpy_bool(value), "True or False")
    return bool(value)


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of `choices`."""
    require(name, value, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")
    return str(value)


def text(name: str, value: object, wanted: str) -> str:
    """A string that is not empty."""
    require(name, value, isinstance(value, str) and bool(value), wanted)
    return str(value)


def names(name: str, value: object, wanted: str) -> tuple[str, ...]:
    """One name or several, as a tuple with at least one."""
    listed = (value,) if isinstance(value, str) else _listed(value)
    require(name, value, bool(listed) and all(isinstance(each, str) for each in listed), wanted)
    return listed


def numbers(name: str, value: object, holds: Callable[[float], bool], wanted: str) -> tuple[float, ...]:
    """One or more numbers, each as in `number`; an error shows all of them."""
    listed = _listed(value)
    found = [as_float(each) for each in listed]
    good = bool(found) and all(each is not None and math.isfinite(each) and holds(each) for each in found)
    require(name, value, good, wanted)
    return tuple(number(name, each, holds, wanted) for each in listed)


def path(name: str, value: object) -> Path:
    """The path of a file."""
    good = isinstance(value, str | PathLike) and bool(str(value)) and "\0" not in str(value)
    require(name, value, good, "the path of a file")
    return Path(value)  # type: ignore[arg-type]  # a str or a PathLike


def batches(name: str, value: T) -> T:
    """A loader, or a function that returns one for a number of images; None for the default."""
    good = value is None or callable(value) or (isinstance(value, Iterable) and not isinstance(value, str | bytes))
    require(name, value, good, "a loader, or a function (images) -> loader")
    return value


def options(name: str, value: object, kind: Callable[..., T], known: Collection[str], old: Collection[str] = ()) -> T:
    """`kind` made of a mapping of its options; errors name `name` first, and `old` lists other names that are known."""
    require(name, value, isinstance(value, Mapping), f"a mapping of {', '.join(known)}")
    assert isinstance(value, Mapping)
    unknown = [key if isinstance(key, str) else shown(key) for key in value if key not in known and key not in old]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        return kind(**value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def as_float(value: object) -> float | None:
    """A real number as a float, infinite if it is too large for one; None for anything else, including bools."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_numpy_bool(value: object) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", "") == "b" and getattr(value, "shape", None) == ()


def _listed(value: object) -> tuple[Any, ...]:
    """The items of a list, tuple or array of one axis; empty for anything else, such as a set."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    is_array = isinstance(getattr(value, "shape", None), tuple) and getattr(value, "ndim", 0) == 1
    return tuple(value) if is_list or is_array else ()  # type: ignore[arg-type]  # both may be iterated over
