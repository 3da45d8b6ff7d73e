"""The benchmark of spiking networks in integers, on tiny networks and random images."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.benchmark_cases import run_here, tiny_place
from support.spiking_cases import FAMILIES

from benchmarks.primesvt import baselines, subjects
from benchmarks.spiking import __main__ as main
from benchmarks.spiking import accuracy, exact, report, speed, steps
from swincompress_pl.models import create_model
from swincompress_pl.models.spiking.memory import without_memory
from swincompress_pl.report.environment import installed_version


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.runner, "run", run_here)


def command(text: str, out: Path) -> int:
    """Runs `python -m benchmarks.spiking` with the words of `text` here."""
    return main.main([*text.split(), "--out", str(out), "--commit", "abc"])


def page_of(kept: Path) -> str:
    """The tables of what a report keeps."""
    return "\n\n".join(report.sections(json.loads(kept.read_text(encoding="utf-8"))))


def test_every_builder_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BUILDERS", {"tiny": 32})
    monkeypatch.setattr(exact, "create_model", lambda name, T: without_memory(FAMILIES["qkformer"](T=T)))  # noqa: N803
    exactly = "exact --models tiny --steps 1,2 --batches 1,2"
    assert command(exactly, tmp_path) == 0
    found = json.loads((tmp_path / "exact-tiny-2.json").read_text())
    assert found["differ"] == 0
    assert found["neurons"] > found["silent_neurons"]
    written = (tmp_path / "exact-tiny-1.json").stat().st_mtime_ns
    assert command(exactly, tmp_path) == 0
    assert (tmp_path / "exact-tiny-1.json").stat().st_mtime_ns == written, "what there is is not made again"
    text = page_of(report.write(tmp_path, tmp_path / "results"))
    assert "| tiny" in text


def counting(name: str) -> Any:
    return create_model("ESpikeFormer", num_classes=5, embed_dims=[8, 8, 16, 16], depths=[1] * 5, num_heads=2)


def test_networks_of_counts_are_compared_in_both_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exact, main):
        monkeypatch.setattr(module, "COUNTING", ("tiny",))
    monkeypatch.setattr(exact, "BUILDERS", {"tiny": 32})
    monkeypatch.setattr(exact, "create_model", counting)
    assert command("exact --models tiny --batches 1", tmp_path) == 0
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert set(found) == {"exact-tiny-1", "exact-tiny-4"}, "two steps are no reading"
    one, four = found["exact-tiny-1"], found["exact-tiny-4"]
    assert one["differ"] == four["differ"] == 0
    assert one["neurons"] == four["neurons"] > 0
    assert one["spike_rate_percent"] == four["spike_rate_percent"] > 0
    assert four["operations"] > one["operations"]
    with pytest.raises(ValueError, match="tiny: steps=2; its neurons count to 4, so choose that or 1"):
        exact.program_of(exact.quantized("tiny", 1), "tiny", 2)


@pytest.mark.filterwarnings("ignore:.* neurons never spike")
def test_steps_of_training_are_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny_place(tmp_path, monkeypatch)
    baselines.train(subjects.SUBJECTS["maxformer"], place, tmp_path / "checkpoints", "abc")
    monkeypatch.setattr(steps, "SUBJECTS", subjects.SUBJECTS)
    monkeypatch.setattr(steps, "_ROUNDS", 2)
    stepped: list[str] = []
    whole = steps._step
    monkeypatch.setattr(
        steps, "_step", lambda network, *rest: (stepped.append(type(network).__name__), whole(network, *rest))
    )
    found = steps.measure("maxformer", place, threads=1)
    assert {name: stepped.count(name) for name in stepped} == {"MaxFormer": 5, "QuantizedNetwork": 5}
    assert [len(each["samples_ms"]) for each in found["step_ms"].values()] == [2, 2]
    assert found["times_float"]["median"] > 0


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BUILDERS", {"tiny": 32})
    monkeypatch.setattr(exact, "create_model", lambda name, T: without_memory(FAMILIES["spikformer"](T=T)))  # noqa: N803
    whole = exact.run_operation

    def wrong(op: Any, *rest: Any) -> Any:
        result = whole(op, *rest)
        return 1 - result if op.kind == "lif" else result

    monkeypatch.setattr(exact, "run_operation", wrong)
    assert exact.compare("tiny", 1, [1])["differ"] > 0


@pytest.mark.slow
def test_the_engine_races_with_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(_: str, T: int) -> Any:  # noqa: N803
        size = {"img_size_h": 32, "img_size_w": 32, "patch_size": 4}
        return create_model("Spikformer", T=T, embed_dims=64, num_heads=2, depths=1, **size)

    for module in (exact, speed):
        monkeypatch.setattr(module, "BUILDERS", {"tiny": 32})
    monkeypatch.setattr(exact, "create_model", tiny)
    racing = "speed --models tiny --steps 2 --thread-counts 1 --rounds 1 --turn-ms 1"
    assert command(racing, tmp_path) == 0
    found = json.loads((tmp_path / "speed-tiny-2.json").read_text())
    assert found["dense"]["equal"]
    assert found["pruned"]["equal"]
    assert found["pruned"]["parameters"] <= (1 - 0.2668) * found["dense"]["parameters"]
    assert found["pruned"]["macs"] < found["dense"]["macs"]
    assert found["dense"]["sops"] > 0
    (race,) = found["races"]
    measured = {result["name"] for result in race["results"] if result["latency"] is not None}
    assert measured >= {"engine", "engine, pruned", "torch fp32"}
    assert ("onnxruntime fp32" in measured) == all(map(installed_version, ("onnxruntime", "onnx", "onnxscript")))
    assert sum(race["shares"].values()) == pytest.approx(1)
    text = page_of(report.write(tmp_path, tmp_path / "results"))
    assert "| tiny, T = 2, 1 thread(s) |" in text
    assert "## Speed of pruned networks" in text


def test_controls_are_those_of_the_pruning_benchmark(tmp_path: Path) -> None:
    """Of the same weights; a fine-tuned row without one has nothing to stand against."""

    def test_set(right: list[int]) -> dict[str, Any]:
        packed = base64.b64encode(np.packbits(np.array(right, bool)).tobytes()).decode()
        return {"images": len(right), "correct": sum(right), "percent": 100 * sum(right) / len(right), "right": packed}

    def keep(folder: str, name: str, found: dict[str, Any]) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(found))

    given, row, control = test_set([1, 0, 0, 0]), test_set([1, 0, 1, 0]), test_set([1, 1, 0, 1])
    entry = {"network": "sdt", "bits": "W8A8", "tuned": True, "weights": "a", "commit": "abc", "file_bytes": 1000}
    entry["epochs"] = 2
    keep("out", "sdt-W8A8-tuned", entry | {"float": {"test": given}, "integer": {"test": row}})
    tuned = {"commit": "abc", "epochs": 2, "test": control}
    found = {"job": {"subject": "sdt"}, "seed": 0, "weights": "a", "given": {"test": given}, "tuned": tuned}
    with pytest.raises(ValueError, match="sdt: no control was fine-tuned from weights a"):
        report.write(tmp_path / "out", tmp_path / "results")
    keep("controls", "sdt-control", found | {"weights": "b"})
    with pytest.raises(ValueError, match="sdt: no control was fine-tuned from weights a"):
        report.write(tmp_path / "out", tmp_path / "results", tmp_path / "controls")
    keep("controls", "sdt-control", found)
    kept = report.write(tmp_path / "out", tmp_path / "results", tmp_path / "controls")
    rows = json.loads(kept.read_text())
    assert rows["sdt-W8A8-tuned"]["against"] == 75.0
    assert rows["sdt-W8A8-tuned"]["paired"] == [2, 1]
    assert "+25.00 (2 / 1)" in page_of(kept)
    assert rows["sdt-float-tuned"]["integer"]["test"]["percent"] == 75.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* neurons never spike")
def test_accuracy_before_and_after_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny_place(tmp_path, monkeypatch)
    baselines.train(subjects.SUBJECTS["maxformer"], place, tmp_path / "checkpoints", "abc")
    monkeypatch.setattr(accuracy, "SUBJECTS", subjects.SUBJECTS)
    out = tmp_path / "out"
    measuring = f"accuracy --models maxformer --data {tmp_path} --cache {tmp_path}"
    for options in ("--bits W8A8", "--bits W4A8 --rounding second_order", "--bits float,W4A8 --tuned"):
        assert command(f"{measuring} {options}", out) == 0
    with pytest.raises(SystemExit, match="--rounding learned goes with networks that are not trained"):
        command(f"{measuring} --tuned --rounding learned", out)
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    expected = {"maxformer-W8A8", "maxformer-W4A8-second_order", "maxformer-float-tuned", "maxformer-W4A8-tuned"}
    assert set(found) == expected
    assert found["maxformer-W4A8-tuned"]["file_bytes"] < found["maxformer-W8A8"]["file_bytes"]
    report.write(out, tmp_path / "results")
    kept = json.loads((tmp_path / "results" / "spiking.json").read_text())
    assert kept["maxformer-W4A8-tuned"]["against"] == found["maxformer-float-tuned"]["integer"]["test"]["percent"]
    assert "right" not in kept["maxformer-W8A8"]["integer"]["test"]
    assert "\n".join(report.sections(kept)).count("| maxformer") == 4
