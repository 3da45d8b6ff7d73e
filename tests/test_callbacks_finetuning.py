"""Lightning's BaseFinetuning, and optimizers of several groups, beside an exchange of the network; resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from support.callback_cases import assert_same_state
from support.qat_cases import VIT, Plain, loader, qat, trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.checkpoint.holder import float_network
from swincompress_pl.models import create_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning"),
]


def thaw(trainer: Trainer) -> None:
    """What a resume forgets of a fit without our callbacks too: that the groups' parameters are trained."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)


class Unfreeze(BaseFinetuning):
    """A block before epoch 1, another before epoch 2."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(float_network(pl_module.backbone).blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch in (1, 2):
            block = float_network(pl_module.backbone).blocks[epoch - 1]  # type: ignore[index]
            self.unfreeze_and_add_param_group(block, optimizer, lr=1e-4)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        thaw(trainer)


class Backbone(BackboneFinetuning):
    def __init__(self) -> None:
        super().__init__(0, backbone_initial_lr=1e-5, lambda_func=lambda epoch: 1.5)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        thaw(trainer)


class Blocks(Plain):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Headed(Plain):
    """A network of features with the classifier behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = create_model("VisionTransformer", **{**VIT, "num_classes": 0})
        self.head = nn.Linear(32, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self.head(self.backbone(batch[0])).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-3)


class Groups(Headed):
    """A group per parameter; those that stand behind the network's move when its scales join."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([{"params": [parameter]} for parameter in self.parameters()], lr=1e-3)


class Named(Plain):
    def configure_optimizers(self) -> Optimizer:
        named = list(self.named_parameters())
        groups: list[dict[str, Any]] = [{"params": named[:9], "weight_decay": 0.1}, {"params": named[9:], "lr": 1e-4}]
        return torch.optim.AdamW(groups, lr=1e-3)


def integers() -> list[Callback]:
    return [qat(calibration_images=8)]


def rounds_and_integers() -> list[Callback]:
    rounds = AdaptiveIterativePruning(
        tolerance=100.0, step=0.25, round_to=1, kinds=("mlp",), max_rounds=2, model_attribute="backbone"
    )
    return [rounds, *integers()]


def everything(
    folder: Path, module: LightningModule, callbacks: list[Callback], ckpt: Path | None = None
) -> dict[str, Any]:
    torch.manual_seed(3)
    keep = ModelCheckpoint(folder / ("whole" if ckpt is None else "again"), "{epoch}", save_top_k=-1)
    run = trainer(folder, 3, *callbacks, keep)
    run.fit(module, loader(), loader(), ckpt_path=ckpt, weights_only=False if ckpt else None)
    return {"weights": dict(module.state_dict()), "optimizer": run.optimizers[0].state_dict()}


@pytest.mark.parametrize(
    ("make", "callbacks", "epochs"),
    [
        (Blocks, lambda: [Unfreeze(), *integers()], (1,)),
        (Blocks, lambda: [*integers(), Unfreeze()], (0, 1)),
        pytest.param(Blocks, lambda: [Unfreeze(), *rounds_and_integers()], (0, 1), marks=pytest.mark.slow),
        (Blocks, lambda: [*rounds_and_integers(), Unfreeze()], (1,)),
        (Headed, lambda: [Backbone(), *integers()], (1,)),
        (Headed, lambda: [*integers(), Backbone()], (1,)),
        (Groups, integers, (1,)),
        (Named, integers, (1,)),
    ],
)
def test_a_resume_ends_where_an_uninterrupted_fit_does(
    tmp_path: Path,
    make: Callable[[], LightningModule],
    callbacks: Callable[[], list[Callback]],
    epochs: tuple[int, ...],
) -> None:
    whole = everything(tmp_path, make(), callbacks())
    for epoch in epochs:
        again = everything(tmp_path, make(), callbacks(), tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same_state(again, whole, f"from epoch {epoch}")


def test_the_backbones_rate_is_set_and_not_that_of_the_scales(tmp_path: Path) -> None:
    """BackboneFinetuning sets that of the last group."""
    plain = everything(tmp_path, Headed(), [Backbone()])["optimizer"]["param_groups"]
    beside = everything(tmp_path, Headed(), [Backbone(), *integers()])["optimizer"]["param_groups"]
    assert [group["lr"] for group in plain] == [beside[0]["lr"], beside[2]["lr"]]
    assert len(beside[1]["params"]) == 1
    assert beside[1]["weight_decay"] == 0.0
