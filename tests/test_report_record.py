"""The record of a run survives its file, and its report says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swincompress_pl.report import (
    Accuracy,
    Latency,
    LayerSparsity,
    OperationTime,
    PairedComparison,
    PruningStep,
    RecordError,
    RunRecord,
    Size,
    describe_environment,
    plots,
    render_report,
    write_report,
)
from swincompress_pl.report import record as record_module

PNG = b"\x89PNG\r\n\x1a\n"


def full_record() -> RunRecord:
    record = RunRecord(name="a run", environment=describe_environment(threads=1), data="6 images")
    for name, share in (("float", 1.0), ("pruned", 0.6), ("engine", 0.15)):
        record.add_stage(
            name,
            parameters=1_000_000,
            macs=int(5e6 * share),
            size=Size(nonzero_bytes=10, indexed_bytes=12, index="1 by 1-bit mask", file_bytes=int(4e6 * share)),
            accuracy=Accuracy(correct=5, images=6),
            latency_ms={"torch": Latency(samples_ms=(1.0, 1.5, 2.0), threads=1)},
        )
    record.steps.append(
        PruningStep(
            group="blocks.0.mlp", units_before=96, units_after=88, accepted=True, accuracy_percent=90.0, macs=4_000_000
        )
    )
    record.steps.append(
        PruningStep(
            group="blocks.0.attn", units_before=3, units_after=2, accepted=False, accuracy_percent=80.0, macs=4_000_000
        )
    )
    record.layers.append(LayerSparsity(name="blocks.0.fc1", weights_before=100, nonzeros_after=60))
    record.operations.append(OperationTime(name="blocks.0.fc1", kind="linear", time_ms=0.5, macs=10**6, size_bytes=100))
    record.add_comparison(
        "engine against float",
        PairedComparison(both_right=4, right_to_wrong=1, wrong_to_right=1, both_wrong=0, same_predictions=4),
    )
    record.add_check("engine equals reference", True, "6 of 6 images")
    record.notes.append("a note")
    return record


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = full_record()
    record.save(tmp_path / "report.json")
    loaded = RunRecord.load(tmp_path)
    assert loaded == record
    assert loaded.to_dict() == record.to_dict()


def test_a_report_has_its_files(tmp_path: Path) -> None:
    path = write_report(full_record(), tmp_path / "run")
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == [
        "accuracy_size.png",
        "before_after.png",
        "latency.png",
        "report.json",
        "report.md",
        "sparsity.png",
    ]
    assert all(file.read_bytes().startswith(PNG) for file in path.parent.glob("*.png"))
    text = path.read_text(encoding="utf-8")
    for expected in (
        "600.0 kB (15.0 %)",
        "83.33 %",
        "n = 6",
        "1 right -> wrong",
        "passed: engine equals reference",
        "latency in torch (batch 1, 1 thread)",
        "96 -> 88",
        "undone",
        "40.0 %",
        "a note",
        "![Before and after](before_after.png)",
    ):
        assert expected in text


def test_rendering_again_gives_the_same_text(tmp_path: Path) -> None:
    path = write_report(full_record(), tmp_path)
    before = path.read_text(encoding="utf-8")
    path.unlink()
    assert render_report(tmp_path).read_text(encoding="utf-8") == before


def test_an_empty_record_renders(tmp_path: Path) -> None:
    path = write_report(RunRecord(name="nothing yet"), tmp_path)
    assert path.read_text(encoding="utf-8") == "# nothing yet\n"
    assert not list(tmp_path.glob("*.png"))


def test_plots_of_an_earlier_record_go(tmp_path: Path) -> None:
    write_report(full_record(), tmp_path)
    write_report(RunRecord(name="nothing yet"), tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_a_stage_that_was_not_measured_shows_as_such(tmp_path: Path) -> None:
    record = RunRecord(name="bare")
    record.add_stage("float", parameters=10)
    record.add_stage("engine", accuracy=Accuracy(correct=1, images=2))
    text = write_report(record, tmp_path).read_text(encoding="utf-8")
    assert "| parameters" in text
    assert "bytes" not in text


def test_a_failed_check_is_loud(tmp_path: Path) -> None:
    record = RunRecord(name="x")
    record.add_check("engine equals reference", False)
    assert "**FAILED**: engine equals reference" in write_report(record, tmp_path).read_text(encoding="utf-8")


def test_a_stages_name_is_its_own() -> None:
    record = RunRecord(name="x")
    record.add_stage("float")
    with pytest.raises(ValueError, match="'float' is already in the record of 'x'"):
        record.add_stage("float")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record_version": 9}, "version 1 is expected, not 9"),
        ({"extra": 1}, "unknown entries 'extra'"),
        ({"stages": [{"name": "float"}]}, "incomplete or ill-typed"),
        ({"layers": [{"name": "a", "sparseness": 1}]}, "incomplete or ill-typed"),
        ({"stages": 3}, "incomplete or ill-typed"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = full_record().save(tmp_path / "report.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RecordError, match=message) as caught:
        RunRecord.load(tmp_path)
    assert str(file) in str(caught.value)


def test_a_truncated_record_is_named(tmp_path: Path) -> None:
    file = full_record().save(tmp_path / "report.json")
    file.write_text(file.read_text()[:100])
    with pytest.raises(RecordError, match=r"report\.json"):
        RunRecord.load(tmp_path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no record of a run"):
        RunRecord.load(tmp_path)


def test_a_report_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="this is a file"):
        write_report(RunRecord(name="x"), tmp_path / "file")


def test_an_interrupted_save_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = full_record().save(tmp_path / "report.json")
    before = file.read_text()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunRecord(name="new").save(file)
    assert file.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_the_environment_names_packages_and_no_paths() -> None:
    environment = describe_environment(threads=3)
    assert environment["threads"] == 3
    assert "numpy" in environment["packages"]
    assert environment["cores"] >= 1
    text = json.dumps(environment)
    assert str(Path.home()) not in text or Path.home() == Path("/")


def test_a_searchs_step_becomes_a_records_step() -> None:
    from swincompress_pl.pruning import Step

    step = Step(
        round=2, group="g", kind="mlp", units_before=8, units_after=4, score=91.5, accepted=True, parameters=10, macs=20
    )
    assert PruningStep.of(step) == PruningStep(
        group="g", units_before=8, units_after=4, accepted=True, kind="mlp", round=2, accuracy_percent=91.5,
        parameters=10, macs=20,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("head", "head"),
        ("blocks.0.mlp.fc1+blocks.0.mlp.act", "blocks.0.mlp.fc1+act"),
        ("blocks.0.mlp.fc2+blocks.0.add2", "blocks.0.mlp.fc2+add2"),
        ("a+a", "a+a"),
    ],
)
def test_joined_operations_have_short_labels(name: str, short: str) -> None:
    assert plots._short(name) == short
