"""The gallery's pages and pictures, made of the committed records."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from swincompress_pl.report import RunRecord
from swincompress_pl.report.write import write_html

from .browser import SCHEMES, screenshot

GALLERY = Path(__file__).resolve().parents[2] / "docs" / "gallery"
_SHOT = (1280, 800)
_PICTURE_WIDTH = 640


def render(folder: Path = GALLERY, names: Sequence[str] | None = None) -> list[Path]:
    """Writes the page of each record in `folder`, or of those that are named."""
    records = sorted(folder.glob("*.json")) if names is None else [folder / f"{name}.json" for name in names]
    return [write_html(RunRecord.load(record), record.with_suffix(".html")) for record in records]


def shoot(folder: Path, browser: str) -> list[Path]:
    """Takes a picture of the top of every page, light and dark."""
    return [
        _picture(page, page.with_name(f"{page.stem}-{scheme}.png"), scheme, browser)
        for page in sorted(folder.glob("*.html"))
        for scheme in sorted(SCHEMES, reverse=True)
    ]


def _picture(page: Path, target: Path, scheme: str, browser: str) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "shot.png"
        screenshot(page, shot, scheme, _SHOT, browser)
        with Image.open(shot) as image:
            height = _SHOT[1] * _PICTURE_WIDTH // _SHOT[0]
            image.convert("RGB").resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS).quantize(64).save(
                target, optimize=True
            )
    return target
