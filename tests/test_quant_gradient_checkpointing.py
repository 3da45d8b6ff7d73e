"""Gradient checkpointing of the fake-quantized pass: less memory, and nothing else is different."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.spiking_cases import small_spikformer
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from swincompress_pl.quant import QuantizedNetwork, quantize

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3}
SPIKING = {**PREPROCESSING, "height": 16, "width": 16}


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
    return VisionTransformer(num_classes=3, **sizes, **options)


def swin(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    return SwinTransformer(window_size=4, num_classes=3, **sizes, **options)


def spikformer() -> nn.Module:
    torch.manual_seed(0)
    network = small_spikformer()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(module.bias, 1.5)
    return network


def images(count: int = 4) -> Tensor:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    return (pixels / 255 - 0.5) / 0.25


def checkpointed(network: nn.Module, on: bool = True) -> None:
    if hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(on)
    else:
        network.grad_checkpointing = on  # type: ignore[assignment]  # a flag of timm's


def quantized(build: Callable[[], nn.Module], *, learned: bool = True) -> QuantizedNetwork:
    preprocessing = SPIKING if build is spikformer else PREPROCESSING
    network = quantize(build(), [images()], method="max", preprocessing=preprocessing)
    if learned:
        network.learn_scales()
    return network


def step(network: QuantizedNetwork) -> dict[str, Tensor]:
    """The logits of a training pass, all gradients, and the buffers after it."""
    torch.manual_seed(3)
    logits = network(images())
    logits.square().sum().backward()
    found = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    return {"logits": logits.detach(), **found}


def saved_bytes(run: Callable[[], Any]) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("build", [vit, swin, spikformer, lambda: vit(drop_path_rate=0.3, proj_drop_rate=0.2)])
def test_results_gradients_and_statistics_are_those_without(build: Callable[[], nn.Module], learned: bool) -> None:
    plain = quantized(build, learned=learned)
    other = quantized(build, learned=learned)
    checkpointed(other.network)
    expected, found = step(plain), step(other)
    assert found.keys() == expected.keys()
    assert sum(name.startswith("gradient") for name in found) > 10
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("build", [vit, swin])
def test_it_saves_memory_before_and_after_quantization(build: Callable[[], nn.Module]) -> None:
    network = build()
    checkpointed(network)
    before = quantize(network, [images()], method="max", preprocessing=PREPROCESSING)
    after = quantized(build, learned=False)
    plain = saved_bytes(lambda: after(images()))
    checkpointed(after.network)
    assert saved_bytes(lambda: after(images())) < plain / 3
    assert saved_bytes(lambda: before(images())) < plain / 3
    checkpointed(after.network, False)
    assert saved_bytes(lambda: after(images())) == plain


def test_only_the_blocks_that_say_so() -> None:
    half, whole = quantized(swin), quantized(swin)
    plain = saved_bytes(lambda: half(images()))
    half.network.layers[0].grad_checkpointing = True
    checkpointed(whole.network)
    assert saved_bytes(lambda: whole(images())) < saved_bytes(lambda: half(images())) < plain


def test_gradients_may_be_asked_for_twice() -> None:
    network = quantized(spikformer)
    checkpointed(network.network)
    logits = network(images())
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    first = torch.autograd.grad(logits.sum(), list(network.network.parameters()), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(logits.sum(), list(network.network.parameters()), allow_unused=True)
    assert all(one is two or torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in network.named_buffers())


def test_compiled_training_says_that_it_does_none() -> None:
    network = quantized(vit)
    network.compile_with(lambda function: function)
    checkpointed(network.network)
    with pytest.warns(UserWarning, match="gradient checkpointing"):
        network(images())


def test_evaluation_is_as_ever() -> None:
    network = quantized(vit, learned=False)
    expected = network.eval()(images())
    checkpointed(network.network)
    assert torch.equal(network.eval()(images()), expected)
