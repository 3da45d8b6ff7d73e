"""What a piece of Python says of this package, held against the package: imports, attributes, keyword arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

PACKAGE = "swincompress_pl"
_UNKNOWN = object()


def wrong_names(source: str, known: dict[str, Any]) -> Iterator[str]:
    """What is not there, a line for each. known: names that earlier blocks imported; those of this one are added.

    Raises SyntaxError for what is no Python.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            _import(node, known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield from _imported_from(node, known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and inspect.ismodule(_resolved(node.value, known)):
            module = _resolved(node.value, known)
            if module.__name__.split(".")[0] == PACKAGE and not hasattr(module, node.attr):
                yield f"{module.__name__} has no {node.attr!r}"
        elif isinstance(node, ast.Call):
            yield from _wrong_keywords(node, _resolved(node.func, known))


def _import(node: ast.Import, known: dict[str, Any]) -> None:
    for alias in node.names:
        if alias.name.split(".")[0] == PACKAGE:
            module = importlib.import_module(alias.name)
            known[alias.asname or PACKAGE] = module if alias.asname else importlib.import_module(PACKAGE)


def _imported_from(node: ast.ImportFrom, known: dict[str, Any]) -> Iterator[str]:
    module = importlib.import_module(str(node.module))
    for alias in node.names:
        if not hasattr(module, alias.name):
            try:
                importlib.import_module(f"{node.module}.{alias.name}")
            except ImportError:
                yield f"{node.module} has no {alias.name!r}"
                continue
        known[alias.asname or alias.name] = getattr(module, alias.name)


def _resolved(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return known.get(node.id, _UNKNOWN)
    if isinstance(node, ast.Attribute):
        return getattr(_resolved(node.value, known), node.attr, _UNKNOWN)
    return _UNKNOWN


def _wrong_keywords(node: ast.Call, function: Any) -> Iterator[str]:
    if function is _UNKNOWN or not callable(function):
        return
    takes = _keywords(function)
    for keyword in node.keywords:
        if takes is not None and keyword.arg is not None and keyword.arg not in takes:
            yield f"{getattr(function, '__qualname__', function)} takes no {keyword.arg}="


def _keywords(function: Any) -> set[str] | None:
    """The names of a function's or class's arguments; None where any may come."""
    classes = function.__mro__ if isinstance(function, type) else ()
    levels = [vars(base)["__init__"] for base in classes if "__init__" in vars(base)] or [function]
    names: set[str] = set()
    for level in levels:
        parameters = inspect.signature(level).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return names
    return None
