"""Compress the network of a LightningModule of your own: prune it, train it in integers, keep the best, export it.

$ python examples/own_module.py
validated: 90.00%, the engine: 270 of 300 images, 90.00%
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from swincompress_pl import accel
from swincompress_pl.callbacks import AdaptiveIterativePruning, CompressedCheckpoint, QuantizationAwareTraining
from swincompress_pl.models import CompressionMixin


class DigitClassifier(CompressionMixin, LightningModule):  # the mixin makes load_from_checkpoint rebuild what was cut
    model_attribute = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10, global_pool="avg"
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/top1", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("runs/own_module"))
    given = parser.parse_args()
    prune_epoch, quantize_epoch, epochs = (1, 2, 3) if given.quick else (50, 60, 70)

    seed_everything(0)
    digits = load_digits()
    pixels = np.rint(np.kron(digits.images, np.ones((4, 4))) * 255 / 16).astype(np.uint8)  # 32 x 32, 0 to 255
    pixels = np.repeat(pixels[..., None], 3, axis=-1)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1  # normalized: mean 0.5, std 0.5
    data = TensorDataset(images, torch.from_numpy(digits.target))
    train, validation = Subset(data, range(300, 1797)), Subset(data, range(300))

    where, normalization = {"model_attribute": "backbone"}, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    pruning = AdaptiveIterativePruning(tolerance=2.0, step=0.2, start_epoch=prune_epoch, every_n_epochs=2, **where)
    quantization = QuantizationAwareTraining(start_epoch=quantize_epoch, preprocessing=normalization, **where)
    best = CompressedCheckpoint(dirpath=given.output, filename="best", monitor="val/top1", mode="max", **where)
    trainer = Trainer(max_epochs=epochs, callbacks=[pruning, quantization, best], logger=False)
    trainer.fit(DigitClassifier(), DataLoader(train, 64, shuffle=True), DataLoader(validation, 300))

    module = DigitClassifier.load_from_checkpoint(best.best_model_path)
    engine = accel.load(accel.export(module, given.output / "model.safetensors"))
    right = int((engine(pixels[:300]).argmax(1) == digits.target[:300]).sum())
    print(f"validated: {best.best_model_score:.2%}, the engine: {right} of 300 images, {right / 300:.2%}")


if __name__ == "__main__":
    main()
