"""What the reference names is there, under the names of this version, and every public name is in it."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
ROOMS = "accel|callbacks|checkpoint|data|models|pruning|quant|report|spec"


def documented() -> list[tuple[str, str]]:
    """(module, name) of all members; mkdocstrings reads the block after `::: module` as YAML."""
    found = []
    for page in PAGES:
        for block in page.read_text(encoding="utf-8").split("\n::: ")[1:]:
            module, _, options = block.partition("\n")
            found += [(module.strip(), name) for name in yaml.safe_load(options)["options"]["members"]]
    return found


def test_the_pages_are_read() -> None:
    assert len(documented()) > 100
    assert len(set(documented())) == len(documented())


@pytest.mark.parametrize("room", sorted(set(ROOMS.split("|")) - {"checkpoint"}))  # which has no public names
def test_every_public_name_is_in_the_reference(room: str) -> None:
    module = importlib.import_module(f"swincompress_pl.{room}")
    assert set(module.__all__) == {name for place, name in documented() if place == module.__name__}


def test_the_functions_of_the_package_are_named() -> None:
    text = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in importlib.import_module("swincompress_pl").__all__)


@pytest.mark.parametrize(("module", "name"), documented())
def test_every_name_of_the_page_can_be_imported(module: str, name: str) -> None:
    thing: Any = getattr(importlib.import_module(module), name)
    assert thing.__doc__ or not isinstance(thing, type | FunctionType)  # an alias of types has none of its own


def referred_to() -> list[str]:
    """`room.name` in backticks, in docstrings, comments and documents; not the names of files."""
    files = [*(ROOT / "swincompress_pl").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[RC]*.md")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.name not in ("CHANGELOG.md", "upgrading.md")]
    found = {name for text in texts for name in re.findall(rf"`((?:{ROOMS})(?:\.\w+)+)`", text)}
    return sorted(name for name in found if not re.search(r"\.(html|json|md|py)$", name))


def test_references_are_found() -> None:
    assert {"models.create_model", "quant.quantize"} <= set(referred_to())


@pytest.mark.parametrize("name", referred_to())
def test_what_the_text_refers_to_is_there(name: str) -> None:
    path = "swincompress_pl"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="matplotlib")
        thing: Any = importlib.import_module(path)
        for part in name.split("."):
            path += f".{part}"
            thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(path)


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def pages_with_links() -> list[Path]:
    return [*sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("[RC]*.md"), ROOT / "benchmarks/README.md"]


def anchors(page: Path) -> set[str]:
    """As Python-Markdown's `toc` makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", pages_with_links(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link
