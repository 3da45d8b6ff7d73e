"""A fit leaves a report, whatever can be measured of it, and goes on as it would without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from swincompress_pl.callbacks import AdaptiveIterativePruning, CompressedCheckpoint, QuantizationAwareTraining
from swincompress_pl.cli.train import CompressionCLI, command_line
from swincompress_pl.data import Digits
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.report import CompressionReport, RunRecord, TrainingCurves, fit_report

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}


def classifier() -> CompressibleClassifier:
    torch.manual_seed(0)
    return CompressibleClassifier("vit", num_classes=10, model_kwargs=dict(SIZES))


def compressing(folder: Path) -> list[Any]:
    """Prunes before epoch 1, quantizes before epoch 2."""
    return [
        AdaptiveIterativePruning(tolerance=90.0, start_epoch=1, step=0.25, max_rounds=1),
        QuantizationAwareTraining(start_epoch=2, method="max", calibration_images=16),
        CompressedCheckpoint(dirpath=folder, filename="best", monitor="val/top1", mode="max"),
    ]


def fit(
    folder: Path, callbacks: list[Any], *, module: Any = None, epochs: int = 3, ckpt: Any = None, **options: Any
) -> Any:
    module = module or classifier()
    settings = {"datamodule": Digits(batch_size=32)} if isinstance(module, CompressibleClassifier) else {}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=2,
        **options,
    )
    trainer.fit(module, **settings, ckpt_path=ckpt)
    return module


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("fitted")
    return folder, fit(folder, [CompressionReport(images=40, checked_images=2), *compressing(folder)])


def test_a_fit_leaves_a_report_beside_its_checkpoints(fitted: tuple[Path, nn.Module]) -> None:
    folder, _ = fitted
    record = RunRecord.load(folder)
    assert {"report.html", "report.md", "report.json", "training.png", "best.ckpt"} <= {
        f.name for f in folder.iterdir()
    }
    assert record.name == "Fit of VisionTransformer on Digits"
    assert record.data == "40 test images of Digits, evenly spaced"
    assert [stage.name for stage in record.stages] == ["float", "pruned", "engine"]
    assert [stage.accuracy.images for stage in record.stages if stage.accuracy] == [40] * 3
    first, pruned, engine = (stage.parameters or 0 for stage in record.stages)
    assert first > pruned
    assert engine > 0
    assert [(check.passed, check.detail) for check in record.checks] == [(True, "2 test images")] * 2
    assert [comparison.name for comparison in record.comparisons] == ["engine against float"]
    assert [(epoch.epoch, epoch.changes) for epoch in record.training] == [
        (0, ()),
        (1, ("pruned",)),
        (2, ("quantized",)),
    ]
    assert all(epoch.train_loss and epoch.val_loss for epoch in record.training)
    assert all(0 <= (epoch.accuracy_percent or 0) <= 100 for epoch in record.training)
    assert record.pruning is not None
    assert record.pruning["rounds"] == 1
    assert any("network of the best checkpoint, best.ckpt" in note for note in record.notes)
    assert any("swincompress bench" in note for note in record.notes)
    assert "failed" not in " ".join(record.notes)


def test_the_fit_is_the_same_as_without_a_report(fitted: tuple[Path, nn.Module], tmp_path: Path) -> None:
    _, module = fitted
    alone = fit(tmp_path, compressing(tmp_path))
    ours, theirs = module.state_dict(), alone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_a_resumed_fit_goes_on_with_the_curves(fitted: tuple[Path, nn.Module], tmp_path: Path) -> None:
    last = ModelCheckpoint(dirpath=tmp_path, filename="last")
    fit(tmp_path, [CompressionReport(images=8, checked_images=1), *compressing(tmp_path), last], epochs=2)
    first = RunRecord.load(tmp_path)
    assert [stage.name for stage in first.stages] == ["float", "pruned"]
    fit(
        tmp_path, [CompressionReport(images=8, checked_images=1), *compressing(tmp_path)],
        ckpt=tmp_path / "last.ckpt",
    )  # fmt: skip
    record, whole = RunRecord.load(tmp_path), RunRecord.load(fitted[0])
    assert record.training[:2] == first.training
    assert [epoch.changes for epoch in record.training] == [epoch.changes for epoch in whole.training]
    assert [stage.name for stage in record.stages] == ["float", "pruned", "engine"]
    before, pruned, _ = record.stages
    assert before.accuracy is None
    assert (before.parameters, before.macs, before.size) == (
        whole.stages[0].parameters,
        whole.stages[0].macs,
        whole.stages[0].size,
    )
    assert pruned.accuracy is not None
    assert any("resumed" in note for note in record.notes)


class Plain(lightning.LightningModule):
    """A module and data of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch).square().sum()
        self.log("train/loss", loss / 0 if self.current_epoch else loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)  # type: ignore[arg-type]


def test_any_module_gets_what_can_be_measured(tmp_path: Path) -> None:
    fit(
        tmp_path, [CompressionReport(tmp_path / "r", name="mine")], module=Plain(), epochs=2, enable_checkpointing=False
    )
    record = RunRecord.load(tmp_path / "r")
    assert record.name == "mine"
    assert [stage.parameters for stage in record.stages] == [6]
    assert record.stages[0].accuracy is None
    first, second = record.training
    assert first.train_loss is not None
    assert second.train_loss is None, "infinite"
    assert any("not of a datamodule of swincompress_pl.data" in note for note in record.notes)


def test_a_module_without_the_network_gets_its_curves(tmp_path: Path) -> None:
    report = CompressionReport(model_attribute="other")
    fit(tmp_path, [report], module=Plain(), epochs=1, enable_checkpointing=False)
    record = RunRecord.load(tmp_path)
    assert record.stages == []
    assert len(record.training) == 1
    assert any("model_attribute='other'" in note for note in record.notes)


def test_without_test_images_nothing_is_scored(tmp_path: Path) -> None:
    class NoTest(Digits):
        def dataset(self, split: str, *, augmented: bool = False) -> Any:
            if split == "test":
                raise FileNotFoundError("no folder")
            return super().dataset(split, augmented=augmented)

    module = classifier()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[CompressionReport()], default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_train_batches=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=NoTest(batch_size=32))
    record = RunRecord.load(tmp_path)
    assert [(stage.name, stage.accuracy) for stage in record.stages] == [("float", None)]
    assert any("no test images: no folder" in note for note in record.notes)


@pytest.mark.parametrize(
    ("images", "ranks", "data", "note"),
    [
        (8, 2, Digits(), "the fit had 2 processes"),
        (0, 1, Digits(), "images=0"),
        (8, 1, None, "not of a datamodule"),
    ],
)
def test_why_nothing_was_scored(images: int, ranks: int, data: Any, note: str) -> None:
    report, record = CompressionReport(images=images), RunRecord(name="x")
    trainer: Any = SimpleNamespace(world_size=ranks, datamodule=data)
    assert report._test_images(record, trainer, nn.Identity()) is None
    assert note in report._notes[0]


def test_an_error_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(fit_report, "measure_networks", failing)
    with pytest.warns(UserWarning, match="CompressionReport: measuring the network failed: MemoryError: too large"):
        fit(tmp_path, [CompressionReport(images=4)], epochs=1, enable_checkpointing=False)
    record = RunRecord.load(tmp_path)
    assert "Measuring the network failed: MemoryError: too large." in record.notes
    assert len(record.training) == 1
    monkeypatch.setattr(fit_report, "write_report", failing)
    with pytest.warns(UserWarning, match="CompressionReport: writing the report failed: MemoryError"):
        fit(tmp_path, [CompressionReport(images=4)], epochs=1, enable_checkpointing=False)


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, [CompressionReport()], module=Plain(), epochs=1, fast_dev_run=1)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images=-1: it has to be 0 or more"):
        CompressionReport(images=-1)
    with pytest.raises(ValueError, match="checked_images=0: it has to be 1 or more"):
        CompressionReport(checked_images=0)
    with pytest.raises(ValueError, match="latency='yes'"):
        CompressionReport(latency="yes")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file is a file; name a directory for report\.html"):
        fit(tmp_path, [CompressionReport(tmp_path / "file")], module=Plain(), epochs=1, enable_checkpointing=False)


def test_curves_of_another_version_are_left_alone() -> None:
    curves = TrainingCurves()
    curves.load_state_dict({"version": 0})
    assert curves.epochs == []
    row = {"epoch": 0, "train_loss": 1.0, "val_loss": None, "accuracy": 0.5, "changes": ["pruned"]}
    curves.load_state_dict({"version": 1, "epochs": [row], "changes_seen": 1, "steps_seen": 0})
    (epoch,) = curves.epochs
    assert (epoch.accuracy_percent, epoch.changes) == (50.0, ("pruned",))
    curves.load_state_dict({"version": 1, "epochs": [row | {"accuracy": 50}], "changes_seen": 1, "steps_seen": 0})
    assert curves.epochs[0].accuracy_percent == 50.0, "in percent already"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["fit"], [256]),
        (["fit", "--report", "false"], []),
        (["fit", "--trainer.callbacks+=swincompress_pl.report.CompressionReport", "--trainer.callbacks.images=7"], [7]),
        (["validate"], []),
    ],
)
def test_fit_has_one_by_default(arguments: list[str], found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressionCLI, "_run_subcommand", lambda self, name: None)
    model = ["--model.model=vit", "--model.num_classes=10", f"--model.model_kwargs={SIZES}"]
    rest = ["--data=Digits", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = command_line(CompressionCLI, args=[*arguments, *model, *rest])
    reports = [each for each in cli.trainer.callbacks if isinstance(each, CompressionReport)]  # type: ignore[attr-defined]
    assert [each.images for each in reports] == found
