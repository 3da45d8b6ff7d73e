"""A search takes more of its metric for better: what shrinks, and what is no fraction, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.callback_cases import Plain, greedy, loader, make_trainer
from torch import Tensor

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

SHRINKING = [
    *("loss", "val/loss", "val_loss", "val.loss", "val-loss", "val/loss_epoch", "val/loss/dataloader_idx_1", "valLoss"),
    *("val/cross_entropy", "val/CE", "val/logloss", "loss/val", "loss/classifier", "val/top1_err", "val/err1"),
    *("nll_mean", "val/perplexity", "val/MSE", "val/mae", "val/error", "val/errors"),
]  # fmt: skip
GROWING = [
    *("val/top1", "val/acc", "val/f1_weighted", "lossless", "val/mAP", "top1/dataloader_idx_0", "val/terror_score"),
    *("val", "val/erratic", "val/iou", "val/mean", "0"),
]  # fmt: skip


@pytest.mark.parametrize("kind", [AdaptiveIterativePruning, PrimeSVT])
@pytest.mark.parametrize("name", SHRINKING)
def test_a_name_of_a_loss_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"monitor='.*' shrinks as .* better.*such as the accuracy.*another name"):
        kind(monitor=name)


@pytest.mark.parametrize("name", GROWING)
def test_another_name_is_taken(name: str) -> None:
    assert AdaptiveIterativePruning(monitor=name).monitor == PrimeSVT(monitor=name).monitor == name


class Logs(Plain):
    """Logs `values[0]` for the first batch and `values[1]` for the others."""

    def __init__(self, *values: float, **scheduler: Any) -> None:
        super().__init__()
        self.values, self.scheduler = values, scheduler

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net(batch[0])
        self.log("val/quality", self.values[min(batch_idx, len(self.values) - 1)])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if not self.scheduler:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **self.scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/quality"}}


def fit(tmp_path: Path, module: Logs, *callbacks: Callback, start_epoch: int = 0) -> AdaptiveIterativePruning:
    callback = greedy(monitor="val/quality", max_rounds=1, kinds=("heads",), start_epoch=start_epoch)
    make_trainer(tmp_path, 1, callback, *callbacks, num_sanity_val_steps=0).fit(module, loader(), loader())
    return callback


@pytest.mark.parametrize("watcher", [ModelCheckpoint, EarlyStopping])
def test_a_callback_that_takes_less_for_better_is_named(tmp_path: Path, watcher: Any) -> None:
    module = Logs(0.5)
    with pytest.raises(ValueError, match=rf"'val/quality' is also monitored by {watcher.__name__} with mode='min'"):
        fit(tmp_path, module, watcher(monitor="val/quality", mode="min"))
    assert module.stages == []
    assert fit(tmp_path, module, watcher(monitor="val/quality", mode="max")).search_state is not None
    assert fit(tmp_path, module, watcher(monitor="pruning/parameters", mode="min")).search_state is not None


def test_a_checkpoint_that_keeps_every_epoch_needs_no_mode(tmp_path: Path) -> None:
    every = ModelCheckpoint(dirpath=tmp_path / "every", monitor="val/quality", save_top_k=-1)
    assert fit(tmp_path, Logs(0.5), every).search_state is not None


def test_a_scheduler_that_takes_less_for_better_is_named(tmp_path: Path) -> None:
    module = Logs(0.5, mode="min")
    with pytest.raises(ValueError, match=r"monitored by ReduceLROnPlateau with mode='min'.*mode='max'"):
        fit(tmp_path, module, start_epoch=1)
    assert "train" not in module.stages
    assert fit(tmp_path, Logs(0.5, mode="max")).search_state is not None


@pytest.mark.parametrize("value", [-0.25, 1.5, 87.5, float("nan"), float("inf")])
def test_a_value_that_is_no_fraction_is_refused_before_training(tmp_path: Path, value: float) -> None:
    module = Logs(value)
    with pytest.raises(ValueError, match=r"monitor='val/quality' is (-|nan|inf|\d).*between 0 and 1.*that grows"):
        fit(tmp_path, module, start_epoch=1)
    assert "train" not in module.stages


def test_the_whole_holdout_counts_and_not_its_first_batch(tmp_path: Path) -> None:
    callback = fit(tmp_path, Logs(-0.1, 0.8))
    assert callback.search_state is not None
    assert callback.search_state.baseline_score == pytest.approx(50)
