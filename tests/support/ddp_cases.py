"""A tiny fit on one of several ranks (gloo), and what of it has to be equal on all."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from support.callback_cases import Plain, data, greedy, loader, make_trainer, search_of, vit
from support.rank_cases import digest
from swincompress_pl.history import history_of


class Momentum(Plain):
    """SGD: its steps are linear in the gradients, so that sums in another order stay roundings."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


class Digests(Callback):
    """A hash of everything that has to be equal on all ranks, at the start of each epoch and after each step."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.steps: list[str] = []

    def _add(self, trainer: Trainer, module: LightningModule) -> None:
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.found.append(digest([dict(module.state_dict()), states, history_of(module.net)]))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert bool(torch.isfinite(outputs["loss"]))
        self._add(trainer, pl_module)
        self.steps.append(self.found[-1])


class StepDigests(Callback):
    """A hash of the module and its optimizer after each step."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.found.append(digest([dict(pl_module.state_dict()), trainer.optimizers[0].state_dict()]))


def train_loader(rank: int, world_size: int) -> DataLoader[Any]:
    """Batches of 8 images in all; Lightning's own sampler would shuffle them under DDP."""
    sampler = DistributedSampler(data(), world_size, rank, shuffle=False) if world_size > 1 else None
    return DataLoader(data(), 8 // world_size, sampler=sampler)


class HoldOutData(LightningDataModule):
    """With a hold-out of its own, which Lightning does not shard."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(self.rank, self.world_size)

    def holdout_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(10, seed=2), 4)


def ddp(**options: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **options)


def fit(folder: Path, rank: int = 0, world_size: int = 1, epochs: int = 2, **options: Any) -> dict[str, Any]:
    """A fit on `rank` of `world_size`, together as large a batch as alone; plain data about how it went."""
    pruning = {key: options.pop(key) for key in list(options) if key not in {"sharded", "strategy", "ckpt", "build"}}
    module = Momentum(options.get("build", vit))
    callback, digests = greedy(**pruning), Digests()
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy = {"strategy": ddp(**options.get("strategy", {}))} if world_size > 1 else {}
    trainer = make_trainer(folder, epochs, callback, digests, save, devices=world_size, **strategy)
    source: Any = {"datamodule": HoldOutData(rank, world_size)}
    if options.get("sharded", True):
        source = {"train_dataloaders": train_loader(rank, world_size), "val_dataloaders": loader()}
    trainer.fit(module, **source, ckpt_path=options.get("ckpt"))
    return {
        "digests": digests.found,
        "steps": digests.steps,
        "state": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "history": history_of(module.net),
        "search": search_of(callback),
        "images": callback.search_state.scoring["naive_images"],  # type: ignore[union-attr]
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("pruning/")},
    }
