"""A tiny fit that the tests of the pruning callback share: networks, a user's module, data, a quiet trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks.pruning import AdaptiveIterativePruning
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.history import history_of


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3)


def shallow_vit() -> nn.Module:
    """One block, which is compiled in half the time."""
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=3)


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=3
    )


class Plain(LightningModule):
    """A user's own module: nothing of ours but the attribute that holds the network."""

    def __init__(self, build: Callable[[], nn.Module] = vit) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = build()
        self.stages: list[str] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/top1", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.stages.append(str(self.trainer.state.stage.value))
        return batch

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Restorable(CompressionMixin, Plain):
    """The same with the mixin that `load_from_checkpoint` needs."""


def data(count: int = 24, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randn(count, 3, 16, 16, generator=generator) + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=shuffle)


def noise(count: int = 24) -> TensorDataset:
    """Images and labels without a relation: what has learnt them by heart loses some of them with every removal."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return TensorDataset(images, torch.randint(0, 3, (count,), generator=generator))


def trained(dataset: TensorDataset, steps: int = 30) -> Plain:
    """A module that knows `dataset`."""
    module, (images, labels) = Plain(), dataset.tensors
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.net(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return module


def largest_first(name: str, weight: Tensor, gradients: Any) -> Tensor:
    """A criterion that takes what is needed most, so that some steps are rejected."""
    return 1 / (1e-3 + weight.abs())


def make_trainer(tmp_path: Path, epochs: int, *callbacks: Callback, **options: Any) -> Trainer:
    options = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "devices": 1,
        **options,
    }
    return Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_model_summary=False,
        **options,
    )


def greedy(**options: Any) -> AdaptiveIterativePruning:
    """Accepts every step, so that what is cut does not hang on the accuracy of a toy."""
    return AdaptiveIterativePruning(**{"tolerance": 100.0, "step": 0.25, "max_sparsity": 0.75, **options})


def shapes(module: LightningModule) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def search_of(callback: AdaptiveIterativePruning) -> dict[str, Any]:
    """The search's state without what a resumed one need not have in common with an uninterrupted one."""
    assert callback.search_state is not None
    return {**callback.search_state.to_dict(), "elapsed_s": 0.0, "scoring": {}}


def assert_same_state(one: Any, other: Any, where: str = "") -> None:
    """Nested plain data and tensors are equal to the bit."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same_state(first, second, f"{where}[{index}]")
    else:
        assert one == other, where


class Unmoved(Callback):
    """Knows the module as it was before the search."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = copy.deepcopy(dict(pl_module.state_dict()))

    def check(self, module: Plain) -> None:
        assert_same_state(dict(module.state_dict()), self.before)
        assert history_of(module.net) == []
        assert module.training
        assert "log" not in vars(module)
