"""Long messages of jsonargparse become the one line that tells what is wrong."""

from __future__ import annotations

import textwrap

import pytest

from swincompress_pl.cli.messages import short

HEAD = "Does not validate against any of the Union subtypes\nSubtypes: [<class 'A'>, <class 'NoneType'>]\nErrors:\n"
TAIL = "\nGiven value type: <class 'str'>\nGiven value: abc"
NONE = "\n  - Expected a <class 'NoneType'>"


def union(*errors: str) -> str:
    """A message as jsonargparse words it."""
    return HEAD + "\n".join(f"  - {textwrap.indent(error, '    ').strip()}" for error in errors) + NONE + TAIL


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("holdout is 0; give 1 or more", "holdout is 0; give 1 or more"),
        (union("nope: the folder is missing"), "nope: the folder is missing"),
        (union("Expected a <class 'int'>"), "Expected a <class 'int'>; the value is abc"),
        (union("rate is 2", "rate is 2"), "rate is 2"),
        (union("rate is 2", "size is 3"), "rate is 2; or size is 3"),
        (union(union("rate is 2")), "rate is 2"),
        (union("rate is 2", "Not a valid subclass of Callback\nSubclass types expect one of:\n- a str"), "rate is 2"),
        ("Parser key \"data\":\n" + textwrap.indent(union("root is required"), "  "), "data: root is required"),
        ("Parser key \"data\":\n" + textwrap.indent(union("no root"), "  ") + "\nSee.", "data: no root See."),
        (
            'Parser key "model":\n\n  - Expected a path but a.B either not accessible or invalid\n  - '
            + textwrap.indent(union("Problem with given class_path 'a.B':\n  no B"), "  ").lstrip(),
            "model: a.B: no B",
        ),
    ],
)  # fmt: skip
def test_a_message_is_short(message: str, expected: str) -> None:
    assert " ".join(short(message).split()) == expected


def test_a_long_value_is_cut() -> None:
    message = union("Expected a <class 'int'>").replace("Given value: abc", f"Given value: {'x' * 1000}")
    assert len(short(message)) < 300
