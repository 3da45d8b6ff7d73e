"""The benchmark of the engine against other runtimes, on tiny networks and few rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks.engine import __main__ as main
from benchmarks.engine import batches, measure, report, shares
from swincompress_pl import accel, models
from swincompress_pl.report.comparison import compare, worker

COMMITTED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "sapphire_rapids"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 7}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = models.create_model

    def create(name: str) -> Any:
        network = whole(name, **TINY)
        network.pretrained_cfg["input_size"] = (3, 32, 32)
        return network

    monkeypatch.setattr(models, "create_model", create)


def run(output: Path, *arguments: str) -> int:
    settings = ("--threads", "1", "--rounds", "1", "--turn-ms", "1", "--images-checked", "1", "--output", str(output))
    return main.main([*settings, *arguments])


@pytest.mark.slow
def test_all_models_and_batches_in_one_command(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, models_ = measure.prepare, ("vit_tiny_patch16_224", "deit_tiny_patch16_224")

    def with_one_that_fails(*args: Any, batch: int, **options: Any) -> Any:
        broken = compare.Runner(name="broken", runtime="engine", threads=1, batch=batch, image_shape=(1,), file="gone")
        with_torch = batch == 2 and options["origin"]["network"]["name"] == models_[0]  # its process starts slowly
        found = prepare(*args, batch=batch, **options)
        return {threads: [broken, *(peers if with_torch else [])] for threads, peers in found.items()}

    monkeypatch.setattr(measure, "prepare", with_one_that_fails)
    assert run(tmp_path, "--model", ",".join(models_), "--batch", "1,2", "--against", "torch") == 0
    for model, batch in ((model, batch) for model in models_ for batch in (1, 2)):
        figures = json.loads((tmp_path / f"engine-{model}-b{batch}.json").read_text())
        engine, broken, *others = figures["races"][0]["results"]
        assert figures["batch"] == engine["latency"]["batch"] == batch
        assert engine["load_ms"] > 0
        assert engine["file_bytes"] == figures["file_bytes"]
        assert (broken["latency"], broken["load_ms"], broken["agreement"]) == (None, None, None)
        assert broken["unavailable"] in (tmp_path / f"engine-{model}-b{batch}.md").read_text()
        for torch_fp32 in others:
            state = models.create_model(model).state_dict()
            assert torch_fp32["file_bytes"] == sum(value.nbytes for value in state.values())
            assert torch_fp32["agreement"]["images"] == batch
            assert torch_fp32["agreement"]["correlation"] > 0.99, "the same weights and images"
        assert len(others) == (1 if (model, batch) == (models_[0], 2) else 0)
    overview = (tmp_path / "engine.md").read_text()
    assert "- deit_tiny_patch16_224, batch 2, broken: " in overview
    assert "## Agreement" in overview
    assert "not measured" in (tmp_path / "engine.svg").read_text()
    assert "engine-vit_tiny_patch16_224-b2.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", " ,"], "--model is ' ,'"),
        (["--batch", "0"], "--batch is '0'"),
        (["--threads", "x"], "--threads is 'x'"),
        (["--against", "tensorrt"], "unknown runtime 'tensorrt'"),
    ],
)
def test_bad_arguments_come_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "export_random", lambda *_: pytest.fail("it went to work"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_results_without_the_newer_figures_are_shown(tmp_path: Path) -> None:
    for file in COMMITTED.glob("engine-*.json"):
        figures = json.loads(file.read_text())
        for one in (each for entry in figures["races"] for each in entry["results"]):
            for key in ("load_ms", "file_bytes", "agreement"):
                one.pop(key, None)
        assert "their answers do not" in report.page(figures)
        (tmp_path / file.name).write_text(json.dumps(figures))
    paths = report.write(tmp_path)
    text, picture = (path.read_text() for path in paths)
    rows = [line for line in text.splitlines() if line.startswith("| deit_tiny_patch16_224 ")]
    assert any(line.rstrip(" |").endswith("-") for line in rows)
    assert "## Agreement" not in text
    ElementTree.fromstring(picture)
    assert len(picture) < 25_000 * len(list(tmp_path.glob("engine-*.json"))), "small enough to be committed"
    assert "openvino int8 (nncf)" in picture


def test_the_overview_does_not_depend_on_the_folders_order(tmp_path: Path) -> None:
    races = [json.loads(file.read_text()) for file in sorted(COMMITTED.glob("engine-*.json"))]
    for name, figures in zip("cba", races, strict=False):
        (tmp_path / f"engine-{name}.json").write_text(json.dumps(figures))
    report.write(tmp_path)
    rows = [line.split("|")[1:3] for line in (tmp_path / "engine.md").read_text().splitlines() if "_224  " in line]
    first = rows[: len(rows) // 4]
    assert first == sorted(first)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no engine-"):
        report.write(tmp_path)


def test_agreement_is_of_centred_logits() -> None:
    ours = np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]], dtype=np.float32)
    found = measure.agreement(ours, ours * 2 + 100)
    assert found is not None
    assert found["correlation"] == pytest.approx(1)
    assert (found["same_top1"], found["images"]) == (2, 2)
    reversed_ = measure.agreement(ours, np.stack([ours[0], -ours[1]]))
    assert reversed_ is not None
    assert reversed_["correlation"] == pytest.approx(-1)
    assert reversed_["same_top1"] == 1


@pytest.mark.parametrize("theirs", [np.full((1, 3), np.nan), np.zeros((1, 4))])
def test_agreement_of_what_cannot_be_compared(theirs: np.ndarray[Any, Any]) -> None:
    assert measure.agreement(np.ones((1, 3), dtype=np.float32), theirs.astype(np.float32)) is None


def test_constant_logits_have_no_correlation() -> None:
    found = measure.agreement(np.ones((1, 3), dtype=np.float32), np.ones((1, 3), dtype=np.float32))
    assert found == {"correlation": None, "same_top1": 1, "images": 1}


def test_the_peers_draw_the_weights_that_were_quantized(tiny: None, tmp_path: Path) -> None:
    program = measure.export_random("vit_tiny_patch16_224", tmp_path / "model.safetensors")
    assert program.origin is not None
    torch.manual_seed(worker.SEED)
    expected = models.create_model("vit_tiny_patch16_224").state_dict()
    torch.manual_seed(worker.SEED)
    drawn = models.rebuild(program.origin).state_dict()
    assert all(torch.equal(drawn[name], value) for name, value in expected.items())


def test_openvinos_file_is_both_its_files(tmp_path: Path) -> None:
    (tmp_path / "network.xml").write_bytes(b"x" * 3)
    (tmp_path / "network.bin").write_bytes(b"x" * 5)
    (tmp_path / "network.onnx").write_bytes(b"x" * 7)
    assert worker._file_bytes(str(tmp_path / "network.xml")) == 8
    assert worker._file_bytes(str(tmp_path / "network.onnx")) == 7


def test_images_alone_against_a_batch(tiny: None, tmp_path: Path) -> None:
    settings = ("--model", "vit_tiny_patch16_224", "--batch", "3", "--threads", "1,2", "--rounds", "2")
    assert batches.main([*settings, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "batches.json").read_text(encoding="utf-8"))["rows"]
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        pairs = zip(row["batch"]["samples_ms"], row["alone"]["samples_ms"], strict=True)
        assert row["ratio"] == pytest.approx(np.median([together / alone for together, alone in pairs]))
    assert (tmp_path / "batches.md").read_text(encoding="utf-8").count("yes |") == 2


def test_shares_of_the_peak(tiny: None, tmp_path: Path) -> None:
    names = accel.implementations()[:2]
    arguments = ("--model", "deit_tiny_patch16_224", "--rounds", "2", "--repeats", "1", "--threads", "1,2")
    assert shares.main([*arguments, "--implementation", ",".join(names), "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "shares.json").read_text())
    assert [(row["implementation"], row["threads"]) for row in figures["rows"]] == [
        (name, threads) for name in names for threads in (1, 2)
    ]
    for row in figures["rows"]:
        assert row["equal"]
        assert len(row["samples_ms"]) == 2
        assert {"linear", "attention", "layer_norm"} <= set(row["kinds"])
        assert sum(kind["macs"] for kind in row["kinds"].values()) == row["macs"]
        assert 0 < shares.share(row, "attention") < 1
        assert row["macs"] / row["median_ms"] / 1e6 == pytest.approx(shares.share(row) * row["peak_gmacs_per_second"])
    text = (tmp_path / "shares.md").read_text()
    assert all(name in text for name in names)
    assert "are equal" in text


def test_another_commit_joins_in(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkouts = []

    def noted(runners: Any, **_: Any) -> Any:
        checkouts.extend((runner.name, runner.checkout, runner.implementation) for runner in runners)
        return [compare.Result(name=runner.name) for runner in runners]

    monkeypatch.setattr(measure, "compare", noted)
    monkeypatch.setattr(measure, "ratios_to", lambda *_: {})
    with pytest.raises(ValueError, match=r"--before is .*; it must be a checkout with swincompress_pl/accel/_core"):
        run(tmp_path, "--before", str(tmp_path))
    before = tmp_path / "before"
    (before / "swincompress_pl" / "accel").mkdir(parents=True)
    (before / "swincompress_pl" / "accel" / "_core.abi3.so").touch()
    arguments = ("--model", "deit_tiny_patch16_224", "--against", "", "--implementation", "scalar")
    assert run(tmp_path, *arguments, "--before", str(before)) == 0
    assert checkouts == [("engine", None, "scalar"), ("engine before", before, "scalar")]


def test_agreement_is_with_the_float_network_too() -> None:
    logits = {"engine": [1.0, 2.0, 4.0], "torch fp32": [1.0, 2.0, 3.0], "other": [3.0, 1.0, 2.0]}
    results = [compare.Result(name=name, logits=np.array([row], np.float32)) for name, row in logits.items()]
    found = {result.name: measure._agreement(results[1], result) for result in results}
    assert found["torch fp32"] is None
    assert found["other"] is not None
    assert found["engine"] is not None
    assert found["other"]["correlation"] == pytest.approx(-0.5)
    assert found["engine"]["correlation"] > 0.98
