"""The page that the rows make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = """# Coverage

Published names of timm, torchvision and transformers, with random weights and fewer blocks where they are large. A
quarter of the units of every group is removed, and what is left is quantized (`method="max"`), exported and run.
[Families](families.md) says what holds in general.

    python -m benchmarks.coverage

writes this page.

- **equal**: the engine's integers are the reference's, to the bit, on 2 images.
- **correlation**: of the engine's answers with those of the pruned float network, over 8 images of noise. It is no
  accuracy.
- **centered**: the same for what differs between the images, without the mean of each answer over them. **varying** is
  the share of that part in the answers (of their squares). Images of noise look alike to a network with random weights,
  so where the share is small, little is left to compare.
- **refused**: the network has no integers. `quantize` says so first, before it calibrates or searches. The words stand
  under the table.
"""


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page, as Markdown."""
    refused = [row for row in rows if "refused" in row]
    correlations = [row["correlation"] for row in rows if "correlation" in row]
    equal = sum(row.get("equal", False) for row in rows)
    lines = [
        _INTRODUCTION,
        f"Of {len(rows)} rows {len(correlations)} have integers, {equal} of them equal; the lowest correlation is "
        f"{min(correlations, default=0):.4f}. {len(refused)} are refused.",
        "",
        "| library | name | changed | class | pruned | parameters left | equal | correlation | centered | varying |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row, refused) for row in rows),
        "",
        "## Refusals",
        "",
        *(f"{number}. `{row['name']}`: {_escaped(row['refused'])}" for number, row in enumerate(refused, 1)),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any], refused: Sequence[Mapping[str, Any]]) -> str:
    left = f"{row['left'] / row['parameters']:.0%}" if "left" in row else ""
    if "refused" in row:
        number = next(number for number, other in enumerate(refused, 1) if other is row)
        result = f"refused ({number}) | | | "
    else:
        figures = f"{row['correlation']:.4f} | {row['centered']:.4f} | {row['varying']:.0%}"
        result = f"{'yes' if row['equal'] else 'NO'} | {figures}"
    kinds = ", ".join(row.get("kinds", [])) or "none"
    changed = f"`{row['changed']}`" if row["changed"] else ""
    return f"| {row['library']} | `{row['name']}` | {changed} | {row.get('class', '')} | {kinds} | {left} | {result} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
