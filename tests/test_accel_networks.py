"""Whole networks: what the adapters build runs alike in the torch twin, the reference and every implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.quant_cases import NETWORKS, PREPROCESSING, network_and_images
from torch import nn

from swincompress_pl import accel
from swincompress_pl.data import CIFAR10, ImageClassificationData, ImageNetFolder
from swincompress_pl.models import create_model
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.quant import quantize
from swincompress_pl.registry import adapter_for
from swincompress_pl.report import Accuracy, PairedComparison


@pytest.mark.parametrize("name", NETWORKS)
def test_every_implementation_equals_the_twin(name: str, tmp_path: Path) -> None:
    network, pixels, images = network_and_images(name, count=5)
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    file = accel.export(quantized, tmp_path / "model.safetensors")
    expected = quantized.integer_logits(pixels).numpy()
    assert np.array_equal(accel.reference(file).run_integer(pixels.numpy()), expected)
    for implementation in accel.implementations():
        for threads in (1, 2):
            engine = accel.load(file, threads=threads, implementation=implementation)
            assert np.array_equal(engine.run_integer(pixels.numpy()), expected), (implementation, threads)


@pytest.mark.parametrize("name", ["swin padded", "vit"])
def test_a_pruned_network_equals_the_twin(name: str, tmp_path: Path) -> None:
    network, pixels, images = network_and_images(name, count=5)
    groups = adapter_for(network).groups(network)
    apply_plan(network, PruningPlan.removing(groups, {group.name: [0] for group in groups if group.units > 1}))
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    file = accel.export(quantized, tmp_path / "model.safetensors")
    with torch.no_grad():
        difference = (quantized.eval()(images) - network(images)).abs().mean() / network(images).std()
    assert difference < 0.1
    for implementation in accel.implementations():
        logits = accel.load(file, threads=1, implementation=implementation).run_integer(pixels.numpy())
        assert np.array_equal(logits, quantized.integer_logits(pixels).numpy())


def _compare(
    network: nn.Module, data: ImageClassificationData, images: int, folder: Path
) -> tuple[PairedComparison, str]:
    """Quantizes on 128 training images and runs `images` test images through float network and engine."""
    network.eval()
    preprocessing = data.preprocessing.to_dict()
    quantized = quantize(network, data.calibration_dataloader(128), preprocessing=preprocessing)
    file = accel.export(quantized, folder / "model.safetensors")
    engine, reference = accel.load(file), accel.reference(file)
    before, after, labels = [], [], []
    for pixels, numbers in data.uint8_batches("test"):
        batch = torch.from_numpy(pixels)
        with torch.inference_mode():
            before.append(network(data.preprocessing.normalize(batch)).argmax(1).numpy())
        logits = engine.run_integer(pixels)
        if sum(map(len, labels)) < 200:  # the others are slow
            assert np.array_equal(logits, reference.run_integer(pixels))
            assert np.array_equal(logits, quantized.integer_logits(batch).numpy())
        after.append(logits.argmax(1))
        labels.append(numbers)
        if sum(map(len, labels)) >= images:
            break
    truth = np.concatenate(labels)
    paired = PairedComparison.of(np.concatenate(before), np.concatenate(after), truth)
    return paired, str(Accuracy.of(np.concatenate(before), truth))


@pytest.mark.slow
def test_deit_tiny_on_imagenet_loses_at_most_two_points(shared_data: Path, imagenet_mini: Path, tmp_path: Path) -> None:
    weights = shared_data / "deit_tiny_patch16_224.safetensors"
    network = create_model("deit_tiny_patch16_224", checkpoint_path=weights)
    paired, accuracy = _compare(network, ImageNetFolder(imagenet_mini, batch_size=50), 600, tmp_path)
    assert paired.images == 600
    assert paired.change_points >= -2.0, f"float {accuracy}; {paired}"


@pytest.mark.slow
def test_swin_on_cifar10_loses_at_most_half_a_point(shared_data: Path, cifar10: Path, tmp_path: Path) -> None:
    weights = shared_data / "swin_cifar10.safetensors"
    with safe_open(weights, framework="np") as file:
        arch = json.loads(file.metadata()["arch"])
    network = create_model("SwinTransformer", checkpoint_path=weights, **arch)
    paired, accuracy = _compare(network, CIFAR10(cifar10, batch_size=250), 5_000, tmp_path)
    assert paired.images == 5_000
    assert paired.change_points >= -0.5, f"float {accuracy}; {paired}"
