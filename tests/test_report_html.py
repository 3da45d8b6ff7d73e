"""The HTML page holds the figures of its record, needs nothing else, and shows names of any kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.html_page import Page
from support.report_cases import full_record, large_search_data, search_data

from swincompress_pl import files
from swincompress_pl.report import Accuracy, RunRecord, render_report, write_report
from swincompress_pl.report.write import write_html


def page_of(record: RunRecord, folder: Path) -> tuple[str, Page]:
    write_report(record, folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def searched() -> RunRecord:
    record = full_record()
    record.steps.clear()
    record.add_pruning(search_data(), tolerance=2.0)
    return record


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, Path]:
    """The page of a record with one of everything, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return *page_of(searched(), folder), folder


def test_the_page_holds_the_figures(whole: tuple[str, Page, Path]) -> None:
    text, page, _ = whole
    for expected in (
        "<b>600.0 kB</b> <i>(15.0 %)</i>",
        "<b>83.33 %</b> <i>[43.65, 96.99], n = 6</i>",
        "<b>750 k</b> <i>(15.0 %)</i>",
        "<b>1.5 ms</b> <i>[1.25, 1.75]</i>",
        "1 by 1-bit mask",
        "1 right -&gt; wrong",
        '<li class="good"><strong>passed</strong>: engine equals reference (6 of 6 images)',
        "75.00 -&gt; 73.50 points, 2 may be lost",
        "1,000 for 5 decisions, naively 5,000, 5.0 times fewer",
        '<td title="blocks.1.mlp">block 2, MLP</td>',
        '<td data-label="units">72 -&gt; 48</td>',
        '<td data-label="decision">undone</td>',
        '<td data-label="hold-out top-1">~ 74.50 %</td>',
        "a note",
    ):
        assert expected in text, expected
    assert page.tags.count("svg") == 7


def test_the_page_needs_nothing_else(whole: tuple[str, Page, Path]) -> None:
    text, page, _ = whole
    assert "http" not in text
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=\s]+", "", text)
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    used = set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_reads_in_the_dark(whole: tuple[str, Page, Path]) -> None:
    text, _, _ = whole
    assert "prefers-color-scheme: dark" in text
    used, (light, dark) = set(re.findall(r"var\((--\w+)\)", text)), re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert used == set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark))


@pytest.mark.parametrize("where", ["name", "stage", "target", "check", "note", "runtime"])
def test_names_are_escaped(tmp_path: Path, where: str) -> None:
    evil = '<script>alert("1")</script>&amp;'
    record = RunRecord(name=evil if where == "name" else "x")
    latency = full_record().stages[0].latency_ms["torch"]
    record.add_stage(
        evil if where == "stage" else "float",
        accuracy=Accuracy(correct=5, images=6),
        latency_ms={evil if where == "runtime" else "torch": latency},
    )
    if where == "target":
        record.add_pruning(json.loads(json.dumps(search_data()).replace("blocks.1.mlp", json.dumps(evil)[1:-1])))
    record.add_check(evil if where == "check" else "fine", True)
    record.notes.append(evil if where == "note" else "note")
    _, page = page_of(record, tmp_path)
    assert "script" not in page.tags
    assert any(evil in words for words in page.words)


def test_all_steps_are_in_the_page_folded(tmp_path: Path) -> None:
    record = RunRecord(name="x")
    record.add_pruning(large_search_data(40, 2) | {"baseline_prunable": 10**6})
    text, page = page_of(record, tmp_path)
    assert "All 80 rows" in text
    assert page.tags.count("details") == 2  # targets and steps
    assert text.count(">kept</td>") == 80
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("| kept") < 80
    assert "119 k of 1 M, 11.9 % removed" in text  # of the weights that could go


def test_a_failed_check_is_loud(tmp_path: Path) -> None:
    record = RunRecord(name="x")
    record.add_check("engine equals reference", False)
    assert '<li class="bad"><strong>FAILED</strong>: engine' in page_of(record, tmp_path)[0]


def test_an_empty_record_has_a_page(tmp_path: Path) -> None:
    text, page = page_of(RunRecord(name="nothing yet"), tmp_path)
    assert "<h1>nothing yet</h1>" in text
    assert "svg" not in page.tags


def test_rendering_again_gives_the_same_page(whole: tuple[str, Page, Path]) -> None:
    text, _, folder = whole
    render_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == text


def test_a_search_alone_has_a_page(tmp_path: Path) -> None:
    record = RunRecord(name="Pruning search")
    record.add_pruning(search_data())
    path = write_html(record, tmp_path / "new" / "pruning.html")
    text = path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["pruning.html"]
    assert '<div class="value">30.0 %</div>' in text  # 1000 -> 700 parameters
    assert '<div class="value">5.0x fewer</div>' in text


def test_an_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_html(RunRecord(name="old"), tmp_path / "page.html")
    before = path.read_text(encoding="utf-8")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_html(RunRecord(name="new"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
