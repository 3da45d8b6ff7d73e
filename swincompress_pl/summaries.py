"""How a result shows itself: a few lines in a terminal, a small table in a notebook, and never thousands of indices."""

from __future__ import annotations

from html import escape

from swincompress_pl.printable import printable


class Summarized:
    """A result with a summary: `str(result)` is the summary, and a notebook shows it as a table."""

    def facts(self) -> list[tuple[str, str]]:
        """Returns what a person wants to know first, as pairs of a label and a text."""
        raise NotImplementedError

    def summary(self) -> str:
        """Returns the facts as lines of text, a label and its text in each."""
        facts = self.facts()
        width = max(len(label) for label, _ in facts)
        return "\n".join(f"{label:{width}}  {printable(text)}" for label, text in facts)

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in self.facts())
        return f"<table style='text-align: left'>{rows}</table>"


class Tabulated:
    """A result whose `str()` is a table for a terminal; a notebook shows it with aligned columns."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def removed(before: int, after: int) -> str:
    """A count before and after, such as 3,500,000 -> 1,900,000 (45.7 % removed)."""
    return f"{before:,} -> {after:,} ({100 * (1 - after / before):.1f} % removed)" if before else f"{after:,}"
