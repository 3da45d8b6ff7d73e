"""What docs/api.md names is there, under the names of this version."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def documented() -> list[tuple[str, str]]:
    """(module, name) of all members; mkdocstrings reads the block after `::: module` as YAML."""
    found = []
    for block in PAGE.read_text(encoding="utf-8").split("\n::: ")[1:]:
        module, _, options = block.partition("\n")
        found += [(module.strip(), name) for name in yaml.safe_load(options)["options"]["members"]]
    return found


def test_the_page_is_read() -> None:
    assert len(documented()) > 50
    assert len(set(documented())) == len(documented())


@pytest.mark.parametrize(("module", "name"), documented())
def test_every_name_of_the_page_can_be_imported(module: str, name: str) -> None:
    thing: Any = getattr(importlib.import_module(module), name)
    assert thing.__doc__
