"""Modes of modules and frozen parameters are what the user made them, through exchange, search, resume and fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.qat_cases import PREPROCESSING, Plain, Restorable, fit, loader, pruning, qat, trainer
from support.spiking_qat_cases import Spiking, norms_of, spiking_qat, statistics
from torch import Tensor, nn

from swincompress_pl.quant import QuantizedNetwork, quantize

FROZEN = ("patch_embed", "blocks.0")


def float_part(module: Any) -> nn.Module:
    held = module.backbone
    network = held.network if isinstance(held, QuantizedNetwork) else held
    assert isinstance(network, nn.Module)
    return network


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in network.named_modules()}


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def freeze(network: nn.Module) -> None:
    """Two parts are frozen and in evaluation, as users do it."""
    for name in FROZEN:
        network.get_submodule(name).requires_grad_(False).eval()


class Watch(Callback):
    """The modes during every training step, and whether the quantized network gave gradients."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, dict[str, bool], set[str]]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        network = float_part(pl_module)
        quantized = isinstance(pl_module.backbone, QuantizedNetwork)
        self.seen.append((quantized, modes(network), trained(network)))


@pytest.mark.parametrize("callbacks", [lambda: [qat()], lambda: [pruning(), qat()], lambda: [pruning(start_epoch=1)]])
def test_modes_are_kept_through_exchange_and_search(tmp_path: Path, callbacks: Any) -> None:
    module, watch = Plain(), Watch()
    freeze(module.backbone)
    expected = modes(module.backbone), trained(module.backbone)
    fit(module, tmp_path, 2, *callbacks(), watch)
    assert len(watch.seen) == 8
    assert all((seen, free) == expected for _, seen, free in watch.seen)
    assert (modes(float_part(module)), trained(float_part(module))) == expected


class FrozenNorms(Spiking):
    """BatchNorms are set to evaluation whenever the module is set to training, and when an epoch begins."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for norm in norms_of(self):
            norm.eval()
        return self

    def on_train_epoch_start(self) -> None:
        for norm in norms_of(self):
            norm.eval()


class FrozenOnce(Spiking):
    """BatchNorms are set to evaluation once and for all."""

    def __init__(self) -> None:
        super().__init__()
        for norm in norms_of(self):
            norm.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FrozenNorms, FrozenOnce])
def test_frozen_norms_keep_their_statistics(tmp_path: Path, kind: type[Spiking]) -> None:
    module = kind()
    before = statistics(module.backbone)
    fit(module, tmp_path, 2, spiking_qat())
    assert isinstance(module.backbone, QuantizedNetwork)
    after = statistics(module.backbone.network)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_modes_are_kept_by_a_resume_and_by_loading(tmp_path: Path) -> None:
    class Frozen(Restorable):
        def __init__(self) -> None:
            super().__init__()
            freeze(self.backbone)

    keeper = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Frozen(), tmp_path, 2, qat(), keeper)
    expected = modes(Frozen().backbone)
    loaded = Frozen.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert isinstance(loaded.backbone, QuantizedNetwork)
    assert loaded.backbone.training
    assert modes(loaded.backbone.network) == expected
    resumed, watch = Frozen(), Watch()
    trainer(tmp_path, 3, qat(), watch).fit(resumed, loader(), loader(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert [(quantized, seen) for quantized, seen, _ in watch.seen] == [(True, expected)] * 4


def quantized_module(kind: type[Plain] = Plain) -> Plain:
    module = kind()
    images, _ = next(iter(loader()))
    module.backbone = quantize(module.backbone, [images], method="max", preprocessing=PREPROCESSING)
    return module


class EvalNet(Plain):
    """Sets the network to evaluation in every epoch, dropout and all."""

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()


class EvalRestorable(Restorable):
    """The mixin alone, no callback."""


@pytest.mark.parametrize(
    ("kind", "callbacks"),
    [
        (Plain, lambda: [qat(start_epoch=0)]),
        (EvalNet, lambda: [qat(start_epoch=0, learn_scales=False)]),
        (Plain, lambda: [pruning(start_epoch=5)]),
        (EvalRestorable, list),
    ],
)
def test_a_module_in_evaluation_trains_and_stays_in_it(tmp_path: Path, kind: type[Plain], callbacks: Any) -> None:
    module = quantized_module(kind)
    module.eval()
    before = modes(module.backbone)
    weight = module.backbone.network.head.weight.detach().clone()
    fit(module, tmp_path, 1, *callbacks())
    assert not torch.equal(module.backbone.network.head.weight, weight)
    assert modes(module.backbone) == {**modes(module.backbone), **before}
    images, _ = next(iter(loader()))
    logits: Tensor = module.backbone(images)
    assert not logits.requires_grad  # integers again


@pytest.mark.slow
def test_a_second_fit_after_a_test_trains(tmp_path: Path) -> None:
    module = Plain()
    run = fit(module, tmp_path, 1, qat(start_epoch=0))
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    weight = module.backbone.network.head.weight.detach().clone()
    fit(module, tmp_path, 1, qat(start_epoch=0))
    assert module.backbone.training
    assert not torch.equal(module.backbone.network.head.weight, weight)


def test_a_step_that_fails_leaves_the_mode(tmp_path: Path) -> None:
    class Failing(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert self.backbone.training
            raise RuntimeError("on purpose")

    module = quantized_module(Failing)
    module.eval()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, tmp_path, 1, qat(start_epoch=0))
    assert not module.backbone.training


def test_a_skipped_epoch_leaves_the_mode(tmp_path: Path) -> None:
    class Skipping(Restorable):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            super().on_train_batch_start(batch, batch_idx)
            return -1

    module = quantized_module(Skipping)
    module.eval()
    fit(module, tmp_path, 1, qat(start_epoch=0))
    assert not module.backbone.training
