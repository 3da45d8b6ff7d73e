"""Modules x compressions x loaders x what is done with the result: right to the image, or refused by name.

Quick: every value of a factor is in some cell. Slow: all cells, which have to be those of the committed
table; `python tests/test_callbacks_matrix.py docs/reference/matrix.md` writes it.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.matrix_cases import ACTIONS, COMPRESSIONS, FORMS, MODULES, Cell

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's, about few workers and short epochs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FACTORS: tuple[Sequence[str], ...] = (tuple(MODULES), COMPRESSIONS, FORMS, ACTIONS)
TABLE = Path(__file__).parents[1] / "docs" / "reference" / "matrix.md"


# The factors' lengths differ, so that the same values do not meet again and again.
CELLS = [tuple(values[number % len(values)] for values in FACTORS) for number in range(max(map(len, FACTORS)))]


def test_every_value_is_in_a_cell() -> None:
    assert [set(values) for values in zip(*CELLS, strict=True)] == [set(values) for values in FACTORS]


@pytest.mark.parametrize(("module", "compression", "form", "action"), CELLS)
def test_each_value(tmp_path: Path, module: str, compression: str, form: str, action: str) -> None:
    assert Cell(module, compression, form, tmp_path).check(action) == expected(compression, action)


def expected(compression: str, action: str) -> str:
    floats = compression in ("structured", "weights")
    return "refused: not quantized" if floats and action == "export" else "right"


@pytest.mark.slow
def test_the_full_product_is_the_committed_table() -> None:
    assert table() == TABLE.read_text()


def table() -> str:
    """Markdown: a row for each module, compression and loader, a column for each action."""
    lines = [
        "# Every module, loader and compression",
        "",
        "Written by `python tests/test_callbacks_matrix.py docs/reference/matrix.md`. *right*: the trainer",
        "validated, image for image, what the network answers without the module, or the engine on raw pixels",
        "where there are integers. What networks that are not quantized cannot do is refused by name.",
        "",
        f"| module | compression | loader | {' | '.join(ACTIONS)} |",
        "|---" * (3 + len(ACTIONS)) + "|",
    ]
    return "\n".join([*lines, *rows()]) + "\n"


def rows() -> Iterator[str]:
    for module, compression, form in itertools.product(*FACTORS[:3]):
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(module, compression, form, Path(folder))
            found = [cell.check(action) for action in ACTIONS]
        yield f"| {module} | {compression} | {form} | {' | '.join(found)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table())
