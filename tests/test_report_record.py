"""The record of a run survives its file, and its report says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.report_cases import full_record, search_data

from swincompress_pl import files
from swincompress_pl.report import (
    Accuracy,
    PruningStep,
    RecordError,
    RunRecord,
    describe_environment,
    render_report,
    write_report,
)
from swincompress_pl.report.plots import layers

PNG = b"\x89PNG\r\n\x1a\n"


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
        "report.html",
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

    monkeypatch.setattr(files.os, "replace", killed)
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
        round=2, target="g", kind="mlp", units_before=8, units_after=4, score=91.5, accepted=True, parameters=10,
        size_bytes=40, macs=20, images=64, exact=False,
    )  # fmt: skip
    assert PruningStep.of(step) == PruningStep(
        group="g", units_before=8, units_after=4, accepted=True, kind="mlp", round=2, accuracy_percent=91.5,
        parameters=10, macs=20, images=64, exact=False,
    )  # fmt: skip


def test_a_record_with_a_search_survives_its_file(tmp_path: Path) -> None:
    record = RunRecord(name="x")
    record.add_pruning(search_data(), tolerance=2)
    record.save(tmp_path / "report.json")
    loaded = RunRecord.load(tmp_path)
    assert loaded == record
    assert loaded.pruning is not None
    assert loaded.pruning["tolerance"] == 2.0
    assert [step.accepted for step in loaded.all_steps()] == [True, True, False, True, False]


def test_a_report_with_a_search_has_its_plots_and_steps(tmp_path: Path) -> None:
    record = RunRecord(name="x")
    record.add_pruning(search_data(), tolerance=2.0)
    path = write_report(record, tmp_path)
    text = path.read_text(encoding="utf-8")
    for name in ("sparsity", "accuracy_size", "sensitivity"):
        assert (tmp_path / f"pruning_{name}.png").read_bytes().startswith(PNG)
        assert f"(pruning_{name}.png)" in text
    for expected in (
        "75.00 -> 73.50 points, 2 may be lost",
        "1,000 for 5 decisions, naively 5,000, 5.0 times fewer",
        "250, 20.0 times fewer",
        "4 of 5 steps; their scores are estimates",
        "5 steps, 3 of them kept",
        "| blocks.1.mlp",
        "the tolerance",
        "~ 74.50 %",
    ):
        assert expected in text


def test_a_record_takes_one_search() -> None:
    record = RunRecord(name="x")
    record.add_pruning(search_data())
    with pytest.raises(ValueError, match="'x' already has pruning steps"):
        record.add_pruning(search_data())


def test_a_search_of_another_version_is_refused_at_once_and_in_a_file(tmp_path: Path) -> None:
    record = RunRecord(name="x")
    with pytest.raises(ValueError, match="version 2 is expected, not 1"):
        record.add_pruning(search_data() | {"version": 1})
    assert record.pruning is None
    record.add_pruning(search_data())
    file = record.save(tmp_path / "report.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pruning": {"version": 1}}))
    with pytest.raises(RecordError, match="version 2 is expected, not 1"):
        RunRecord.load(tmp_path)


def test_what_cannot_be_drawn_replaces_nothing(tmp_path: Path) -> None:
    write_report(RunRecord(name="good"), tmp_path)
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(ValueError, match="version 2"):
        write_report(RunRecord(name="bad", pruning={"version": 7}), tmp_path)
    assert (tmp_path / "report.json").read_text() == before


def test_notes_are_shown_without_stages(tmp_path: Path) -> None:
    assert "- it failed" in write_report(RunRecord(name="x", notes=["it failed"]), tmp_path).read_text()


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
    assert layers.short(name) == short
