"""The report on a quantized network shows what its diagnosis says, in all three forms."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.diagnosis_cases import LABELS, quantized_and_images
from support.html_page import Page

from swincompress_pl.quant import diagnose
from swincompress_pl.report import RecordError, RunRecord, quantization_record, render_report, write_quantization_report
from swincompress_pl.report.content.quantization import quantization_sections
from swincompress_pl.report.diagnosis import read_diagnosis
from swincompress_pl.report.plots.draw import PLOTS
from swincompress_pl.report.plots.quantization import QUANTIZATION_TITLES, quantization_figures


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    quantized, images = quantized_and_images(bits="W4A8", method="searched")
    return diagnose(quantized, images, LABELS).to_dict()


@pytest.fixture(scope="module")
def folder(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantization_report(data, tmp_path_factory.mktemp("run"), data="16 random images").parent


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]  # type: ignore[attr-defined]


def test_the_report_shows_the_tables(data: dict[str, Any], folder: Path) -> None:
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    worst, error = data["costs"][0], data["errors"][0]
    for section in ("Quantization", "What each quantizer costs", "Scales", "Bits per layer", "Paired predictions"):
        assert f"## {section}" in markdown
    assert f"**costliest alone**: {worst['name']}" in markdown
    assert f" {worst['alone']['kl']:.3g} |" in markdown
    assert f"{error['used_codes']:,} of {error['codes']:,}" in markdown
    assert "10 layers: 8 at 4 bits, 2 at 8 bits." in markdown
    assert f"{data['integer']['agreement_percent']:.2f} % same predictions of 16" in markdown
    assert "Accuracy is measured on 16 random images." in markdown
    tables = [section.table for section in quantization_sections(data) if section.table is not None]
    rows = [row[0] for table in tables for row in table.rows if row[0].startswith("blocks.1.mlp.fc1")]
    assert len(rows) == 5  # output and weight in costs and scales, the layer in bits
    assert all(f"| {name} " in markdown for name in rows)
    for name, title in QUANTIZATION_TITLES.items():
        assert f"![{title}]({name}.png)" in markdown
        assert (folder / f"{name}.png").stat().st_size > 0


def test_the_page_is_whole(data: dict[str, Any], folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == len(QUANTIZATION_TITLES) + 1  # and the accuracies
    assert page.tags.count("details") == 2  # costs and scales; the few layers stand open
    assert "http" not in text
    assert len(page.ids) == len(set(page.ids))
    assert f'<div class="value">{data["integer"]["agreement_percent"]:.2f} %</div>' in text
    assert "same predictions as float, W4A8" in text


def test_the_record_comes_back_and_renders_again(data: dict[str, Any], folder: Path) -> None:
    record = RunRecord.load(folder)
    assert record.quantization == json.loads(json.dumps(data))
    before = (folder / "report.html").read_text(encoding="utf-8")
    render_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_a_run_may_have_a_quantized_network_among_others(data: dict[str, Any]) -> None:
    record = RunRecord(name="x")
    assert "quantization" not in record.to_dict()
    record.add_quantization(data)
    assert RunRecord.from_dict(record.to_dict()) == record
    with pytest.raises(ValueError, match="already has a quantized network"):
        record.add_quantization(data)


def test_the_plots_hold_the_figures(data: dict[str, Any]) -> None:
    figures = quantization_figures(data)
    assert list(figures) == list(QUANTIZATION_TITLES)
    assert set(QUANTIZATION_TITLES.items()) <= set(PLOTS.items())
    bars = [patch.get_width() for patch in figures["quantization_bits"].axes[0].patches]
    assert bars == [layer["bits"] for layer in data["layers"]]
    bars = [patch.get_width() for patch in figures["quantization_costs"].axes[0].patches]
    np.testing.assert_allclose(bars[: len(data["costs"])], [1000 * cost["alone"]["kl"] for cost in data["costs"]])
    legend = figures["quantization_costs"].axes[0].get_legend()
    assert legend is not None
    assert len({handle.get_facecolor() for handle in legend.get_patches()}) == 2
    ax = figures["quantization_histograms"].axes[0]
    clips = sorted(float(line.get_xdata()[0]) for line in ax.lines)  # type: ignore[index]
    assert clips == [data["histograms"][0]["clip_low"], data["histograms"][0]["clip_high"]]
    assert "block 1, MLP fc1 (weight)" in texts(figures["quantization_error"])
    (clip,) = [line for line in figures["quantization_ranges"].axes[0].lines if line.get_linestyle() == "--"]
    assert list(clip.get_xdata()) == [1, 1]


def test_large_networks_show_their_worst(data: dict[str, Any]) -> None:
    many = copy.deepcopy(data)
    many["errors"] = [
        data["errors"][3] | {"name": f"b{n}", "snr_db": 50.0 - n % 50, "clip_to_max": 1.0 + n} for n in range(90)
    ]
    many["costs"] = [data["costs"][0] | {"name": f"b{n}"} for n in range(90)]
    figures = quantization_figures(many)
    labels = [label.get_text() for label in figures["quantization_error"].axes[0].get_yticklabels()]
    noisiest = sorted(many["errors"], key=lambda error: error["snr_db"])[:60]
    assert "b0" not in [error["name"] for error in noisiest]
    assert labels == [f"{error['name']} (weight)" for error in many["errors"] if error in noisiest]  # in its order
    assert "Signal to noise, input to logits (the 60 of most noise of 90)" in texts(figures["quantization_error"])
    assert "b89 (weight)" not in texts(figures["quantization_ranges"])  # the least clipped
    assert len(figures["quantization_costs"].axes[0].texts) == 30
    assert len(quantization_sections(many)[1].table.rows) == 90  # type: ignore[union-attr]


def test_a_diagnosis_without_costs_labels_and_integers(tmp_path: Path) -> None:
    quantized, images = quantized_and_images(method="affine")
    path = write_quantization_report(diagnose(quantized, images, costs=False, histograms=0), tmp_path / "run")
    markdown = path.read_text(encoding="utf-8")
    assert "What each quantizer costs" not in markdown
    assert "integers against float" not in markdown
    assert "the float simulation of them" in markdown
    names = {file.stem for file in path.parent.glob("*.png")}
    assert names == {"quantization_error", "quantization_ranges", "quantization_bits"}
    record = quantization_record(diagnose(quantized, images, LABELS, costs=False))
    assert [stage.name for stage in record.stages] == ["float", "simulation"]


def test_names_are_escaped(data: dict[str, Any], tmp_path: Path) -> None:
    evil = "<script>1</script>"
    small = data | {"errors": data["errors"][:8], "costs": data["costs"][:8], "histograms": data["histograms"][:1]}
    spoilt = json.loads(json.dumps(small).replace("blocks.0.", evil))
    write_quantization_report(spoilt, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert any(evil in words for words in page.words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1 is expected, not 2"),
        ({"images": 0}, "on 0 images"),
        ({"errors": [{"name": "x"}]}, "incomplete or ill-typed"),
        ({"simulated": None}, "incomplete or ill-typed"),
    ],
)
def test_bad_data_is_refused(data: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_quantization_report(data | change, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    record = RunRecord(name="x").to_dict() | {"quantization": data | change}
    with pytest.raises(RecordError, match=message):
        RunRecord.from_dict(record)


def test_bad_histograms_and_costs_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"histogram of .* is empty"):
        read_diagnosis(data | {"histograms": [data["histograms"][0] | {"counts": [0, 0]}]})
    cost = copy.deepcopy(data["costs"][0])
    cost["alone"]["kl"] = float("nan")
    with pytest.raises(ValueError, match=r"cost of .* is not a finite number"):
        read_diagnosis(data | {"costs": [cost]})
    with pytest.raises(ValueError, match="not 'list'"):
        read_diagnosis([])  # type: ignore[arg-type]
