"""What a record keeps: values of JSON types, and text files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A value of JSON types only."""

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown or missing field raises TypeError or KeyError."""
        return cls(**data)


def read_plain(kind: type[T], data: Mapping[str, Any] | T, what: str, check: Callable[[T], None]) -> T:
    """A value of another room from the plain data of its `to_dict`, checked; one that is read already as it is.

    Raises ValueError for another version and for missing, ill-typed or contradictory entries. what: it in words.
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


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text via a temporary file beside `path` and a rename; makes the directory."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
