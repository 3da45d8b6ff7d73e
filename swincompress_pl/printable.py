"""Makes text from untrusted files safe for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def printable(text: str) -> str:
    r"""Replaces everything that does not print by its escape in Python, such as \x1b, \n and \u202e.

    These include escapes that control a terminal, line breaks, and marks that turn the direction of text.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_data(value: Any) -> Any:
    """JSON-able data with every string in it printable, including keys."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): printable_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_data(item) for item in value]
    return value
