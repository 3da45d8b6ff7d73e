"""The quantization benchmark on a tiny network and random images: from the job to the report."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import runner
from benchmarks.pruning import batches, images, subjects
from benchmarks.quantization import __main__ as main
from benchmarks.quantization import jobs, report, work
from benchmarks.quantization.jobs import Job
from benchmarks.runner import chosen
from swincompress_pl.data import Preprocessing
from swincompress_pl.models import create_model

ARGUMENTS = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}


def random_splits(*_: Any, holdout: int, seed: int, **__: Any) -> images.Splits:
    rng = np.random.default_rng(seed)

    def some(count: int) -> images.Images:
        return images.Images(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), rng.integers(0, 4, count))

    return images.Splits(some(30), some(holdout), some(70))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> subjects.Place:
    """Where a tiny subject stands for swin_cifar10."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(create_model("SwinTransformer", num_classes=4, **ARGUMENTS).state_dict(), weights)
    where = subjects.Place(data=tmp_path, cache=tmp_path)
    recipe = subjects.Recipe(epochs=1, batch_size=8, lr=1e-3, weight_decay=0.0, holdout=20, max_rounds=1)
    found = subjects.Subject(
        name="swin_cifar10", recipe=recipe, seed=0, place=where, model="SwinTransformer", classes=4,
        arguments=ARGUMENTS, weights=weights, preprocessing=Preprocessing(height=16, width=16), data_set="cifar10",
        augment=batches.pad_crop_flip, test_data="random images",
    )  # fmt: skip
    monkeypatch.setattr(subjects, "load_splits", random_splits)
    monkeypatch.setattr(work, "load_splits", random_splits)
    monkeypatch.setattr(
        work, "subject", lambda *given: replace(found, recipe=recipe.changed(given[3] or {}) if given[3:] else recipe)
    )
    monkeypatch.setitem(work.RECIPES, "swin_cifar10", {"epochs": 1, "distillation": 0.5})
    monkeypatch.setitem(jobs.WAYS, "searched", {"method": "searched", "search": {"rows": 32}})
    return where


def page_of(kept: Path) -> str:
    """The tables of what a report keeps."""
    return "\n\n".join(report.sections(json.loads(kept.read_text(encoding="utf-8"))))


@pytest.mark.slow
def test_from_the_job_to_the_report(place: subjects.Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    some = [Job(network="swin_cifar10"), Job(network="swin_cifar10", pruned=True)]
    some += [
        Job(network="swin_cifar10", way=way, bits=bits) for way, bits in (("affine", "W8A8"), ("searched", "W4A8"))
    ]
    some += [Job(network="swin_cifar10", pruned=True, way="max", bits="W6A6")]
    for job in some:
        work.do(job, out, place)
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    assert found.keys() == {job.name for job in some}
    pruned, whole = found["swin_cifar10-pruned-float"], found["swin_cifar10-whole-float"]
    assert whole["nonzero"] > pruned["nonzero"]  # and the second job read what the first one had pruned
    narrow = found["swin_cifar10-pruned-W6A6-max"]
    assert narrow["equal"] == {"images": 64, "twin == reference": True}
    assert "8-bit activations" in narrow["engine"]
    searched = found["swin_cifar10-whole-W4A8-searched"]
    assert searched["equal"]["engine == reference"]
    assert searched["compressed_file_bytes"] < searched["file_bytes"]
    kept_file = report.write(out, tmp_path)
    page = page_of(kept_file)
    assert "70 images of `test`" in page
    assert page.count(" yes |") == 2
    assert "simulated" in page
    kept = json.loads(kept_file.read_text())["swin_cifar10-whole-float"]["sets"]["test"]
    assert "classes" not in kept
    assert kept["paired"]["same_predictions"] == 70
    for file in out.glob("*.json"):
        file.unlink()
    assert page_of(report.write(out, tmp_path)) == page  # rows stay where their results are no longer at hand
    work.do(some[-1], out, place)
    with pytest.raises(ValueError, match="the results of swin_cifar10-pruned-float, which it is paired with"):
        report.write(out, tmp_path)


@pytest.mark.slow
def test_after_fine_tuning_the_integers_stand_against_a_float_control(place: subjects.Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    some = [Job(network="swin_cifar10"), Job(network="swin_cifar10", pruned=True)]
    some += [Job(network="swin_cifar10", pruned=True, tuned=True)]
    some += [Job(network="swin_cifar10", pruned=True, tuned=True, way="searched", bits="W4A8")]
    for job in some:
        work.do(job, out, place)
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    given, control = found["swin_cifar10-pruned-float"], found["swin_cifar10-pruned-float-tuned"]
    assert control["recipe"]["epochs"] == 1
    zeros = [entry["parameters"] - entry["nonzero"] for entry in (given, control)]
    assert zeros[1] > zeros[0] / 2 > 0  # masks are kept; biases that began as 0 move
    assert found["swin_cifar10-pruned-W4A8-searched-tuned"]["equal"]["engine == reference"]
    page = page_of(report.write(out, tmp_path))
    assert "After 1 epochs of fine-tuning with distillation" in page


def test_what_is_reported_was_not_calibrated_on(place: subjects.Place) -> None:
    given = work.material("deit_tiny", False, place)
    batches = work.calibration_batches(given, crops=0)
    calibration = given.subject.preprocessing
    pixels = torch.cat(batches) * torch.tensor(calibration.std)[:, None, None]
    pixels = ((pixels + torch.tensor(calibration.mean)[:, None, None]) * 255).round().to(torch.uint8)
    seen = {image.permute(1, 2, 0).numpy().tobytes() for image in pixels}
    assert len(seen) == len(pixels) == 50  # all there are of 30 + 20
    cropped = torch.cat(work.calibration_batches(given, crops=2))
    assert cropped.shape == (150, 3, 16, 16)
    assert torch.equal(cropped[:50], torch.cat(batches))
    assert not torch.equal(cropped[50:100], cropped[100:])
    assert not seen & {image.tobytes() for images in given.sets.values() for image in images.pixels}


def test_costs_are_written_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = create_model("VisionTransformer", img_size=224, patch_size=56, embed_dim=16, depth=1, num_heads=2)
    monkeypatch.setattr(main, "create_model", lambda _: tiny)
    monkeypatch.setattr(sys, "argv", ["benchmarks.quantization", "cost", "--model", "tiny", "--out", str(tmp_path)])
    main.main()
    entry = json.loads((tmp_path / "cost-tiny.json").read_text())
    assert [len(seconds) for seconds in entry["validation"].values()] == [7, 7]
    page = page_of(report.write(tmp_path, tmp_path))
    assert page.count("| tiny ") == 1


def test_names_are_unique_and_filters_are_checked() -> None:
    names = [job.name for job in jobs.all_jobs()]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="'nothing' matches no job"):
        chosen(jobs.all_jobs(), ["nothing"])


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no results"):
        report.write(tmp_path, tmp_path / "other")


STUB = """
def do(job, folder, place):
    print("at work in", place)
    if job.pruned:
        raise ValueError("it cannot be pruned")
    (folder / f"{job.name}.json").write_text('{"figure": 1}')
"""


def test_a_job_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stub_of_work.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))  # type: ignore[no-untyped-call]
    some = [Job(network="swin_cifar10", pruned=pruned) for pruned in (True, False)]
    out = tmp_path / "out"
    outcome = runner.run(some, out, {"place": "Paris"}, work="stub_of_work", parallel=1, budget_s=60)
    assert (outcome.failed, outcome.done) == ([some[0].name], [some[1].name])
    assert "FAILED swin_cifar10-pruned-float" in (printed := capsys.readouterr().out)
    assert "it cannot be pruned" in printed
    assert (out / "logs" / f"{some[0].name}.log").read_text().startswith("at work in Paris")
    assert runner.pack(out, tmp_path / "all.jsonl") == 1
    assert runner.unpack(tmp_path / "all.jsonl", tmp_path / "other") == 1
    assert json.loads((tmp_path / "other" / f"{some[1].name}.json").read_text()) == {"figure": 1}


def test_a_job_may_go_on_with_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`to_do` says so; one that then fails has failed, though a file is there, and spawned processes do the same."""
    (tmp_path / "stub_of_more.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))  # type: ignore[no-untyped-call]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    some = [Job(network="swin_cifar10", pruned=pruned) for pruned in (True, False)]
    out = tmp_path / "out"
    out.mkdir()
    for job in some:
        (out / f"{job.name}.json").write_text("{}")
    settings: Any = {"work": "stub_of_more", "start_method": "spawn"}
    assert runner.run(some, out, {"place": "Rome"}, **settings) == runner.Outcome()
    outcome = runner.run(some, out, {"place": "Rome"}, to_do=lambda job: True, **settings)
    assert (outcome.failed, outcome.done) == ([some[0].name], [some[1].name])
    assert runner.read_result(out, some[1].name) == {"figure": 1}


def test_the_report_names_the_gpu(place: subjects.Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work.do(Job(network="swin_cifar10"), out, place, commit="abc")
    file = out / "swin_cifar10-whole-float.json"
    entry = json.loads(file.read_text())
    assert entry["environment"]["commit"] == "abc"
    assert ", GPU X, torch" not in page_of(report.write(out, tmp_path))
    file.write_text(json.dumps(entry | {"place": {"device": "GPU X", "precision": "32-true"}}))
    assert "threads, GPU X, torch" in page_of(report.write(out, tmp_path))


def test_the_help_says_what_the_data_folder_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["benchmarks.quantization", "run", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    shown = capsys.readouterr().out
    assert subjects.DATA_HELP in shown
    assert subjects.CACHE_HELP in shown


def test_the_help_names_every_file_of_the_data_folder() -> None:
    how_to = (Path(__file__).resolve().parent.parent / "docs/how-to/repeat_a_figure.md").read_text("utf-8")
    table = how_to.partition("| file in `DATA` |")[2].partition("\n\n")[0]
    named = {row.split("|")[1] for row in table.splitlines()[2:]}
    files = {word for cell in named for word in re.findall(r"`([\w.]+/?)`", cell)}
    assert len(files) == 7
    assert all(file in subjects.DATA_HELP for file in files)
