"""The documentation builds without a warning, and README says no figure that the results do not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--clean"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the site is made of; the build writes beside it."""
    pytest.importorskip("zensical")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_the_site_builds_strictly(sources: Path) -> None:
    result = build(sources)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {page.relative_to(sources / "docs").with_suffix("") for page in (sources / "docs").rglob("*.md")}
    built = {page.parent.relative_to(sources / "site") for page in (sources / "site").rglob("index.html")}
    assert {page.parent if page.name == "index" else page for page in pages} == built
    assert "AdaptiveIterativePruning" in (sources / "site/reference/api/callbacks/index.html").read_text("utf-8")


@pytest.mark.parametrize(("link", "builds"), [("here.md", True), ("nowhere.md", False)])
def test_a_link_to_nowhere_fails_the_build(tmp_path: Path, link: str, builds: bool) -> None:
    """With the settings of the site, but with two pages."""
    pytest.importorskip("zensical")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(
        settings + "\nnav:\n  - Start: index.md\n  - Here: here.md\n", encoding="utf-8"
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/here.md").write_text("# Here\n", encoding="utf-8")
    (tmp_path / "docs/index.md").write_text(f"# Start\n\n[there]({link})\n", encoding="utf-8")
    assert (build(tmp_path).returncode == 0) == builds


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/-]+\.md", navigation))


def test_headline_figures_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    bullets = re.findall(r"^- \*\*(?:Fast|Accurate|Small)\.\*\*.*?(?=^- |^$)", readme, re.MULTILINE | re.DOTALL)
    assert len(bullets) == 3
    results = " ".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/results").glob("*.md"))
    figures = [figure for bullet in bullets for figure in re.findall(r"\d+\.\d+(?= (?:times|%|points))", bullet)]
    assert len(figures) >= 10
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results)] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
