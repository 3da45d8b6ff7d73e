"""docs/reference/upgrading.md: the tables have every name of version 0.1 that the package still knows.

`python tests/test_docs_upgrading.py` writes the tables of modules and names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from swincompress_pl._deprecated import MODULES, NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reference/upgrading.md"


def generated() -> str:
    """The sections of modules and names."""
    lines = ["## Modules", "", "Without `swincompress_pl.` in front.", "", "| 0.1 | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in MODULES.items()]
    lines += [
        "",
        "## Names",
        "",
        "Of modules that have lost a name. All others are found by the new module's name.",
        "",
    ]
    lines += ["| 0.1 | now |", "|---|---|"]
    for module, names in NAMES.items():
        lines += [f"| `{module}.{old}` | `{new.replace(':', '.')}` |" for old, new in names.items()]
    return "\n".join([*lines, ""])


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def renamed() -> Iterator[tuple[str, str, str]]:
    """("Arguments" or "Attributes", old, new) of the decorators in the source."""
    titles = {"renamed": "Arguments", "renamed_attributes": "Attributes"}
    for file in (ROOT / "swincompress_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in titles:
                    title = titles[decorator.func.id]  # type: ignore[attr-defined]
                    for keyword in decorator.keywords:
                        if keyword.arg == "values":
                            for values in ast.literal_eval(keyword.value).values():
                                yield from ((title, f'"{old}"', f'"{new}"') for old, new in values.items())
                        else:
                            yield title, str(keyword.arg), ast.literal_eval(keyword.value)


def test_modules_and_names_are_the_packages() -> None:
    text = PAGE.read_text("utf-8")
    assert text[text.index("## Modules") :] == generated()


@pytest.mark.parametrize(("title", "old", "new"), sorted(set(renamed())))
def test_what_was_renamed_is_in_a_table(title: str, old: str, new: str) -> None:
    rows = [line for line in section(title).splitlines() if line.startswith("| ")]
    assert any(old in row.split(" | ")[1] and new in row.split(" | ")[2] for row in rows), (title, old, new)


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text.partition("## Modules")[0] + generated(), encoding="utf-8")
