"""The fenced blocks of README.md and of the pages in docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_OPENING = re.compile(r'^( *)(```+)([\w+-]*)(?: title="([^"]+)")?\s*$')
_MARK = re.compile(r"^\s*<!--\s*(not run|run|output)(?::\s*(.+?))?\s*-->\s*$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. page: from the root; line: of its first line of text, from 1; title: the file that it is.

    mark: "not run", "run" or "output", as the comment on the line before says; reason: what stands behind the colon.
    """

    page: str
    line: int
    language: str
    title: str | None
    mark: str | None
    reason: str | None
    text: str

    @property
    def place(self) -> str:
        """Page and line, as an editor takes them."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and every page of docs/."""
    return ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page in order."""
    return list(_blocks(page, (ROOT / page).read_text(encoding="utf-8").splitlines()))


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in pages() for block in blocks_of(page) if block.language in languages]


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        opening = _OPENING.match(lines[number])
        if opening is None:
            number += 1
            continue
        indent, fence, language, title = opening.groups()
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == fence), None)
        if end is None:
            raise ValueError(f"{page}:{number + 1}: the block is not closed")
        mark = _MARK.match(lines[number - 1]) if number else None
        yield Block(
            page=page,
            line=number + 2,
            language=language,
            title=title,
            mark=None if mark is None else mark[1],
            reason=None if mark is None else mark[2],
            text="".join(f"{line.removeprefix(indent)}\n" for line in lines[number + 1 : end]),
        )
        number = end + 1
