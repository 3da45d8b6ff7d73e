"""docs/reference/cli.md: every command, with exactly the options and defaults that its parser has."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from support.parsers import parser_of

from swincompress_pl import cli

PAGE = Path(__file__).resolve().parent.parent / "docs/reference/cli.md"


def section(command: str) -> str:
    found = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no section {command}"
    return found[1]


def default_of(action: argparse.Action) -> str:
    if action.required:
        return "required"
    default = action.default
    if default is False and action.nargs == 0:
        return "off"
    if default is None or default == "" or default == argparse.SUPPRESS:
        return "-"
    if hasattr(default, "class_path"):
        default = default.class_path.rpartition(".")[2]
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_options_and_defaults_are_the_parsers(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line.split(" | ") for line in section(command).splitlines() if re.match(r"\| `", line)]
    told = {row[0].removeprefix("| "): row[1] for row in rows}
    actions = [
        action
        for action in parser_of(command, monkeypatch)._actions
        if action.dest != "help" and not any(option.startswith("--trainer.") for option in action.option_strings)
    ]
    there = {
        ", ".join(f"`{n}`" for n in action.option_strings or [action.dest]): default_of(action) for action in actions
    }
    assert told == there
    assert f"swincompress {command}" in section(command)


def test_all_commands_are_listed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE) == list(cli.COMMANDS)
