"""What a record keeps: values of JSON types, and text files that are written atomically."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from swincompress_pl.files import write_file

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A dataclass whose fields have JSON types only."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuilds what `to_dict` gave.

        Args:
            data: The fields by name.

        Returns:
            The value.

        Raises:
            TypeError: If a field is unknown or missing.
        """
        return cls(**data)


def read_plain(kind: type[T], data: Mapping[str, Any] | T, what: str, check: Callable[[T], None]) -> T:
    """Rebuilds a value of another room from the plain data of its `to_dict`, and checks it.

    A value that is rebuilt already is returned as it is. A ValueError is raised for another version and for missing,
    ill-typed or contradictory entries; `what` names the value in the message.
    """
    if isinstance(data, kind):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is the plain data of {kind.__name__}.to_dict(), not {type(data).__name__!r}")
    try:
        found: T = kind.from_dict(data)  # type: ignore[attr-defined]  # such as SearchState
        check(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what} is incomplete or ill-typed: {error!r}") from error
    return found


def require_type(value: Any, kind: Any, what: str) -> None:
    """Raises a TypeError that names the first entry of `value` that has not the type declared for it.

    It looks into dataclasses, lists, tuples and mappings. A float must be finite, and an integer counts as a float.
    `what` names the value in the message.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin in (Union, UnionType):
        _require_one_of(value, inner, what)
    elif origin is not None:
        _require_items(value, origin, inner, what)
    elif kind is float:
        _require(type(value) in (int, float) and abs(value) <= sys.float_info.max, value, "a number", what)
    elif kind in (int, bool):
        _require(type(value) is kind, value, kind.__name__, what)
    else:
        _require(isinstance(value, kind), value, kind.__name__, what)
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            for field in fields(kind):
                require_type(getattr(value, field.name), hints[field.name], f"{what}.{field.name}")


def _require_one_of(value: Any, kinds: tuple[Any, ...], what: str) -> None:
    if value is None and type(None) in kinds:
        return
    for kind in (real := [kind for kind in kinds if kind is not type(None)]):
        try:
            return require_type(value, kind, what)
        except TypeError:
            if kind is real[-1]:
                raise


def _require_items(value: Any, origin: Any, inner: tuple[Any, ...], what: str) -> None:
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), value, "a mapping", what)
        for key, item in value.items():
            require_type(key, inner[0], f"a key of {what}")
            require_type(item, inner[1], f"{what}[{key!r}]")
        return
    _require(isinstance(value, list | tuple), value, "a list", what)
    fixed = origin is tuple and Ellipsis not in inner
    _require(not fixed or len(value) == len(inner), value, f"{len(inner)} entries", what)
    for number, item in enumerate(value):
        require_type(item, inner[number] if fixed else inner[0], f"{what}[{number}]")


def _require(right: bool, value: Any, expected: str, what: str) -> None:
    if not right:
        raise TypeError(f"{what} is {repr(value)[:60]}, not {expected}")


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text, whole or not at all; makes the directory."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8", errors="backslashreplace")  # JSON may hold lone surrogates
    return write_file(target, lambda file: file.write(content))
