"""Small networks with lively weights, and their images, for the tests of quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.models import create_model

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
SWIN: dict[str, Any] = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("SwinTransformer", {"img_size": 16, **SWIN}),
    "swin padded": ("SwinTransformer", {"img_size": [18, 14], **SWIN}),
    "swin window 5": (
        "SwinTransformer",
        {"img_size": 16, **SWIN, "window_size": 5, "depths": [1, 2, 1], "num_heads": [1, 2, 3]},
    ),
    "swin drop": (
        "SwinTransformer",
        {"img_size": 16, **SWIN, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_rate": 0.1},
    ),
    "vit": ("VisionTransformer", VIT),
    "vit average": ("VisionTransformer", {**VIT, "global_pool": "avg", "class_token": False}),
    "vit registers": (
        "VisionTransformer",
        {**VIT, "reg_tokens": 2, "no_embed_class": True, "init_values": 0.1, "global_pool": "avg", "fc_norm": False},
    ),
    "vit pre-norm": ("VisionTransformer", {**VIT, "pre_norm": True, "qkv_bias": False}),
}


def draw_weights(network: nn.Module) -> None:
    """Random weights of which each counts, by the seed that is set."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def network_and_images(name: str, count: int = 12, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with lively random weights, uint8 pixels (N, H, W, 3) and the normalized images they give."""
    torch.manual_seed(seed)
    model, kwargs = NETWORKS[name]
    network = create_model(model, num_classes=7, **kwargs).eval()
    draw_weights(network)
    pixels = torch.randint(0, 256, (count, *network.patch_embed.img_size, 3), dtype=torch.uint8)  # type: ignore[union-attr]
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return network, pixels, (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
