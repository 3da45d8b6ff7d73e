"""The parser of each command, which is caught when the command wants to parse with it."""

from __future__ import annotations

import argparse
from typing import Any

import jsonargparse
import pytest

from swincompress_pl import cli

LIGHTNING = ("fit", "validate", "test")


class Caught(Exception):  # noqa: N818  # nothing is wrong
    """A command's parser."""


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parser of a command."""

    def parse(self: Any, *_: Any, **__: Any) -> None:
        raise Caught(self)

    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        monkeypatch.setattr(parser, "parse_args", parse)
    monkeypatch.setattr("sys.argv", ["swincompress"])
    with pytest.raises(Caught) as caught:
        cli.main(["--debug", command])
    (parser,) = caught.value.args
    return parser._subcommands_action._name_parser_map[command] if command in LIGHTNING else parser
