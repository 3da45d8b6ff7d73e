"""A tiny fit that the tests of quantization-aware training share: modules, data, callbacks, a quiet trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.models import CompressionMixin, create_model

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}


class Plain(LightningModule):
    """A user's own module: nothing of ours but the attribute that holds the network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = create_model("VisionTransformer", **VIT)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self.backbone(batch[0]).argmax(-1) == batch[1]).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/top1", (self.backbone(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Restorable(CompressionMixin, Plain):
    model_attribute = "backbone"


def pixels_and_labels(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randint(0, 120, (count, 16, 16, 3), generator=generator)
    return (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def loader() -> DataLoader[Any]:
    pixels, labels = pixels_and_labels()
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def trainer(tmp_path: Path, epochs: int, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def qat(**options: Any) -> QuantizationAwareTraining:
    options = {
        "start_epoch": 1,
        "method": "max",
        "preprocessing": PREPROCESSING,
        "model_attribute": "backbone",
    } | options
    return QuantizationAwareTraining(**options)


def pruning(**options: Any) -> AdaptiveIterativePruning:
    return AdaptiveIterativePruning(tolerance=100.0, step=0.25, max_rounds=1, model_attribute="backbone", **options)


def fit(module: LightningModule, tmp_path: Path, epochs: int, *callbacks: Callback, **options: Any) -> Trainer:
    run = trainer(tmp_path, epochs, *callbacks, **options)
    run.fit(module, loader(), loader())
    return run
