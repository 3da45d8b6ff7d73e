"""The pages in a real browser: no table is cut, on a wide and on a narrow screen, in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.report_cases import full_record, search_data

from benchmarks.gallery.browser import SCHEMES, evaluate, find_browser, screenshot
from benchmarks.gallery.pages import GALLERY
from swincompress_pl.report import RunRecord, TrainingEpoch
from swincompress_pl.report.write import write_html

BROWSER = find_browser() or ""
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium")
WIDE, NARROW = (1280, 900), (400, 800)

# What is cut, with all folded tables open: anything outside a scroll area that reaches beyond the window, any cell of a
# table that does, and any text that reaches out of its cell.
MEASURE = """() => {
  document.querySelectorAll('details').forEach(each => each.open = true);
  const width = window.innerWidth, beyond = [], cells = [...document.querySelectorAll('th, td')];
  const seen = cells.filter(each => each.getClientRects().length);
  for (const each of document.querySelectorAll('main, main *:not(.scroll *)'))
    if (each.getBoundingClientRect().right > width) beyond.push(each.tagName + ' ' + each.textContent.slice(0, 40));
  for (const cell of seen)
    if (cell.getBoundingClientRect().right > width || cell.scrollWidth > cell.clientWidth + 1)
      beyond.push('cell ' + cell.textContent);
  const shown = query => [...document.querySelectorAll(query)].map(each => getComputedStyle(each).display !== 'none');
  const svg = [...document.querySelectorAll('figure svg')];
  return {
    width, beyond, cells: seen.length, page: document.documentElement.scrollWidth,
    scale: Math.min(1, ...svg.map(each => each.getBoundingClientRect().width / parseFloat(each.style.width))),
    labels: seen.filter(each => getComputedStyle(each, '::before').content.includes('"')).length,
    onDark: shown('.on-dark'), onLight: shown('.on-light'), hint: shown('.hint'),
  };
}"""


def measured(page: Path, scheme: str, size: tuple[int, int]) -> dict[str, Any]:
    """What a browser shows of a page; nothing may be cut."""
    found: dict[str, Any] = evaluate(page, MEASURE, scheme, size, BROWSER)
    assert found["width"] == size[0]
    assert found["beyond"] == []
    assert found["page"] <= size[0]
    assert found["cells"] > 0
    assert found["scale"] > 0.84, "plots scroll before their text is too small"
    narrow = size == NARROW
    assert (found["labels"] > 0) is narrow, "on a narrow screen each figure stands behind its column's title"
    assert found["hint"] == [narrow]
    assert set(found["onDark"]) <= {scheme == "dark"}
    assert set(found["onLight"]) <= {scheme == "light"}
    return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a record with one of everything."""
    record = full_record()
    record.steps.clear()
    record.add_pruning(search_data())
    record.training = [
        TrainingEpoch(
            epoch=n, train_loss=3.0 - n, val_loss=2.0, accuracy_percent=50.0 + n, changes=("pruned",) * (n == 1)
        )
        for n in range(3)
    ]
    record.add_check("a check with a name that is so long that it must be broken on any screen " * 2, True)
    return write_html(record, tmp_path_factory.mktemp("fresh") / "report.html")


def test_nothing_of_a_fresh_report_is_cut(fresh: Path) -> None:
    assert measured(fresh, "light", WIDE)["onLight"]  # the heat map has a picture for each scheme
    assert measured(fresh, "dark", NARROW)["onDark"]


def test_a_table_that_is_cut_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<body><main><table><tr><td style='min-width: 900px'>x</td></tr></table></main></body>", "utf-8")
    assert "cell x" in evaluate(page, MEASURE, "light", NARROW, BROWSER)["beyond"]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(GALLERY.glob("*.html")), ids=lambda page: page.stem)
def test_nothing_of_the_gallery_is_cut(page: Path) -> None:
    measured(page, "light", WIDE)
    measured(page, "dark", NARROW)


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_pictures_of_a_fresh_report(fresh: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    brightness = {}
    for scheme in SCHEMES:
        picture = tmp_path / f"{size[0]}-{scheme}.png"
        screenshot(fresh, picture, scheme, (size[0], 3000), BROWSER)
        print(picture)
        with Image.open(picture) as image:
            assert image.size == (size[0], 3000)
            brightness[scheme] = np.asarray(image.convert("L")).mean()
    assert brightness["light"] > 200 > 80 > brightness["dark"]


def test_a_record_of_a_gallery_is_drawn_for_the_dark() -> None:
    text = (GALLERY / "deit_tiny.html").read_text(encoding="utf-8")
    assert text.count('class="on-dark"') == text.count('class="on-light"') > 0
    assert RunRecord.load(GALLERY / "deit_tiny.json").pruning is not None
