"""Makes the messages of jsonargparse short: what is wrong, without the types that a value was tried as."""

from __future__ import annotations

import re

_UNION = "Does not validate against any of the Union subtypes"
_TYPE_ONLY = re.compile(r"Expected an? |Not of type |Not a valid subclass of |Type .* expects|Unexpected (value|type)")
_SHOWN = 200


def short(message: str) -> str:
    """A message in which each list of tried types is replaced by the errors that tell more than a type.

    Args:
        message: The message of an error, as jsonargparse words it, or any other.

    Returns:
        The message, on several lines if it had several.
    """
    text = _without_unions(message)
    text = re.sub(r"\n *- Expected a path but .* not accessible or invalid\n *- ", "\n", text)
    text = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", text)
    return re.sub(r'Parser key "([^"]+)":', r"\1:", text)


def _without_unions(message: str) -> str:
    lines = message.split("\n")
    for place, line in enumerate(lines[:-1]):
        start = line.find(_UNION)
        if start >= 0:
            rest = lines[place + 1 :]
            errors, given, after = _union(rest, " " * (len(rest[0]) - len(rest[0].lstrip())))
            told = list(dict.fromkeys(_without_unions(error) for error in errors))
            told = [error for error in told if not _TYPE_ONLY.match(error)] or _of_types(told, given)
            return "\n".join([*lines[:place], line[:start] + "; or ".join(told), *after])
    return message


def _union(lines: list[str], indent: str) -> tuple[list[str], str, list[str]]:
    """The errors of the types, the given value, and the lines behind them."""
    errors: list[str] = []
    given = ""
    for place, line in enumerate(lines):
        text = line[len(indent) :]
        if line[: len(indent)].strip():  # it belongs to what is around it
            return errors, given, lines[place:]
        if text.startswith("  - "):
            errors.append(text[4:])
        elif text.startswith("    ") and errors:
            errors[-1] += f"\n{text[4:]}"
        elif text.startswith("Given value: "):
            given = text.removeprefix("Given value: ")
    return errors, given, []


def _of_types(errors: list[str], given: str) -> list[str]:
    """The types in place of errors that name only types, without None, and the value that is none of them."""
    names = [error for error in errors if "NoneType" not in error] or errors
    value = given if len(given) <= _SHOWN else f"{given[:_SHOWN]} ..."
    return [f"{' or '.join(names)}; the value is {value}"]
