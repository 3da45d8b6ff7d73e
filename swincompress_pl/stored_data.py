"""Reads plain data of a file as the types that it was written from.

If something is missing, unknown or of another type, a ValueError names the place. No other error of the code behind it
comes out.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from swincompress_pl.arguments import flag, integer, number, require, shown


@contextmanager
def reading(what: str, *, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns errors inside the context into a ValueError that names the stored `what`.

    Errors of files, warnings, and subclasses of ValueError and TypeError such as UnsupportedNetworkError pass
    unchanged. So do errors of the types in `passing`.
    """
    try:
        yield
    except (OSError, Warning):
        raise
    except Exception as error:
        own = isinstance(error, ValueError | TypeError) and type(error) not in (ValueError, TypeError)
        if own or (isinstance(error, passing) and not isinstance(error, RecursionError)):
            raise
        reason = f"{error.args[0]!r} is missing" if type(error) is KeyError and error.args else str(error)
        raise ValueError(f"{what}: {' '.join(reason.split()) or type(error).__name__}") from error


def from_plain(kind: Any, value: Any, name: str) -> Any:
    """Reads `value` as a `kind`: a dataclass, a list, tuple or mapping of kinds, bool, int, float, str, None or Any.

    Numbers have to be finite. Raises a ValueError, which names the place inside `name`, for anything else.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, name)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_plain(next(k for k in inner if k is not type(None)), value, name)
    if origin in (list, tuple, Sequence):
        return _listed(origin, inner, value, name)
    if origin in (dict, Mapping):
        require(name, value, isinstance(value, Mapping) and all(isinstance(k, str) for k in value), "a mapping")
        return {key: from_plain(inner[1], part, f"{name}[{shown(key)}]") for key, part in value.items()}
    return _scalar(kind, value, name)


def _dataclass(kind: type, value: Any, name: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    require(name, value, isinstance(value, Mapping), f"a mapping with {', '.join(fields)}")
    needed = [
        key
        for key, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [key for key in needed if key not in value]
    unknown = [shown(key) for key in value if key not in fields]
    if missing or unknown:
        what = [f"{', '.join(missing)} missing"] if missing else []
        what += [f"{', '.join(unknown)} unknown"] if unknown else []
        raise ValueError(f"{name}: {' and '.join(what)}; the file is damaged, or of another version")
    kinds = typing.get_type_hints(kind)
    return kind(**{key: from_plain(kinds[key], part, f"{name}.{key}") for key, part in value.items()})


def _listed(origin: Any, inner: tuple[Any, ...], value: Any, name: str) -> Any:
    require(name, value, isinstance(value, list | tuple), "a list")
    kinds = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
    require(name, value, len(kinds) == len(value), f"a list of {len(kinds)}")
    read = [from_plain(kind, part, f"{name}[{i}]") for i, (kind, part) in enumerate(zip(kinds, value, strict=True))]
    return tuple(read) if origin is tuple else read


def _scalar(kind: Any, value: Any, name: str) -> Any:
    if kind is bool:
        return flag(name, value)
    if kind is int:
        return integer(name, value)
    if kind is float:
        return number(name, value, lambda _: True, "a finite number")
    require(name, value, isinstance(value, kind), f"of type {getattr(kind, '__name__', kind)}")
    return value
