"""docs/reference/versions.md: what pyproject.toml and the formats say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from swincompress_pl.checkpoint.record import RECORD_VERSION
from swincompress_pl.report import record
from swincompress_pl.spec.program import NORM_VERSIONS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/reference/versions.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_table_is_that_of_the_project() -> None:
    told = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+|any that fits torch) \|", TEXT, flags=re.MULTILINE))
    needed = {"Python": PROJECT["project"]["requires-python"].removeprefix(">=")}
    for requirement in PROJECT["project"]["dependencies"]:
        name, _, version = re.sub(r"\[.*\]", "", requirement).partition(">=")
        needed[name] = version or "any that fits torch"
    assert {name: told.get(name) for name in needed} == needed


def test_formats() -> None:
    reader = ROOT / "swincompress_pl/accel/csrc/artifact/reader.cpp"
    newest = re.search(r"kVersionMax = (\d+)", reader.read_text("utf-8"))
    assert newest
    assert f"| artifact | 1, 2 or {newest[1]} | all |" in TEXT
    assert f"| integer specification | {NORM_VERSIONS[-1]} with named outputs, else {NORM_VERSIONS[0]} |" in TEXT
    assert f"| compression record in checkpoints | {RECORD_VERSION} |" in TEXT
    assert f"| report record | {record.RECORD_VERSION} |" in TEXT


def test_cmake() -> None:
    found = re.search(r"cmake_minimum_required\(VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert found
    assert f"CMake {found[1]}" in TEXT
