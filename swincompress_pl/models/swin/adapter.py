"""The adapter of timm's Swin Transformers for pruning and quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from swincompress_pl.models.swin.graph import swin_graph
from swincompress_pl.models.swin.groups import swin_groups
from swincompress_pl.pruning import Group
from swincompress_pl.quant import Graph
from swincompress_pl.registry import UnsupportedNetworkError, register


class SwinAdapter:
    """Swin v1 for everything; v2 for pruning only, as its cosine attention and res-post-norm have no integer form."""

    family = "timm Swin Transformer"

    def groups(self, network: Any) -> list[Group]:
        """The structured pruning groups; see `swin_groups`."""
        return swin_groups(network)

    def segments(self, network: Any) -> list[str]:
        """The patch embedding, then the patch merging and the blocks of each stage."""
        found = ["patch_embed"]
        for number, stage in enumerate(network.layers.children()):
            if not isinstance(stage.downsample, nn.Identity):
                found.append(f"layers.{number}.downsample")
            found += [f"layers.{number}.blocks.{index}" for index, _ in enumerate(stage.blocks.children())]
        return found

    def graph(self, network: Any, preprocessing: Mapping[str, Any]) -> Graph:
        """The quantizable graph; an UnsupportedNetworkError for a network without an integer form."""
        if type(network) is not SwinTransformer:
            raise UnsupportedNetworkError(
                f"{type(network).__name__}: no integer form; quantize and export a timm SwinTransformer (v1) or "
                f"VisionTransformer. Swin v2 can be pruned, not quantized"
            )
        return swin_graph(network, preprocessing)

    def size_arguments(self, network: Any) -> dict[str, Any]:
        """The arguments of the constructor that give the network's present size."""
        first = [stage.blocks[0] for stage in network.layers]
        return {
            "img_size": list(network.patch_embed.img_size),
            "patch_size": list(network.patch_embed.patch_size),
            "window_size": [list(block.window_size) for block in first],
            "always_partition": bool(first[0].always_partition),
        }


register(SwinTransformer, SwinAdapter())
register(SwinTransformerV2, SwinAdapter())
