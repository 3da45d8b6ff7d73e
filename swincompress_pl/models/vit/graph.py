"""The quantizable graph of timm's Vision Transformer (ViT, DeiT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from swincompress_pl.layer_types import full_name
from swincompress_pl.quant import Graph, GraphBuilder, QuantizerSpec
from swincompress_pl.quant.graph.nodes import AddConstantNode, MeanNode, PrependNode


def vit_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of a VisionTransformer; an UnsupportedNetworkError for a variant without an integer form."""
    build = GraphBuilder(network)
    _refuse_pooling(build, network)
    *_, x = vit_stream(build, network, preprocessing)
    x = _pool(build, network, x)
    build.head("head", x)
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


def _refuse_pooling(build: GraphBuilder, network: Any) -> None:
    build.refuse(network.attn_pool is not None, f"global_pool={network.global_pool!r}; use 'token' or 'avg'")
    build.refuse(
        network.global_pool not in ("token", "avg"), f"global_pool={network.global_pool!r}; use 'token' or 'avg'"
    )


def _refuse_variants(build: GraphBuilder, network: Any) -> None:
    build.refuse(
        network.dynamic_img_size,
        "dynamic_img_size=True; the engine needs one image size: create it with dynamic_img_size=False",
    )
    build.refuse(not isinstance(network.patch_drop, nn.Identity), "patch_drop_rate > 0; set it to 0")
    build.refuse(
        not isinstance(network.patch_embed, PatchEmbed),
        f"patch_embed is {full_name(type(network.patch_embed))}; timm's PatchEmbed, a single convolution, is supported",
    )
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
    tokens = tuple(name for name in ("cls_token", "reg_token") if getattr(network, name) is not None)
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


def _pool(build: GraphBuilder, network: Any, x: str) -> str:
    """Selects the class token before the norm, which acts on each token, or averages between norm and fc_norm."""
    dropout = build.active("head_drop")
    tokens = network.num_prefix_tokens + network.patch_embed.num_patches
    norm_path = "norm" if not isinstance(network.norm, nn.Identity) else None
    fc_norm_path = "fc_norm" if not isinstance(network.fc_norm, nn.Identity) else None
    build.refuse(norm_path is None and fc_norm_path is None, "no final norm; final_norm=True is needed")
    build.refuse(norm_path is not None and fc_norm_path is not None, "both norm and fc_norm; only one is supported")
    if network.global_pool == "token":
        x = build.gather("class_token", x, np.zeros((1, 1), dtype=np.int32))
        return build.layer_norm(norm_path or "fc_norm", x, regularizers=dropout)
    first = 0 if network.pool_include_prefix else network.num_prefix_tokens
    if first:
        x = build.gather("patch_tokens", x, np.arange(first, tokens, dtype=np.int32)[:, None])
    if norm_path is not None:
        x = build.layer_norm(norm_path, x, quantizer=build.residual("norm", network.embed_dim))
    spec = QuantizerSpec(name="pool", segments=(network.embed_dim,), bits=16 if fc_norm_path else 8)
    x = build.add(
        MeanNode(
            name="pool",
            inputs=(x,),
            quantizer=build.quantizer(spec),
            rows=tokens - first,
            regularizers=() if fc_norm_path else dropout,
        )
    )
    return build.layer_norm("fc_norm", x, regularizers=dropout) if fc_norm_path else x
