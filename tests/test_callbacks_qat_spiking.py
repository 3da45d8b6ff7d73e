"""Quantization-aware training of a spiking network in a fit: through surrogates, with BatchNorms that go on."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import assert_same_state
from support.compiling import Counting
from support.qat_cases import PREPROCESSING, fit, loader, pixels_and_labels, trainer
from support.spiking_qat_cases import Spiking, norms_of, spiking_qat, statistics
from torch import nn

from swincompress_pl import accel
from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.quant import QuantizedNetwork, quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
]


class Restorable(CompressionMixin, Spiking):
    model_attribute = "backbone"


class Before(Callback):
    """What the statistics are when training goes on in integers."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.statistics = statistics(pl_module.backbone.network)
            self.weights = {key: p.detach().clone() for key, p in pl_module.backbone.network.named_parameters()}


@pytest.mark.parametrize("bits", [pytest.param("W8A8", marks=pytest.mark.slow), "W4A8"])
def test_a_fit_goes_on_and_reports_the_engines_accuracy(tmp_path: Path, bits: str) -> None:
    module, before = Spiking(), Before()
    run = fit(module, tmp_path, 3, spiking_qat(bits=bits), before)
    quantized: Any = module.backbone
    assert isinstance(quantized, QuantizedNetwork)
    after = statistics(quantized.network)
    assert after.keys() == before.statistics.keys()
    assert any(not torch.equal(after[key], value) for key, value in before.statistics.items())
    moved = [not torch.equal(p, before.weights[key]) for key, p in quantized.network.named_parameters()]
    assert sum(moved) > len(moved) / 2
    assert math.isfinite(float(quantized.network.state_dict()["head.weight"].sum()))

    file = accel.export(quantized.eval(), tmp_path / "model.safetensors")
    pixels, labels = pixels_and_labels()
    logits = accel.load(file, threads=1).run_integer(pixels.numpy())
    assert np.array_equal(logits, accel.reference(file).run_integer(pixels.numpy()))
    assert np.array_equal(logits, quantized.integer_logits(pixels).numpy())
    assert float(run.callback_metrics["val/top1"]) == pytest.approx((logits.argmax(1) == labels.numpy()).mean())


def test_norms_in_evaluation_keep_their_statistics(tmp_path: Path) -> None:
    class Frozen(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for norm in norms_of(pl_module.backbone):
                norm.eval()

    module = Spiking()
    fit(module, tmp_path, 1)
    kept = statistics(module.backbone)
    fit(module, tmp_path, 2, spiking_qat(start_epoch=0), Frozen())
    assert isinstance(module.backbone, QuantizedNetwork)
    assert_same_state(statistics(module.backbone.network), kept)


def test_calibration_in_a_training_network_leaves_its_statistics(tmp_path: Path) -> None:
    module = Spiking()
    fit(module, tmp_path, 1)
    network = module.backbone.train()
    kept = statistics(network)
    images = [images for images, _ in loader()]
    quantized = quantize(network, images, method="searched", preprocessing={**PREPROCESSING, "height": 16, "width": 16})
    assert_same_state(statistics(quantized.network), kept)
    assert all(norm.training for norm in norms_of(quantized.network))


def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, resumed = Restorable(), Restorable()
    fit(whole, tmp_path / "whole", 4, spiking_qat())
    keep = ModelCheckpoint(tmp_path / "half", save_last=True)
    fit(Restorable(), tmp_path / "half", 2, spiking_qat(), keep)
    again = trainer(tmp_path / "half", 4, spiking_qat())
    again.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half" / "last.ckpt", weights_only=False)
    assert_same_state(dict(resumed.backbone.state_dict()), dict(whole.backbone.state_dict()))
    loaded = Restorable.load_from_checkpoint(tmp_path / "half" / "last.ckpt", weights_only=False)
    assert isinstance(loaded.backbone, QuantizedNetwork)


def test_bf16_trains_to_finite_weights(tmp_path: Path) -> None:
    module = Spiking()
    fit(module, tmp_path, 2, spiking_qat(start_epoch=0), precision="bf16-mixed")
    assert isinstance(module.backbone, QuantizedNetwork)
    assert all(bool(torch.isfinite(p).all()) for p in module.backbone.parameters())


@pytest.mark.slow
def test_compiled_training_is_the_same_pass(tmp_path: Path) -> None:
    """In one graph, neurons and the statistics' updates included."""
    module = Spiking()
    fit(module, tmp_path, 1, spiking_qat(start_epoch=0))
    plain: Any = module.backbone.train()
    traced, backend = copy.deepcopy(plain), Counting()
    traced.compile(backend=backend, fullgraph=True)
    images, labels = next(iter(loader()))
    for network in (plain, traced):
        nn.functional.cross_entropy(network(images), labels).backward()
    assert backend.graphs == 1
    for (name, p), q in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert_same_state(statistics(traced), statistics(plain))


@pytest.mark.parametrize("kind", [pytest.param("round_robin", marks=pytest.mark.slow), "primesvt"])
def test_prune_then_quantize_in_one_fit(tmp_path: Path, kind: str) -> None:
    """The search runs before the first epoch's end, quantization at the third epoch's beginning."""
    module = Spiking()
    before = sum(p.numel() for p in module.backbone.parameters())
    search: Any
    if kind == "round_robin":
        search = AdaptiveIterativePruning(
            tolerance=100.0, step=0.25, max_rounds=1, round_to=1, kinds=("mlp", "v"), model_attribute="backbone"
        )
    else:
        search = PrimeSVT(
            tolerance=100.0, min_memory_saving=0.05, rates=(0.1, 0.25), max_sparsity=0.6, round_to=1,
            model_attribute="backbone",
        )  # fmt: skip
    fit(module, tmp_path, 3, search, spiking_qat(start_epoch=2))
    quantized: Any = module.backbone
    assert isinstance(quantized, QuantizedNetwork)
    assert sum(p.numel() for p in quantized.network.parameters()) < before
    pixels, _ = pixels_and_labels()
    file = accel.export(quantized.eval(), tmp_path / "model.safetensors")
    assert np.array_equal(
        accel.load(file, threads=1).run_integer(pixels.numpy()), quantized.integer_logits(pixels).numpy()
    )
