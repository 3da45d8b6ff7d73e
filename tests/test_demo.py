"""The demo's road with a schedule of a few epochs: every stage is there and every check in its report passed."""

from __future__ import annotations

from pathlib import Path

import pytest

from swincompress_pl.demo import Schedule, run
from swincompress_pl.report import RunRecord


@pytest.mark.slow
@pytest.mark.parametrize("model", ["spikformer"])  # .ci/run runs the whole one of swin
def test_a_short_demo_reports_every_stage(tmp_path: Path, model: str) -> None:
    schedule = Schedule(float_epochs=4, quantize_epoch=2, epochs=4, target=0.2)
    report = run(tmp_path / "run", model=model, seed=0, threads=1, schedule=schedule)
    record = RunRecord.load(report.parent)
    assert [stage.name for stage in record.stages] == ["float", "pruned", "quantized", "engine"]
    assert record.checks
    assert all(check.passed for check in record.checks)
    stages = {stage.name: stage for stage in record.stages}
    assert stages["engine"].accuracy == stages["quantized"].accuracy
    assert "engine" in stages["engine"].latency_ms
    assert "torch fp32" in stages["float"].latency_ms
    before, after = stages["float"].size, stages["engine"].size
    assert before is not None
    assert after is not None
    assert after.file_bytes < 0.4 * before.file_bytes  # type: ignore[operator]
    assert (report.parent / "before_after.png").is_file()
    assert any("PrimeSVT" in note for note in record.notes) == (model == "spikformer")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is 'bert'; choose one of swin, spikformer"):
        run(tmp_path / "run", model="bert")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"float_epochs": 0}, {"quantize_epoch": 0}, {"quantize_epoch": 9, "epochs": 9}])
def test_contradictory_schedules_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="epochs="):
        Schedule(**options)
