"""Arguments are checked when they are given: one function per type, each gives the value in that type.

Errors are ValueErrors that name the argument, the value and what it has to be: "start_epoch=1.5: it has to be an
integer of 0 or more".
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
    """Raise ValueError, naming an argument, its value and what it has to be, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={shown(value)}: it has to be {wanted}")


def shown(value: object) -> str:
    """`value` in a message: its repr, cut where it is long, or the type of what cannot be shown."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a foreign object's own
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(name: str, value: object, *, least: int | None = None, wanted: str = "") -> int:
    """An integer of any type, or a float that is whole; no bool. wanted: what it has to be, in other words."""
    wanted = wanted or ("an integer" if least is None else f"{least} or more, an integer")
    found = as_float(value)
    require(name, value, found is not None and math.isfinite(found), wanted)
    result = int(value)  # type: ignore[call-overload]  # a real number
    require(name, value, result == value and (least is None or result >= least), wanted)
    return int(result)


def number(name: str, value: object, holds: Callable[[float], bool], wanted: str) -> float:
    """A finite real number of any type, no bool, for which `holds`; an int stays one. wanted: what it has to be."""
    found = as_float(value)
    require(name, value, found is not None and math.isfinite(found) and holds(found), wanted)
    assert found is not None
    return value if type(value) is int else found


def optional(check: Callable[..., T], name: str, value: object, *args: Any, **limits: Any) -> T | None:
    """`check(name, value, ...)`, or None."""
    return None if value is None else check(name, value, *args, **limits)


def flag(name: str, value: object) -> bool:
    """True or False, NumPy's too."""
    require(name, value, isinstance(value, bool) or _is_numpy_bool(value), "True or False")
    return bool(value)


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of `choices`."""
    require(name, value, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")
    return str(value)


def text(name: str, value: object, wanted: str) -> str:
    """A text that is not empty."""
    require(name, value, isinstance(value, str) and bool(value), wanted)
    return str(value)


def names(name: str, value: object, wanted: str) -> tuple[str, ...]:
    """One name or several, as a tuple of one or more."""
    listed = (value,) if isinstance(value, str) else _listed(value)
    require(name, value, bool(listed) and all(isinstance(each, str) for each in listed), wanted)
    return listed


def numbers(name: str, value: object, holds: Callable[[float], bool], wanted: str) -> tuple[float, ...]:
    """Several numbers, one or more, each as `number`; an error shows them all."""
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
    """A loader, or a function of the number of images that gives one; None for the default."""
    good = value is None or callable(value) or (isinstance(value, Iterable) and not isinstance(value, str | bytes))
    require(name, value, good, "a loader, or a function (images) -> loader")
    return value


def options(name: str, value: object, kind: Callable[..., T], known: Collection[str], old: Collection[str] = ()) -> T:
    """`kind` from a mapping of its options; errors name `name` before the option. old: names that `kind` knows too."""
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
    """A real number as a float, infinite where it is too large for one; None for anything else, bools included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_numpy_bool(value: object) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", "") == "b" and getattr(value, "shape", None) == ()


def _listed(value: object) -> tuple[Any, ...]:
    """What a list, tuple or array of one axis holds; empty for all else, as for what has no order."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    is_array = isinstance(getattr(value, "shape", None), tuple) and getattr(value, "ndim", 0) == 1
    return tuple(value) if is_list or is_array else ()  # type: ignore[arg-type]  # both may be iterated over
