"""The quantizable graph of timm's Vision Transformer (ViT, DeiT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import nn

from swincompress_pl.layer_types import full_name
from swincompress_pl.models.vit.end import distilled_end, end
from swincompress_pl.quant import Graph, GraphBuilder
from swincompress_pl.quant.graph.nodes import AddConstantNode, PrependNode


def vit_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of a VisionTransformer; an UnsupportedNetworkError for a variant without an integer form."""
    build = GraphBuilder(network)
    *_, x = vit_stream(build, network, preprocessing)
    if isinstance(network, VisionTransformerDistilled):
        distilled_end(build, network, x)
    else:
        end(build, network, x)
    height, width = network.patch_embed.img_size
    channels = build.plain("patch_embed.proj", nn.Conv2d).in_channels
    return build.graph(height=height, width=width, channels=channels)


def vit_stream(build: GraphBuilder, network: Any, preprocessing: Mapping[str, Any]) -> Iterator[str]:
    """Adds embedding and blocks, and yields the residual stream after the embedding and after each block."""
    _refuse_variants(build, network)
    residual = build.residual("residual", network.embed_dim)
    x = _embedding(build, network, preprocessing, residual)
    yield x
    for index, block in enumerate(network.blocks):
        x = _block(build, f"blocks.{index}", block, x, residual)
        yield x


def _refuse_variants(build: GraphBuilder, network: Any) -> None:
    build.refuse(not isinstance(network.patch_drop, nn.Identity), "patch_drop_rate > 0; set it to 0")
    build.refuse(
        not isinstance(network.patch_embed, PatchEmbed),
        f"patch_embed is {full_name(type(network.patch_embed))}; timm's PatchEmbed, a single convolution, is supported",
    )
    _refuse_padding(build, network.patch_embed)
    build.refuse(
        not isinstance(network.patch_embed.norm, nn.Identity),
        "a norm inside patch_embed; only plain patch embedding is supported",
    )
    for index, block in enumerate(network.blocks):
        build.refuse(
            type(block) is not Block, f"blocks.{index} is {type(block).__name__}; only timm's plain Block is supported"
        )
        attention = block.attn
        plain = type(attention) is Attention and attention.gate is None
        plain = plain and all(
            isinstance(getattr(attention, name), nn.Identity) for name in ("q_norm", "k_norm", "norm")
        )
        build.refuse(
            not plain, f"blocks.{index}.attn has q/k norms, a scale norm, a gate or another type; not supported"
        )
        build.refuse(
            isinstance(block.mlp, GluMlp | SwiGLU),
            f"blocks.{index}.mlp is {full_name(type(block.mlp))}; a gated MLP is not supported, timm's Mlp is",
        )
        for name in ("ls1", "ls2"):
            scale = getattr(block, name)
            build.refuse(
                type(scale) not in (nn.Identity, LayerScale),
                f"blocks.{index}.{name} is {full_name(type(scale))}; timm's LayerScale is supported",
            )


def _refuse_padding(build: GraphBuilder, embed: PatchEmbed) -> None:
    sides = list(zip(embed.img_size, embed.patch_size, strict=True))
    build.refuse(
        embed.dynamic_img_pad and any(side % patch for side, patch in sides),
        f"dynamic_img_pad=True pads images of {embed.img_size} pixels to patches of {embed.patch_size}; integers have "
        "no padding there: give sides that are multiples of the patches by "
        f"network.set_input_size({tuple(-(-side // patch) * patch for side, patch in sides)})",
    )


def _embedding(build: GraphBuilder, network: Any, preprocessing: Mapping[str, Any], residual: str) -> str:
    """The patches with position embedding and prefix tokens, which take their rows of the embedding here."""
    covers_prefix = network.pos_embed is not None and not network.no_embed_class
    x = build.pixel_conv("patch_embed.proj", quantizer=residual, mean=preprocessing["mean"], std=preprocessing["std"])
    dropout = build.active("pos_drop")
    if network.pos_embed is not None:
        first = network.num_prefix_tokens if covers_prefix else 0
        x = build.add(
            AddConstantNode(
                name="pos_embed",
                inputs=(x,),
                quantizer=residual,
                parameter="pos_embed",
                first=first,
                regularizers=dropout,
            )
        )
    names = ("cls_token", "dist_token" if isinstance(network, VisionTransformerDistilled) else "reg_token")
    tokens = tuple(name for name in names if getattr(network, name) is not None)
    if tokens:
        x = build.add(
            PrependNode(
                name="prefix_tokens",
                inputs=(x,),
                quantizer=residual,
                parameters=tokens,
                position="pos_embed" if covers_prefix else None,
            )
        )
    if not isinstance(network.norm_pre, nn.Identity):
        x = build.layer_norm("norm_pre", x, quantizer=residual)
    return x


def _block(build: GraphBuilder, path: str, block: Any, x: str, residual: str) -> str:
    attention = block.attn
    scales = [
        f"{path}.{name}.gamma" if not isinstance(getattr(block, name), nn.Identity) else None for name in ("ls1", "ls2")
    ]
    y = build.layer_norm(f"{path}.norm1", x)
    y = build.attention(f"{path}.attn", y, head_dim=attention.head_dim, heads=attention.num_heads)
    y = build.linear(
        f"{path}.attn.proj",
        y,
        quantizer=residual,
        layer_scale=scales[0],
        regularizers=build.active(f"{path}.attn.proj_drop", f"{path}.drop_path1"),
    )
    x = build.residual_add(f"{path}.add1", x, y, residual)
    return build.mlp(
        path, x, norm=f"{path}.norm2", residual=residual, layer_scale=scales[1], drop_path=f"{path}.drop_path2"
    )
