"""docs/results and the README's plot are what `python -m benchmarks.pages` makes of the committed JSON."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from benchmarks.pages import DOCS, RESULTS, __main__, write_pages
from benchmarks.pages.races import by_time, on_threads, time_cell
from benchmarks.pages.sources import Sources, pick, result_of
from benchmarks.pages.text import cpu, details, document, picture, shifted
from benchmarks.pages.write import PAGES

XEON = "Intel(R) Xeon(R) Processor"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    docs = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks.pages", "--docs", str(docs)])
        __main__.main()
    return docs


def test_the_committed_pages_are_those_of_the_committed_figures(written: Path) -> None:
    pages = sorted(written.glob("results/*.md"))
    assert [page.stem for page in pages] == sorted(PAGES)
    for page in pages:
        assert page.read_bytes() == (DOCS / "results" / page.name).read_bytes(), (
            f"docs/results/{page.name} is not what the JSON says; run `python -m benchmarks.pages`"
        )


def test_the_committed_plots_are_those_of_the_committed_figures(written: Path) -> None:
    plots = sorted(path.relative_to(written) for path in written.rglob("*.svg"))
    committed = [path for folder in ("assets", "results") for path in (DOCS / folder).glob("*-*.svg")]
    assert set(plots) <= {path.relative_to(DOCS) for path in committed}
    for plot in plots:
        ours, theirs = (written / plot).read_text(encoding="utf-8"), (DOCS / plot).read_text(encoding="utf-8")
        assert (written / plot).stat().st_size < 40_000, "small enough to be committed"
        ElementTree.fromstring(ours)
        # Another version of matplotlib may set its text otherwise.
        if f"Matplotlib v{matplotlib.__version__}," in theirs:
            assert ours == theirs, f"docs/{plot} is not what the JSON says; run `python -m benchmarks.pages`"


def test_light_and_dark_show_the_same(written: Path) -> None:
    for light in written.rglob("*-light.svg"):
        dark = light.with_name(light.name.replace("-light", "-dark"))
        texts = [re.findall(r">([^<>]+)</text>", file.read_text(encoding="utf-8")) for file in (light, dark)]
        assert texts[0] == texts[1]
        assert light.read_bytes() != dark.read_bytes()
        assert "<dc:date>" not in light.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"index"}))
def test_a_page_begins_with_a_plot_and_links_files_that_are_there(name: str) -> None:
    text = (DOCS / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert re.match(r"# [^\n]+\n\n!\[[^]]+\]\([^)]+-light\.svg#gh-light-mode-only\)\n", text)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (DOCS / "results" / target).is_file(), target
    assert text.count("<details") == text.count("</details>")


def test_a_changed_figure_changes_page_and_plot(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    file = results / "sapphire_rapids" / "engine-swin_tiny_patch4_window7_224-b1.json"
    figures = json.loads(file.read_text(encoding="utf-8"))
    engine = on_threads(figures, 2)["results"][0]
    assert engine["name"] == "engine"
    engine["latency"]["median_ms"] = 12.345
    file.write_text(json.dumps(figures), encoding="utf-8")
    page, *plots, index = write_pages(["engine"], results, tmp_path / "docs")
    assert "| swincompress_pl               |          32.5 |          12.3 |" in page.read_text(encoding="utf-8")
    assert "Swin-T takes 12.3 ms." in index.read_text(encoding="utf-8")
    assert all("12.3" in plot.read_text(encoding="utf-8") for plot in plots if plot.name.startswith("engine-light"))


def test_missing_figures_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"quantization\.json is missing; pass the folder"):
        write_pages(["quantization"], tmp_path, tmp_path / "docs")
    (tmp_path / "quantization.json").write_text("{}")
    with pytest.raises(ValueError, match="the page quotes 'deit_tiny-whole-float', which the results lack"):
        write_pages(["quantization"], tmp_path, tmp_path / "docs")
    with pytest.raises(ValueError, match=r"no race of swin in batch 8; `python -m benchmarks\.engine --model swin`"):
        pick([], "swin", 8)
    with pytest.raises(ValueError, match="swin, batch 1: no race with 4"):
        on_threads({"races": [], "model": "swin", "batch": 1}, 4)
    assert Sources(tmp_path).races == []
    assert result_of({"a": 1}, "a") == 1


def test_runtimes_that_failed_stand_in_no_order() -> None:
    def result(name: str, ms: float | None) -> dict[str, Any]:
        return {"name": name, "latency": ms and {"median_ms": ms}}

    race: Mapping[str, Any] = {
        "results": [result("torch fp32", 9.0), result("broken", None), result("engine", 5.0), result("quick", 4.0)],
        "times_engine": {"torch fp32": {"median": 1.8}, "quick": {"median": 0.8}},
    }
    assert by_time(race) == ["engine", "quick", "torch fp32"], "the engine is first, also where another is quicker"
    assert [time_cell(race, name) for name in ("engine", "torch fp32", "broken")] == ["5.0", "9.0 (1.80x)", "-"]


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        (XEON, ["avx512_bf16"], "Intel Xeon (Sapphire Rapids, AVX-512 VNNI, no AMX)"),
        (XEON, ["avx512_bf16", "amx_int8"], "Intel Xeon (AVX-512 VNNI, AMX)"),
        ("AMD EPYC", ["avx512_bf16"], "AMD EPYC (Zen 4, AVX-512 VNNI, no AMX)"),
    ],
)
def test_a_cpu_by_its_flags(name: str, flags: list[str], expected: str) -> None:
    assert cpu({"cpu": name, "cpu_flags": [*flags, "avx512_vnni"]}) == expected


def test_a_cpu_without_vnni_does_not_get_it() -> None:
    assert cpu({"cpu": "Intel(R) Core", "cpu_flags": ["avx2"]}) == "Intel Core (no AVX-512 VNNI)"


def test_markdown_for_github_and_the_site() -> None:
    assert picture("a", "b").splitlines() == [
        "![b](a-light.svg#gh-light-mode-only)",
        "![b](a-dark.svg#gh-dark-mode-only)",
    ]
    assert details("t", ["x", "y"]).startswith('<details markdown="1">\n<summary>t</summary>\n\nx\n\ny\n')
    assert shifted(["## A", "b"]) == ["### A", "b"]
    assert document(["a", "b"]) == "a\n\nb\n"
