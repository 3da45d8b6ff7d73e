"""docs/reference/configs.md: the tables have exactly the arguments and defaults that the classes have."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from swincompress_pl import callbacks, data, models

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reference/configs.md"
CLASSES: dict[str, Any] = {
    "Model: `CompressibleClassifier`": models.CompressibleClassifier,
    "`optimization`": models.OptimizationConfig,
    "`mixing`": models.MixingConfig,
    "`distillation`": models.DistillationConfig,
    "`preprocessing`": data.Preprocessing,
    **{f"`{name}`": getattr(data, name) for name in ("ImageNetFolder", "CIFAR10", "Digits")},
    **{f"`{name}`": getattr(data, name) for name in ("CropAndColor", "PadCropFlip", "ShiftRotate")},
    **{f"`{name}`": getattr(callbacks, name) for name in callbacks.__all__},
}


def tables() -> dict[str, dict[str, str]]:
    """{heading: {key: default}}."""
    found: dict[str, dict[str, str]] = {}
    for heading, text in re.findall(r"^##+ (.+)\n((?:(?!^##).*\n)*)", PAGE.read_text("utf-8"), flags=re.MULTILINE):
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ", text, flags=re.MULTILINE)
        if re.search(r"^\| key \| default \|", text, flags=re.MULTILINE):
            found[heading] = dict(rows)
    return found


def same(told: str, default: Any) -> bool:
    if default is inspect.Parameter.empty:
        return told == "required"
    if told == "below":
        return (
            type(default).__name__ in {heading.strip("`") for heading in CLASSES} or type(default) in CLASSES.values()
        )
    plain = list(default) if isinstance(default, tuple) else default
    return bool(yaml.safe_load(told) == plain)


@pytest.mark.parametrize("heading", list(CLASSES))
def test_a_table_is_the_class(heading: str) -> None:
    table, kind = tables()[heading], CLASSES[heading]
    there = {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }
    assert list(table) == list(there)
    assert not {name: (table[name], default) for name, default in there.items() if not same(table[name], default)}


def test_every_table_is_held() -> None:
    assert set(tables()) == set(CLASSES)


def test_the_recipes_are_listed() -> None:
    assert set(re.findall(r"configs/\w+\.yaml", PAGE.read_text("utf-8"))) == {
        str(file.relative_to(ROOT)) for file in (ROOT / "configs").glob("*.yaml")
    }
