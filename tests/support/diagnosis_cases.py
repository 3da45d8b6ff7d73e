"""Small networks whose quantization is measured quantizer by quantizer, and their images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.quant_cases import PREPROCESSING, VIT
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize

LABELS = torch.arange(16) % 7
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "SwinTransformer",
        {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    ),
    "vit": ("VisionTransformer", VIT),
}


def network_and_images(name: str = "vit", count: int = 32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, kwargs = NETWORKS[name]
    network = create_model(model, num_classes=7, **kwargs).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return network, (torch.randint(0, 256, (count, 3, 16, 16)) / 255 - mean) / std


def quantized_and_images(name: str = "vit", *, bits: str = "W8A8", method: str = "max") -> tuple[Any, Tensor]:
    network, images = network_and_images(name, count=16)
    return quantize(network, [images], bits=bits, method=method, preprocessing=PREPROCESSING), images
