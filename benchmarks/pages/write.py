"""Which pages there are, and their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from swincompress_pl.report.plain import write_text

from . import compensation, engine, headline, index, interop, primesvt, pruning, quantization, spiking
from .sources import Sources
from .theme import THEMES, Drawing, svg

RESULTS = Path(__file__).resolve().parent.parent / "results"
DOCS = RESULTS.parent.parent / "docs"
_Page = tuple[Callable[[Sources], str], Mapping[str, Drawing]]
PAGES: dict[str, _Page] = {
    "index": (index.page, {}),
    "engine": (engine.page, engine.DRAWINGS),
    "quantization": (quantization.page, quantization.DRAWINGS),
    "pruning": (pruning.page, pruning.DRAWINGS),
    "compensation": (compensation.page, compensation.DRAWINGS),
    "primesvt": (primesvt.page, primesvt.DRAWINGS),
    "spiking": (spiking.page, spiking.DRAWINGS),
    "interop": (interop.page, interop.DRAWINGS),
}


def write_pages(names: Iterable[str], results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Writes the pages `names` of PAGES with their plots into docs/results, and the overview, which quotes them all."""
    sources = Sources(results)
    files = []
    for name in dict.fromkeys([*names, "index"]):
        page, drawings = PAGES[name]
        files.append(write_text(docs / "results" / f"{name}.md", page(sources)))
        files += _write_drawings(drawings, sources, docs / "results")
    return files


def write_headline(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Writes the README's plot, light and dark, into docs/assets."""
    return _write_drawings(headline.DRAWINGS, Sources(results), docs / "assets")


def _write_drawings(drawings: Mapping[str, Drawing], sources: Sources, folder: Path) -> list[Path]:
    return [
        write_text(folder / f"{name}-{theme.name}.svg", svg(draw, sources, theme))
        for name, draw in drawings.items()
        for theme in THEMES
    ]
