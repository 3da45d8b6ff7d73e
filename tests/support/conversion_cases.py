"""Small networks of torchvision and transformers, for the tests of to_timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import swin_transformer as swins
from torchvision.models import vision_transformer as vits

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
PLAIN = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = {**PLAIN, "intermediate_size": 48}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def hugging(kind: str, **options: Any) -> nn.Module:
    """A network of transformers, with the constructor's own arguments among the options of its configuration."""
    transformers = pytest.importorskip("transformers")
    own = {name: options.pop(name) for name in ("add_pooling_layer",) if name in options}
    options.setdefault("num_labels", 3)
    kind_of_network = getattr(transformers, kind)
    network: nn.Module = kind_of_network(kind_of_network.config_class(**options), **own)
    return network


def swin(**options: Any) -> nn.Module:
    arguments = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return swins.SwinTransformer(**(arguments | {"num_classes": 3} | options))


def swin_v2(**options: Any) -> nn.Module:
    return swin(block=swins.SwinTransformerBlockV2, downsample_layer=swins.PatchMergingV2, **options)


def vit(**options: Any) -> nn.Module:
    return vits.VisionTransformer(32, 8, 2, 4, 32, 48, **({"num_classes": 3} | options))


def pooled(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images).pooler_output
    return answer


def first_token(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images).last_hidden_state[:, 0]
    return answer


def logits(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images).logits
    return answer


def output(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images)
    return answer


Case = tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str, bool]
# network, its answer, the class of timm, whether it has an integer form
CASES: dict[str, Case] = {
    "ViT": (lambda: hugging("ViTForImageClassification", **VIT), logits, "VisionTransformer", True),
    "ViT of bf16": (
        lambda: hugging("ViTForImageClassification", **VIT, qkv_bias=False).bfloat16(),
        lambda network, images: logits(network.float(), images),
        "VisionTransformer",
        True,
    ),
    "ViT, tanh": (
        lambda: hugging("ViTForImageClassification", **VIT, hidden_act="gelu_pytorch_tanh"),
        logits,
        "VisionTransformer",
        True,
    ),
    "ViT, embedding": (
        lambda: hugging("ViTModel", **VIT, add_pooling_layer=False),
        first_token,
        "VisionTransformer",
        True,
    ),
    "DeiT": (lambda: hugging("DeiTForImageClassification", **VIT), logits, "VisionTransformer", True),
    "DeiT, distilled": (
        lambda: hugging("DeiTForImageClassificationWithTeacher", **VIT),
        logits,
        "VisionTransformerDistilled",
        True,
    ),
    "DINOv2": (lambda: hugging("Dinov2Model", **PLAIN), pooled, "VisionTransformer", True),
    "DINOv2, registers": (
        lambda: hugging("Dinov2WithRegistersModel", **PLAIN, num_register_tokens=2),
        pooled,
        "VisionTransformer",
        True,
    ),
    "Swin": (lambda: hugging("SwinForImageClassification", **WINDOWS), logits, "SwinTransformer", True),
    "Swin, embedding": (lambda: hugging("SwinModel", **WINDOWS), pooled, "SwinTransformer", True),
    "Swin v2": (lambda: hugging("Swinv2ForImageClassification", **WINDOWS), logits, "SwinTransformerV2", False),
    "Swin v2, pretrained windows": (
        lambda: hugging("Swinv2ForImageClassification", **WINDOWS, pretrained_window_sizes=[3, 2]),
        logits,
        "SwinTransformerV2",
        False,
    ),
    "torchvision ViT": (vit, output, "VisionTransformer", True),
    "torchvision Swin": (swin, output, "SwinTransformer", True),
    "torchvision Swin v2": (swin_v2, output, "SwinTransformerV2", False),
}
FEW = {name: CASES[name] for name in ("ViT", "Swin", "torchvision Swin v2")}


def lively(network: nn.Module) -> nn.Module:
    """The network in evaluation, with weights of which each counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
    return network.eval()


PIXELS = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
_MEAN, _STD = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
IMAGES = (PIXELS.permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4 * one.abs().max())
