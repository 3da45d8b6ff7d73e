"""Quantization where the network is on another device: a pretended one, and a GPU where there is one."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from support.elsewhere import ELSEWHERE, Away, elsewhere
from support.quant_cases import PREPROCESSING, network_and_images
from torch import Tensor, nn

from swincompress_pl import spec
from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.quant import QuantizedNetwork, quantize

LEARNED = {"rows": 64, "rounding": "learned", "learning": {"iterations": 2, "sensitive": True}}
OPTIONS: dict[str, dict[str, Any]] = {
    "affine": {"method": "affine"},
    "percentile": {"method": "max", "percentile": 99.9, "bits": "W6A6"},
    "searched": {"search": {"rows": 64, "bias_correction": True}},
    "learned": {"search": LEARNED, "bits": "W4A8"},
}


@pytest.fixture(autouse=True)
def autocast_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no autocast for the pretended device."""
    real = torch.autocast

    def autocast(device_type: str, **options: Any) -> Any:
        return contextlib.nullcontext() if device_type == ELSEWHERE.type else real(device_type, **options)

    monkeypatch.setattr(torch, "autocast", autocast)


def test_the_pretended_device_refuses_what_a_real_one_refuses() -> None:
    with elsewhere():
        away = torch.ones(3).to(ELSEWHERE)
        assert isinstance(away, Away)
        assert torch.zeros(2, device=ELSEWHERE).device == ELSEWHERE
        assert (away + torch.tensor(1.0)).device == ELSEWHERE
        assert away[torch.tensor([0])].device == ELSEWHERE
        assert torch.equal((2 * away).cpu(), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError, match="on the CPU, the rest is elsewhere"):
            away + torch.ones(3)
        with pytest.raises((TypeError, RuntimeError)):
            away.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["swin padded", "vit registers"])
def test_quantization_stays_on_the_networks_device(name: str, options: dict[str, Any]) -> None:
    network, pixels, images = network_and_images(name)
    with elsewhere():
        _quantize_train_and_compare(network.to(ELSEWHERE), pixels, images, ELSEWHERE, options)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qkformer", "meta-spikeformer", "e-spikeformer"])
def test_a_spiking_network_is_quantized_on_its_device(family: str) -> None:
    from support.spiking_cases import (  # not where spikingjelly is missing, as on some GPU machines
        ALL,
        SIZE_PX,
        lively,
    )

    network, images = lively(ALL[family], 0, trained_statistics=True)
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3, "height": SIZE_PX, "width": SIZE_PX}
    images = images.float().clamp(-1.5, 1.5)
    pixels = ((images * 0.25 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous()
    with elsewhere():
        network = network.float().to(ELSEWHERE)
        _quantize_train_and_compare(network, pixels, images, ELSEWHERE, {"search": {"rows": 64}}, preprocessing)


def _quantize_train_and_compare(
    network: nn.Module,
    pixels: Tensor,
    images: Tensor,
    device: torch.device,
    options: dict[str, Any],
    preprocessing: dict[str, Any] = PREPROCESSING,
) -> None:
    """Quantization, the integers, a step of training with learned scales, and the integers again."""
    quantized = quantize(network, images.split(4), preprocessing=preprocessing, **options).eval()
    there = images.to(device)
    if quantized.method == "affine":
        assert quantized(there).device == device
        return
    _assert_equal_to_the_reference(quantized, pixels, device)
    quantized.learn_scales()
    optimizer = torch.optim.AdamW(quantized.train().parameters(), lr=1e-3)
    quantized(there).square().mean().backward()
    optimizer.step()
    _assert_equal_to_the_reference(quantized.eval(), pixels, device)
    assert all(tensor.device == device for tensor in (*quantized.parameters(), *quantized.buffers()))


def _assert_equal_to_the_reference(quantized: QuantizedNetwork, pixels: Tensor, device: torch.device) -> None:
    found = quantized.integer_logits(pixels.to(device)).cpu().numpy()
    assert np.array_equal(found, spec.run(quantized.to_program(), pixels.numpy()))


def test_the_twin_refuses_pixels_of_another_device() -> None:
    network, pixels, images = network_and_images("vit")
    with elsewhere():
        quantized = quantize(network.to(ELSEWHERE), [images], preprocessing=PREPROCESSING, method="max").eval()
        with pytest.raises(ValueError, match="images are on cpu, the network on lazy"):
            quantized.integer_logits(pixels)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["swin padded", "vit registers"])
def test_the_integers_of_a_gpu_are_the_references(name: str, options: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    network, pixels, images = network_and_images(name)
    _quantize_train_and_compare(network.to(device), pixels, images, device, options)


@needs_gpu
def test_a_gpus_tf32_does_not_enter_the_integers() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    device = torch.device("cuda", 0)
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        network, pixels, images = network_and_images("swin")
        _quantize_train_and_compare(network.to(device), pixels, images, device, {"method": "max"})
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@needs_gpu
def test_the_program_of_a_gpu_is_that_of_the_cpu() -> None:
    network, _, images = network_and_images("swin")
    quantized = quantize(network.cuda(), [images], preprocessing=PREPROCESSING, bits="W4A8").eval()
    quantized.learn_scales()
    there = quantized.to_program()
    here = copy.deepcopy(quantized).cpu().to_program()
    assert all(np.array_equal(there.tensors[key], here.tensors[key]) for key in there.tensors)


@needs_gpu
def test_quantization_aware_training_on_a_gpu() -> None:
    lightning.seed_everything(0, verbose=False)
    module = CompressibleClassifier(
        "VisionTransformer",
        4,
        model_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    )
    pixels = torch.randint(0, 256, (32, 16, 16, 3), dtype=torch.uint8)
    images, labels = (pixels.movedim(-1, 1).float() / 255 - 0.5) / 0.25, torch.randint(0, 4, (32,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    callback = QuantizationAwareTraining(
        start_epoch=1, bits="W4A8", distillation=0.5, preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3}
    )
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="gpu", devices=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, data)
    quantized = module.net
    assert isinstance(quantized, QuantizedNetwork)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        _assert_equal_to_the_reference(quantized.to(device).eval(), pixels, device)
