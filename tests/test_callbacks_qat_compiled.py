"""Quantization in the middle of a fit whose network is compiled: training goes on compiled, evaluation in integers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.callback_cases import assert_same_state
from support.compiling import Counting
from support.qat_cases import PREPROCESSING, Restorable, fit, loader, pixels_and_labels, qat, trainer
from support.quant_cases import PREPROCESSING as OF_CASES
from support.quant_cases import network_and_images
from torch import nn

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.checkpoint.holder import put_network
from swincompress_pl.quant import QuantizedNetwork, quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Small(Restorable):
    def __init__(self) -> None:
        super().__init__()
        network: Any = self.backbone
        del network.blocks[1]


def compiled(backend: Any, in_place: bool) -> Small:
    module = Small()
    if in_place:
        module.backbone.compile(backend=backend)
    else:
        module.backbone = torch.compile(module.backbone, backend=backend)  # type: ignore[assignment]
    return module


def quantized_of(module: Any) -> QuantizedNetwork:
    assert isinstance(module.backbone, QuantizedNetwork)
    return module.backbone


@pytest.mark.parametrize("in_place", [True, False])
def test_training_goes_on_compiled_and_is_the_same(tmp_path: Path, in_place: bool) -> None:
    backend, plain = Counting(), Small()
    module = compiled(backend, in_place)
    before: list[int] = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.append(backend.runs)

    fit(plain, tmp_path, 2, qat(), EMAWeightAveraging(decay=0.5))
    fit(module, tmp_path, 2, qat(), EMAWeightAveraging(decay=0.5), Watch())
    assert before[1] > before[0]
    assert backend.runs - before[1] == 4  # the batches of the quantized epoch; its validation is not compiled
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert quantized_of(module).compiler is not None
    assert quantized_of(copy.deepcopy(module)).compiler is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "learned"), [("vit", False), ("swin padded", True)])
def test_compiled_fake_quantization_is_one_graph_with_the_same_numbers(name: str, learned: bool) -> None:
    network: Any
    network, _, images = network_and_images(name)
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    # A block of each kind will do.
    blocks = network.blocks if name == "vit" else network.layers[1].blocks
    del blocks[1]
    made = quantize(network, [images], method="searched", search={"rows": 64}, preprocessing=OF_CASES, bits="W4A8")
    if learned:
        made.learn_scales()
    made.train()

    def gradients() -> list[Any]:
        made.zero_grad()
        logits = made(images)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad for p in made.parameters())]

    expected, backend = gradients(), Counting()
    made.compile(backend=backend, fullgraph=True)
    for found, value in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert (backend.graphs, backend.runs) == (1, 1)
    made.eval()(images)
    assert backend.runs == 1


@pytest.mark.slow
def test_resumed_before_and_after_quantization(tmp_path: Path) -> None:
    def run_to(epochs: int, ckpt: Path | None = None) -> Any:
        module, save = compiled("eager", False), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [qat(), save] if ckpt is None else [qat()]
        trainer(tmp_path, epochs, *callbacks).fit(module, loader(), loader(), ckpt_path=ckpt)
        return module

    whole = run_to(3)
    for epoch in (0, 1):
        again = run_to(3, tmp_path / f"epoch={epoch}.ckpt")
        assert quantized_of(again).compiler is not None
        assert_same_state(dict(again.state_dict()), dict(whole.state_dict()))
    loaded = Small.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    pixels, _ = pixels_and_labels()
    assert torch.equal(quantized_of(loaded).integer_logits(pixels), quantized_of(whole).integer_logits(pixels))


@pytest.mark.slow
def test_compiled_pruned_and_quantized_in_one_fit(tmp_path: Path) -> None:
    backend = Counting()
    module = compiled(backend, False)
    search = AdaptiveIterativePruning(tolerance=100.0, step=0.25, model_attribute="backbone", max_rounds=2)
    fit(module, tmp_path, 2, qat(), search)
    assert quantized_of(module).network.blocks[0].mlp.fc1.out_features == 64  # type: ignore[index,union-attr]
    assert backend.graphs >= 3  # the float network, cut, and the quantized one, cut again
    assert backend.runs >= 8


def test_what_cannot_be_compiled_goes_on_and_is_said(tmp_path: Path) -> None:
    module = compiled("eager", False)
    with pytest.warns(UserWarning, match=r"Small\.backbone was compiled; quantized it trains uncompiled \(method 'aff"):
        fit(module, tmp_path, 1, qat(start_epoch=0, method="affine"))
    assert quantized_of(module).compiler is None
    with pytest.raises(ValueError, match=r"'affine' has operators that torch\.compile does not trace"):
        quantized_of(module).compile()
    module = compiled("eager", True)
    module.backbone._compiled_call_impl = lambda *inputs: inputs  # of another torch, which does not say how
    network = QuantizedNetwork(module.backbone, preprocessing=PREPROCESSING)
    with pytest.warns(UserWarning, match="its compiler is not known"):
        put_network(module, "backbone", network)


def test_a_quantized_network_may_be_wrapped_by_the_compiler(tmp_path: Path) -> None:
    module = Small()
    made = quantize(module.backbone, [next(iter(loader()))[0]], method="max", preprocessing=PREPROCESSING)
    module.backbone = torch.compile(made.train(), backend="eager")  # type: ignore[assignment]
    fit(module, tmp_path, 1, qat(start_epoch=0))
    assert quantized_of(module) is made
    assert made.compiler is not None
    assert isinstance(made.network, nn.Module)
