"""The adapter of timm's Vision Transformers (ViT, DeiT) for pruning and quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from swincompress_pl.models.vit.graph import vit_graph
from swincompress_pl.models.vit.groups import vit_groups, vit_uncovered
from swincompress_pl.pruning import Group
from swincompress_pl.quant import Graph
from swincompress_pl.registry import UnsupportedNetworkError, register


class VisionTransformerAdapter:
    """ViT and distilled DeiT, with class token, register tokens and layer scale."""

    family = "timm Vision Transformer"

    def groups(self, network: Any) -> list[Group]:
        """The structured pruning groups; see `vit_groups`."""
        return vit_groups(network)

    def uncovered(self, network: Any) -> dict[str, str]:
        """{kind of group that the network lacks: why}."""
        return vit_uncovered(network)

    def segments(self, network: Any) -> list[str]:
        """The patch embedding, then the blocks; position embedding and tokens are added between the two."""
        return ["patch_embed", *(f"blocks.{index}" for index, _ in enumerate(network.blocks.children()))]

    def graph(self, network: Any, preprocessing: Mapping[str, Any]) -> Graph:
        """The quantizable graph; an UnsupportedNetworkError for a network without an integer form."""
        if type(network) not in (VisionTransformer, VisionTransformerDistilled):
            raise UnsupportedNetworkError(
                f"{type(network).__name__}: no integer form; quantize and export a timm VisionTransformer, "
                "VisionTransformerDistilled or SwinTransformer itself, not a subclass"
            )
        return vit_graph(network, preprocessing)

    def size_arguments(self, network: Any) -> dict[str, Any]:
        """The arguments of the constructor that give the network's present size."""
        embed = network.patch_embed
        sizes = {"img_size": embed.img_size, "patch_size": embed.patch_size}
        return {name: list(value) for name, value in sizes.items() if value is not None}


register(VisionTransformer, VisionTransformerAdapter())
