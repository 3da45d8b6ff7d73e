"""The record of a run survives its file, and its report says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.report_cases import full_record, search_data

from swincompress_pl import files
from swincompress_pl.accel.profile import ABOVE_THE_PEAK
from swincompress_pl.report import (
    Accuracy,
    OperationTime,
    PruningStep,
    RecordError,
    RunRecord,
    TrainingEpoch,
    describe_environment,
    render_report,
    write_report,
)
from swincompress_pl.report.content.names import readable
from swincompress_pl.report.content.parts import Table
from swincompress_pl.report.plots.drawing import style
from swincompress_pl.report.plots.training import training_curves

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


def test_a_report_has_both_parts_of_an_audited_search_and_the_optimism(tmp_path: Path) -> None:
    audit = {
        "round": 1, "images": 60, "tolerance": 2.0, "baseline_points": 76.0, "lost_points": 1.75,
        "deciding_lost_points": 0.5, "only_before": 2, "only_after": 1, "bound_points": 9.25, "confidence": 0.97,
        "given_back": 4, "look": 5,
    }  # fmt: skip
    record = RunRecord(name="x")
    record.add_pruning(
        search_data()
        | {"audits": [audit], "audit_before": ["answers"], "score_kind": "agreement", "first_answers": ["a"]}
    )
    assert record.pruning is not None
    assert not {"audit_before", "first_answers"} & record.pruning.keys()
    text = write_report(record, tmp_path).read_text(encoding="utf-8")
    for expected in (
        "Pruning audits", "1.75 points on 60 images that decided nothing, at most 9.25 with 97 % confidence",
        "0.50 points, optimism +1.25", "  1.75 |", " +1.25 |", "9.25 (97 %)", "2 / 1",
        "agreement on the hold-out", "at most 26.50 points on these images",
    ):  # fmt: skip
        assert expected in text
    plain = RunRecord(name="y")
    plain.add_pruning(search_data())
    assert "audit" not in write_report(plain, tmp_path).read_text(encoding="utf-8")


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
    ("name", "said"),
    [
        ("head", "head"),
        ("layers.1.blocks.0.mlp.fc1", "stage 2, block 1, MLP fc1"),
        ("blocks.0.mlp.fc1+blocks.0.mlp.act", "block 1, MLP fc1 + activation"),
        ("blocks.0.attn.proj+blocks.0.add1", "block 1, attention projection + residual 1"),
        ("blocks.0.attn.attention", "block 1, attention"),
        ("blocks.2.mlp.fc2.0", "block 3, MLP fc2"),
        ("blocks.0.mlp.fc1 (weight)", "block 1, MLP fc1 (weight)"),
        ("patch_embed.stages.0.conv_bn.block.2", "patch embedding, stage 1, convolution 2"),
        ("layers.1.downsample.norm", "stage 2, downsampling, norm"),
        ("blocks.0.add1+blocks.1.norm1", "block 1, residual 1 + block 2, norm 1"),
        ("a+a", "a + a"),
        ("a+", "a+"),
        ("<b>x</b>", "<b>x</b>"),
        ("layers.9999999.fc", "layers 9999999 fc"),
        ("__", "__"),
        ("", ""),
    ],
)
def test_layers_are_called_by_words(name: str, said: str) -> None:
    assert readable(name) == said


def test_a_column_without_figures_is_dropped(tmp_path: Path) -> None:
    table = Table.of(["a", "b", "c"], [["-", "-", "1"], ["-", "-", "-"]])
    assert table.header == ("a", "c")
    assert table.rows == (("-", "1"), ("-", "-"))
    assert Table.of(["a", "b"], []).header == ("a", "b")
    record = RunRecord(name="x", operations=[OperationTime(name="a", kind="gelu", time_ms=1.0)])
    text = write_report(record, tmp_path).read_text()
    assert "GMAC/s" not in text
    assert "GMAC/s" not in (tmp_path / "report.html").read_text()


def test_a_share_above_the_peak_is_explained(tmp_path: Path) -> None:
    record = RunRecord(name="x", operations=[OperationTime(name="a", kind="linear", time_ms=1.0, peak_share=1.25)])
    text = write_report(record, tmp_path).read_text()
    assert "125 %" in text
    assert ABOVE_THE_PEAK in text
    record.operations[0] = OperationTime(name="a", kind="linear", time_ms=1.0, peak_share=1.0)
    assert ABOVE_THE_PEAK not in write_report(record, tmp_path).read_text()


def test_epochs_are_kept_and_drawn(tmp_path: Path) -> None:
    record = full_record()
    assert "training" not in record.to_dict(), "as the records of earlier versions"
    record.training = [
        TrainingEpoch(epoch=0, train_loss=2.5, val_loss=2.0, accuracy_percent=40.0),
        TrainingEpoch(epoch=1, train_loss=2.0),
        TrainingEpoch(epoch=2, accuracy_percent=50.0, changes=("pruned",)),
        TrainingEpoch(epoch=3, accuracy_percent=45.0, changes=("quantized",)),
    ]
    text = write_report(record, tmp_path).read_text()
    assert RunRecord.load(tmp_path) == record
    for line in (
        "**pruned**: epoch 2",
        "**quantized**: epoch 3",
        "**best validation accuracy, before any change**: 40.00 % in epoch 0",
        "**best validation accuracy, quantized**: 45.00 % in epoch 3",
        "](training.png)",
    ):
        assert line in text
    with style():
        figure = training_curves(record.training)
    assert figure is not None
    assert [ax.get_title() or ax.get_title(loc="left") for ax in figure.axes] == ["Loss", "Validation accuracy, %"]
    lines = {str(line.get_label()): list(line.get_xdata()) for line in figure.axes[1].lines}  # type: ignore[arg-type]
    assert lines == {"validation accuracy": [0, 2, 3], "pruned": [1.5, 1.5], "quantized from here": [2.5, 2.5]}
    assert training_curves([TrainingEpoch(epoch=0)]) is None


@pytest.mark.parametrize("bad", [{"epoch": "0"}, {"epoch": 0, "changes": "pruned"}, {"epoch": 0, "loss": 1.0}, {}])
def test_an_epoch_of_another_kind_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r"training|epoch|loss"):
        RunRecord.from_dict(RunRecord(name="x").to_dict() | {"training": [bad]})
