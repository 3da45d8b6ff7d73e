"""Masks hold in a fit, whoever steps the optimizer and in whatever way; a network whose masks did not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import Plain, greedy, loader, make_trainer, vit
from torch import Tensor, nn

from swincompress_pl import accel
from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.pruning import keep_masks
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, register_masks, remove_masks, set_mask
from swincompress_pl.quant import quantize

PRE = {"mean": [0.5] * 3, "std": [0.25] * 3}
FC1 = "blocks.0.mlp.fc1.weight"


def _alive(network: nn.Module) -> int:
    """How many masked weights are not 0."""
    return sum(int((weight.detach()[~mask] != 0).sum()) for weight, mask in masked_parameters(network).values())


@torch.no_grad()
def _fill(network: nn.Module) -> None:
    for weight, _ in masked_parameters(network).values():
        weight.data.add_(0.01)


class Watched(Plain):
    """Says how many masked weights live whenever it is validated."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.alive: list[int] = []
        if masked:
            _mask(self.net)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.alive.append(_alive(self.net))

    def on_validation_model_eval(self) -> None:
        self.eval()


class TwoHalves(Watched):
    """SAM: the optimizer's own step is never called."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__(masked)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        moved = []
        for half in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            with torch.no_grad():
                for parameter in self.net.parameters():
                    if half:
                        parameter.sub_(moved.pop(0)).sub_(0.01 * parameter.grad)
                    else:
                        moved.append(0.05 * parameter.grad)
                        parameter.add_(moved[-1])


class Hidden(Watched):
    """An optimizer that the trainer does not know."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__(masked)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if "_mine" not in vars(self):
            vars(self)["_mine"] = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        optimizer = vars(self)["_mine"]
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.optimizers().zero_grad()


class Several(Watched):
    """Two optimizers, stepped in turn."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__(masked)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, second = list(self.net.parameters())[:6], list(self.net.parameters())[6:]
        return [torch.optim.AdamW(first, lr=0.01), torch.optim.SGD(second, lr=0.1)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


class BehindTheBatch(Watched):
    """Writes to the weights behind the callbacks, as averages and projections do."""

    def on_train_batch_end(self, *_: Any) -> None:
        _fill(self.net)


class BehindTheEpoch(Watched):
    def on_train_epoch_end(self) -> None:
        _fill(self.net)


class Swapped(Watched):
    """Evaluates other weights than it trains, as schedule-free optimizers do."""

    def on_validation_epoch_start(self) -> None:
        _fill(self.net)


MODULES = [TwoHalves, Hidden, Several, BehindTheBatch, BehindTheEpoch, Swapped]


def _mask(network: nn.Module) -> None:
    names = [name for name, _ in network.named_parameters() if name.endswith("fc1.weight")]
    register_masks(network, names)
    for name in names:
        generator = torch.Generator().manual_seed(1)
        set_mask(network, name, torch.rand(network.get_parameter(name).shape, generator=generator) < 0.5)


def _of_file(path: Path) -> int:
    state = torch.load(path, weights_only=True)["state_dict"]
    masks = [name for name in state if name.endswith("weight_mask")]
    assert masks
    return sum(int((state[name.removesuffix("_mask")][~state[name]] != 0).sum()) for name in masks)


@pytest.mark.parametrize("kind", MODULES)
def test_masks_hold_beside_a_pruning_callback(kind: type[Watched], tmp_path: Path) -> None:
    module, keeper = kind(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callback = greedy(granularity="weight", max_rounds=1, tolerance=100.0)
    make_trainer(tmp_path, 2, callback, keeper).fit(module, loader(), loader())
    assert sum(int((~mask).sum()) for _, mask in masked_parameters(module.net).values()) > 0
    assert (set(module.alive), _alive(module.net)) == ({0}, 0)
    files = list(tmp_path.glob("*.ckpt"))
    assert files or not module.trainer.global_step, "the trainer counts no steps that it does not know"
    assert {_of_file(path) for path in files} <= {0}


@pytest.mark.parametrize("kind", [TwoHalves, Hidden, BehindTheEpoch])
def test_masks_hold_beside_quantization_aware_training(kind: type[Watched], tmp_path: Path) -> None:
    module = kind(masked=True)
    callback = QuantizationAwareTraining(start_epoch=1, preprocessing={"mean": [0.5] * 3, "std": [0.1] * 3})
    with pytest.warns(UserWarning, match="start_epoch=1 is not reached"):
        make_trainer(tmp_path, 1, callback).fit(module, loader(), loader())
    assert (set(module.alive), _alive(module.net)) == ({0}, 0)


@pytest.mark.parametrize("kind", [TwoHalves, Hidden, Several])
def test_masks_hold_by_the_mixin_alone(kind: type[Watched], tmp_path: Path) -> None:
    module: LightningModule = type("Mine", (CompressionMixin, kind), {})(masked=True)
    assert isinstance(module, Watched)
    make_trainer(tmp_path, 1).fit(module, loader(), loader())
    assert (set(module.alive), _alive(module.net)) == ({0}, 0)


def _images() -> list[Tensor]:
    return [batch[0].clamp(-2, 2) for batch in loader()]


FILLS = {
    "a fit without a callback": lambda net, folder: make_trainer(folder, 1).fit(_holding(net), loader()),
    "a plain loop": lambda net, _: _loop(net),
    "a state of other weights": lambda net, _: net.load_state_dict(
        {n: t if n.endswith("_mask") else torch.full_like(t, 0.02) for n, t in net.state_dict().items()}
    ),
    "NaN": lambda net, _: net.get_parameter(FC1).data.fill_(float("nan")),
}


def _holding(network: nn.Module) -> Plain:
    module = Plain()
    module.net = network
    return module


def _loop(network: nn.Module) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(_images()[0]).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_filled_masks_are_refused_by_quantize_with_both_remedies(fill: Any, tmp_path: Path) -> None:
    network = vit()
    _mask(network)
    fill(network, tmp_path)
    with pytest.raises(ValueError, match=rf"quantize: \d+ of the \d+ weights of {FC1} .*keep_masks.*remove_masks"):
        quantize(network, _images(), preprocessing=PRE, method="max")


def test_filled_masks_are_refused_by_export_and_the_remedies_work(tmp_path: Path) -> None:
    network = vit()
    _mask(network)
    quantized = quantize(network, _images(), preprocessing=PRE, method="max").eval()
    _fill(network)
    quantized(_images()[0])  # an evaluation in the midst of a loop is none of that
    for act in (quantized.to_program, lambda: accel.export(quantized, tmp_path / "net.safetensors")):
        with pytest.raises(ValueError, match=r"export: .* of blocks\.0\.mlp\.fc1\.weight .*keep_masks.*remove_masks"):
            act()
    assert not list(tmp_path.iterdir())
    keep_masks([], quantized)
    quantized.to_program()
    _fill(network)
    remove_masks(network, list(masked_parameters(network)))
    accel.export(quantized, tmp_path / "net.safetensors")
