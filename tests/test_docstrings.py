"""The docstrings of the public API: every argument and field has a meaning, every result and every error is named.

Ruff's rules D check the form; what they do not check stands here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pytest

PACKAGE = "swincompress_pl"
# {room: its public names; None for those in __all__}
ROOMS: dict[str, tuple[str, ...] | None] = {
    "accel": None,
    "callbacks": None,
    "checkpoint.holder": ("held_by", "network_of"),
    "checkpoint.hooks": ("keep_record", "restore_from_checkpoint", "save_to_checkpoint"),
    "checkpoint.networks": ("restore_networks",),
    "checkpoint.plain": ("load_network", "save_network"),
    "checkpoint.record": ("CompressionRecord", "NetworkRecord", "histories_in", "read_checkpoint"),
    "checkpoint.restore": ("restore_from_history",),
    "cli": ("main",),
    "cli.estimate": ("EstimateCLI", "Part", "measure"),
    "cli.train": ("CompressionCLI", "command_line"),
    "data": None,
    "demo": ("run", "Schedule"),
    "models": None,
    "pruning": None,
    "quant": None,
    "quant.diagnosis": None,
    "quant.graph": ("Lowering", "Quantizer", "Run"),
    "quant.sensitivity": ("LayerSensitivity",),
    "registry": ("Adapter", "SpikingAdapter", "ExplainingAdapter", "ResizableAdapter", "register", "adapter_for"),
    "report": None,
    "report.callback": ("PruningFigures", "log_figures"),
    "spec": None,
}

ENTRY = re.compile(r"(\*{0,2}\w+)(?: \([^)]*\))?: \S")
ERROR = re.compile(r"(?:\w+\.)*(\w+): \S")


def sections(docstring: str) -> dict[str, str]:
    """{title: text, without its indentation} of a docstring in Google style."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    texts = (re.split(r"^(?=\S)", text, flags=re.MULTILINE)[0] for text in parts[2::2])
    return {title: textwrap.dedent(text) for title, text in zip(parts[1::2], texts, strict=True)}


def entries(docstring: str, title: str, pattern: re.Pattern[str] = ENTRY) -> set[str]:
    """The names that a section explains."""
    found = (pattern.match(line) for line in sections(docstring).get(title, "").splitlines())
    return {match[1].lstrip("*") for match in found if match}


def faults(name: str, thing: Any) -> Iterator[str]:
    """What the docstrings of a public function or class, and of its methods, leave out."""
    if not inspect.isclass(thing):
        yield from function_faults(name, thing)
        return
    docstring = inspect.cleandoc(vars(thing).get("__doc__") or "")
    if not docstring:
        yield f"{name}: no docstring"
    if dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"):
        fields = (
            [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else thing._fields
        )
        title, wanted = "Attributes", {field for field in fields if not field.startswith("_")}
        makers = [vars(thing).get("__post_init__")]
    else:
        init = vars(thing).get("__init__")  # a Protocol gets one from typing
        makers = [init if init is not None and init.__module__ == thing.__module__ else None]
        title, wanted = "Args", set(parameters(makers[0])) if makers[0] else set()
    for missing in sorted(wanted - entries(docstring, title)):
        yield f"{name}: {missing} is not under {title}"
    for maker in filter(None, makers):
        yield from undocumented_errors(name, maker, docstring)
    for method, found in methods(thing):
        yield from function_faults(f"{name}.{method}", found)


def function_faults(name: str, function: Callable[..., Any]) -> Iterator[str]:
    docstring = inspect.cleandoc(function.__doc__ or "")
    if not docstring:
        yield f"{name}: no docstring"
        return
    wanted = parameters(function)
    for missing in sorted(set(wanted) - entries(docstring, "Args")):
        yield f"{name}: {missing} is not under Args"
    for extra in sorted(entries(docstring, "Args") - set(wanted)):
        yield f"{name}: {extra} is under Args and no parameter"
    short = not wanted and docstring.startswith("Returns ")
    result = inspect.signature(function).return_annotation
    if result not in (None, "None") and not short and not {"Returns", "Yields"} & sections(docstring).keys():
        yield f"{name}: no Returns"
    yield from undocumented_errors(name, function, docstring)


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def undocumented_errors(name: str, function: Callable[..., Any], docstring: str) -> Iterator[str]:
    """Errors that the function itself raises and its docstring does not name under Raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = {ast.unparse(node.exc.func) for node in ast.walk(tree) if is_raise(node)}
    known = entries(docstring, "Raises", ERROR)
    for error in sorted(raised):
        if error.rpartition(".")[2] not in known | {"NotImplementedError"}:
            yield f"{name}: {error} is not under Raises"


def is_raise(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func)[-5:] == "Error"


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods that this package defines and no class of another package documents."""
    for name in dir(cls):
        if name.startswith("_") and name != "__call__":
            continue
        if any(
            name in vars(base) for base in cls.__mro__ if not base.__module__.startswith(PACKAGE) and base is not type
        ):
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property | cached_property):
            getter = value.fget if isinstance(value, property) else value.func
            assert getter.__doc__ or getter.__module__.endswith("_deprecated"), f"{cls.__name__}.{name}: no docstring"
        elif isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
            yield name, inspect.unwrap(getattr(value, "__func__", value))


def public_names() -> Iterator[Any]:
    for room, names in ROOMS.items():
        module = importlib.import_module(f"{PACKAGE}.{room}")
        for name in names or module.__all__:
            thing = getattr(module, name)
            is_alias = typing.get_origin(thing) is not None  # its docstring stands below it, where no code can read it
            if callable(thing) and not is_alias:
                yield pytest.param(f"{room}.{name}", thing, id=f"{room}.{name}")


@pytest.mark.parametrize(("name", "thing"), public_names())
def test_public_api_says_what_everything_means(name, thing):
    assert list(faults(name, thing)) == []


@pytest.mark.parametrize(("name", "thing"), public_names())
def test_nothing_vanishes_from_the_page(name, thing):
    """Docstrings are rendered as Markdown, where `<name>` outside of backticks is a tag that nobody sees."""
    owned = [thing, *(method for _, method in methods(thing))] if inspect.isclass(thing) else [thing]
    for each in owned:
        assert re.findall(r"<\w+>", re.sub(r"`[^`]*`", "", each.__doc__)) == []


def right(x, *more, key=None) -> int:
    """Adds.

    Args:
        x: A number.
        *more: More numbers.
        key: What it is for,
            in two lines.

    Returns:
        The sum.

    Raises:
        ValueError: If it is negative.
    """
    if x < 0:
        raise ValueError(x)
    return x


def silent(x) -> int:
    """Adds."""
    raise KeyError(x)


def other(x) -> None:
    """Adds.

    Args:
        y: A number.
    """


@dataclasses.dataclass
class Fields:
    """Two numbers.

    Attributes:
        a: The first.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        raise TypeError(self.a)


class Arguments:
    """Takes one."""

    def __init__(self, x):
        self.x = x

    def method(self) -> int:
        """Returns one."""
        return self.x


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (right, []),
        (silent, ["thing: x is not under Args", "thing: no Returns", "thing: KeyError is not under Raises"]),
        (other, ["thing: x is not under Args", "thing: y is under Args and no parameter"]),
        (Fields, ["thing: b is not under Attributes", "thing: TypeError is not under Raises"]),
        (Arguments, ["thing: x is not under Args"]),
        (lambda: 0, ["thing: no docstring"]),
    ],
)
def test_what_is_left_out_is_found(thing, expected):
    assert list(faults("thing", thing)) == expected
