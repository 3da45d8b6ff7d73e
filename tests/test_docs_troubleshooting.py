"""docs/how-to/troubleshooting.md: every heading is a message of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/how-to/troubleshooting.md"
VALUE = "\0"


def headings() -> list[str]:
    """The messages, of which "..." is what stands for values."""
    return re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


@cache
def messages() -> str:
    """Every text of the package's source, one per line, with a mark where a value is put in."""
    return "\n".join(text for texts in (_of_python(), _of_cpp()) for text in texts)


def _of_python() -> Iterator[str]:
    for file in (ROOT / "swincompress_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                yield _text(node).replace("\n", " ")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return VALUE


def _of_cpp() -> Iterator[str]:
    for file in (ROOT / "swincompress_pl/accel/csrc").rglob("*.cpp"):
        text = re.sub(r'"\s*\n?\s*"', "", file.read_text(encoding="utf-8"))  # neighbours are one
        text = re.sub(r'"\s*\+[^;]{1,120}?\+\s*"', VALUE, text)
        yield from re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)


def test_there_are_many() -> None:
    assert len(headings()) >= 25
    assert len(set(headings())) == len(headings())


@pytest.mark.parametrize("heading", headings())
def test_the_source_says_so(heading: str) -> None:
    parts = [re.escape(part.strip()) for part in heading.split("...") if part.strip()]
    assert re.search(".*".join(parts), messages()), heading


def test_another_text_is_not_found() -> None:
    assert not re.search("no adapter for this house", messages())
