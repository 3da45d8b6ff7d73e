"""A network whose size changed after it was made: checkpoints and artifacts say the size that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.history import creation_of
from swincompress_pl.models import CompressibleClassifier, create_model, rebuild
from swincompress_pl.quant import quantize

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3}
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
SPIKFORMER = {
    "T": 2,
    "img_size_h": 16,
    "img_size_w": 16,
    "patch_size": 4,
    "embed_dims": 16,
    "num_heads": 2,
    "depths": 1,
}
RESIZED: dict[str, tuple[str, dict[str, Any], Any, int]] = {
    "swin, image and window": ("swin", SWIN, lambda net: net.set_input_size(img_size=24, window_size=6), 24),
    "swin, image": ("swin", SWIN, lambda net: net.set_input_size(img_size=24), 24),
    "swin, window": ("swin", SWIN, lambda net: net.set_input_size(window_size=2), 16),
    "vit, image": ("vit", VIT, lambda net: net.set_input_size(img_size=24), 24),
    "vit, patches": ("vit", VIT, lambda net: net.set_input_size(patch_size=4), 16),
    "time steps": ("Spikformer", SPIKFORMER, lambda net: setattr(net, "T", 3), 16),
}


def images(size: int, count: int = 8) -> torch.Tensor:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1))
    return (pixels / 255 - 0.5) / 0.25


@pytest.mark.parametrize("name", RESIZED)
def test_a_checkpoint_builds_the_network_of_now(tmp_path: Path, name: str) -> None:
    model, kwargs, resize, size = RESIZED[name]
    torch.manual_seed(0)
    module = CompressibleClassifier(model, 3, model_kwargs=kwargs)
    resize(module.net)
    data = DataLoader(TensorDataset(images(size), torch.arange(8) % 3), batch_size=4)
    prune = AdaptiveIterativePruning(tolerance=100.0, step=0.25, kinds=("mlp",))
    run = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", callbacks=[prune], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(module, data, data)
    run.save_checkpoint(tmp_path / "now.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "now.ckpt", weights_only=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(size)), module.eval()(images(size)))
    again = tmp_path / "again.ckpt"
    run.save_checkpoint(again)
    first, second = (torch.load(path, weights_only=True)["hyper_parameters"] for path in (tmp_path / "now.ckpt", again))
    assert first == second


@pytest.mark.parametrize("name", ["swin, image and window", "vit, image"])
def test_an_artifact_s_origin_builds_the_network_of_now(name: str) -> None:
    model, kwargs, resize, size = RESIZED[name]
    network = create_model(model, num_classes=3, **kwargs)
    resize(network)
    quantized = quantize(network, [images(size)], method="max", preprocessing=PREPROCESSING)
    origin = json.loads(json.dumps(quantized.to_program().origin))
    assert shapes(rebuild(origin)) == shapes(network)


@pytest.mark.parametrize(("model", "kwargs"), [("swin", SWIN), ("vit", VIT), ("Spikformer", SPIKFORMER)])
def test_a_network_that_kept_its_size_says_what_it_was_made_with(model: str, kwargs: dict[str, Any]) -> None:
    network = create_model(model, num_classes=3, **kwargs)
    if model != "Spikformer":
        quantize(network, [images(16)], method="max", preprocessing=PREPROCESSING)
    assert creation_of(network) == {"name": model, "kwargs": {**kwargs, "num_classes": 3}}


def shapes(network: nn.Module) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
