"""docs/gallery: the pages are drawn from the committed records, and each record is one of the runs."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from timm.models import VisionTransformer

from benchmarks.gallery.pages import GALLERY, render, shoot
from benchmarks.gallery.runs import RUNS
from swincompress_pl import accel, quantize
from swincompress_pl.report import RunRecord
from swincompress_pl.report.stages import TestImages, measure_run

# The version that drew the committed plots stands in those of the results.
SAME_MATPLOTLIB = f"Matplotlib v{matplotlib.__version__}," in (GALLERY.parent / "assets/headline-light.svg").read_text(
    "utf-8"
)
HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}


def test_every_run_has_its_record_and_pictures() -> None:
    assert {record.stem for record in GALLERY.glob("*.json")} == set(RUNS)
    pictures = {f"{name}-{scheme}.png" for name in RUNS for scheme in ("light", "dark")}
    assert {picture.name for picture in GALLERY.glob("*.png")} == pictures
    index = (GALLERY / "index.md").read_text(encoding="utf-8")
    assert all(f"({name}.html)" in index for name in RUNS)
    assert all(picture in index for picture in pictures)


@pytest.mark.parametrize("name", RUNS)
def test_a_record_passed_its_checks(name: str) -> None:
    record = RunRecord.load(GALLERY / f"{name}.json")
    assert [stage.name for stage in record.stages] == ["float", "pruned", "quantized", "engine"]
    assert record.checks
    assert all(check.passed for check in record.checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_committed_page_is_that_of_the_record(name: str, tmp_path: Path) -> None:
    shutil.copy(GALLERY / f"{name}.json", tmp_path)
    (page,) = render(tmp_path)
    ours, theirs = page.read_text(encoding="utf-8"), (GALLERY / page.name).read_text(encoding="utf-8")
    assert len(ours) < 1_000_000, "small enough to be committed"
    if not SAME_MATPLOTLIB:  # another version may set its text otherwise
        ours, theirs = (re.sub("<svg.*?</svg>", "", each, flags=re.DOTALL) for each in (ours, theirs))
    assert ours == theirs, f"docs/gallery/{page.name}: run `python -m benchmarks.gallery render`"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_pictures_of_light_and_dark_differ(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "page.html").write_text('<meta name="color-scheme" content="light dark"><p>text', encoding="utf-8")
    light, dark = (Image.open(picture).convert("L") for picture in shoot(tmp_path, "chromium"))
    assert light.size == dark.size == (640, 400)
    assert np.asarray(light).mean() > 200 > 55 > np.asarray(dark).mean()


def test_a_run_is_measured_at_every_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8)
    labels = np.arange(70) % 3
    test = TestImages.of(
        [(pixels[:50], labels[:50]), (pixels[50:], labels[50:])],
        lambda batch: (batch.movedim(-1, 1).float() / 255 - 0.5) / 0.25,
    )
    assert test.inputs(60, 99).shape == (10, 3, 16, 16)
    pruned = copy.deepcopy(network)
    quantized = quantize(copy.deepcopy(pruned), [test.inputs(0, 32)], method="max", preprocessing=HALF).eval()
    artifact = accel.export(quantized, tmp_path / "model.safetensors")
    record = RunRecord(name="a run")
    measure_run(
        record, test, networks={"float": network, "pruned": pruned}, quantized=quantized, artifact=artifact,
        threads=1, checked_images=5,
    )  # fmt: skip
    assert [stage.name for stage in record.stages] == ["float", "pruned", "quantized", "engine"]
    assert record.stages[2].accuracy == record.stages[3].accuracy
    right = int((network(test.inputs(0, 70)).argmax(1).numpy() == labels).sum())
    accuracy = record.stages[0].accuracy
    assert accuracy is not None
    assert (accuracy.correct, accuracy.images) == (right, 70)
    assert [(check.passed, check.detail) for check in record.checks] == [(True, "5 test images")] * 2
    assert RunRecord.from_dict(record.to_dict()) == record
