"""The modules that timm's Swin and ViT run one after the other."""

from __future__ import annotations

from torch import nn


def swin_segments(network: nn.Module) -> list[str]:
    """Patch embedding, then a stage's patch merging and its blocks, for Swin v1 and v2."""
    found = ["patch_embed"]
    layers = network.get_submodule("layers")
    for number, stage in enumerate(layers.children()):
        if not isinstance(stage.downsample, nn.Identity):
            found.append(f"layers.{number}.downsample")
        found += [f"layers.{number}.blocks.{index}" for index, _ in enumerate(stage.get_submodule("blocks").children())]
    return found


def vit_segments(network: nn.Module) -> list[str]:
    """Patch embedding, then the blocks. Position embedding and tokens are added between the two."""
    return ["patch_embed", *(f"blocks.{index}" for index, _ in enumerate(network.get_submodule("blocks").children()))]
