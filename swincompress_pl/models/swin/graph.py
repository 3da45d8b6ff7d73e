"""The quantizable graph of timm's Swin Transformer (v1).

Windows, cyclic shift and padding are index arithmetic: one gather before qkv and one after proj. timm's additive mask
of -100 becomes a region label a token; tokens of other regions get probability exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from timm.layers.classifier import ClassifierHead, ClNormMlpClassifierHead
from torch import nn

from swincompress_pl.layer_types import full_name
from swincompress_pl.quant import Graph, GraphBuilder
from swincompress_pl.quant.graph.heads import Head
from swincompress_pl.quant.graph.nodes import MeanNode

IndexArray = npt.NDArray[np.int32]
Size = tuple[int, int]


def swin_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of a SwinTransformer; an UnsupportedNetworkError for a variant without an integer form."""
    build = GraphBuilder(network)
    conv = build.plain("patch_embed.proj", nn.Conv2d)
    height, width = network.patch_embed.img_size
    normed = not isinstance(network.patch_embed.norm, nn.Identity)
    first_residual = build.residual("layers.0.residual", conv.out_channels)
    x = build.pixel_conv(
        "patch_embed.proj",
        quantizer=build.residual("patch_embed.proj", conv.out_channels) if normed else first_residual,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
    )
    if normed:
        x = build.layer_norm("patch_embed.norm", x, quantizer=first_residual)
    size: Size = tuple(network.patch_embed.grid_size)
    for number, stage in enumerate(network.layers):
        residual = "layers.0.residual"
        if not isinstance(stage.downsample, nn.Identity):
            reduction = build.plain(f"layers.{number}.downsample.reduction", nn.Linear)
            residual = build.residual(f"layers.{number}.residual", reduction.out_features)
            x, size = _patch_merging(build, f"layers.{number}.downsample", stage.downsample, x, size, residual)
        elif number > 0:
            residual = build.residual(f"layers.{number}.residual", stage.blocks[0].dim)
            build.refuse(True, f"layers.{number} has no patch merging; only the first stage may lack it")
        for index, block in enumerate(stage.blocks):
            x = _block(build, f"layers.{number}.blocks.{index}", block, x, size, residual)
    _end(build, network, x, size)
    return build.graph(height=height, width=width, channels=conv.in_channels)


def _end(build: GraphBuilder, network: Any, x: str, size: Size) -> None:
    """Adds the final norm, the mean of all tokens, and the head."""
    channels = build.plain("norm", nn.LayerNorm).normalized_shape[0]
    head_type = type(network.head)
    if head_type is ClNormMlpClassifierHead:
        pool, parts = network.head.pool_type, ["head.norm", "head.pre_logits", "head.drop", "head.fc"]
    else:
        build.refuse(
            not isinstance(network.head, ClassifierHead),
            f"its head is {full_name(head_type)}; timm's ClassifierHead or ClNormMlpClassifierHead is needed, with an "
            "nn.Linear, or an nn.Sequential that ends in one, as fc",
        )
        pool, parts = getattr(network.head.global_pool, "pool_type", "avg"), ["head.drop", "head.fc"]
    build.refuse(
        pool != "avg",
        f"global pooling {pool!r}; only 'avg' is supported: network.reset_classifier(num_classes, 'avg') changes it",
    )
    head = Head(network, *parts)
    x = build.layer_norm("norm", x, quantizer=build.residual("norm", channels))
    pooled = build.quantizer(head.operand("head.global_pool", channels))
    x = build.add(MeanNode(name="head.global_pool", inputs=(x,), quantizer=pooled, rows=size[0] * size[1]))
    build.head(head, x)


def _patch_merging(build: GraphBuilder, path: str, merging: Any, x: str, size: Size, residual: str) -> tuple[str, Size]:
    """Joins 2 x 2 neighbors, normalizes them together, and reduces them by a linear layer."""
    x = build.gather(f"{path}.gather", x, merging_index(size))
    x = build.layer_norm(f"{path}.norm", x)
    x = build.linear(f"{path}.reduction", x, quantizer=residual)
    return x, ((size[0] + 1) // 2, (size[1] + 1) // 2)


def _block(build: GraphBuilder, path: str, block: Any, x: str, size: Size, residual: str) -> str:
    attention = block.attn
    head_dim = build.plain(f"{path}.attn.qkv", nn.Linear).out_features // (3 * attention.num_heads)
    into, back, region = window_indices(size, block.window_size, block.shift_size)
    y = build.layer_norm(f"{path}.norm1", x)
    moved = not np.array_equal(into[:, 0], np.arange(size[0] * size[1]))  # one window: nothing to move
    if moved:
        y = build.gather(f"{path}.windows", y, into)
    y = build.attention(
        f"{path}.attn",
        y,
        head_dim=head_dim,
        heads=attention.num_heads,
        windows=region.shape[0],
        bias_index=attention.relative_position_index.cpu().numpy().astype(np.int32),
        region=region if any(block.shift_size) else None,
    )
    y = build.linear(
        f"{path}.attn.proj",
        y,
        quantizer=residual,
        regularizers=build.active(f"{path}.attn.proj_drop", f"{path}.drop_path1"),
    )
    if moved:
        y = build.gather(f"{path}.merge", y, back)
    x = build.residual_add(f"{path}.add1", x, y, residual)
    return build.mlp(path, x, norm=f"{path}.norm2", residual=residual, layer_scale=None, drop_path=f"{path}.drop_path2")


def merging_index(size: Size) -> IndexArray:
    """(rows, 4): the four sources of each output token in timm's order, -1 for the padding of an odd side."""
    height, width = size
    grid = np.full((height + height % 2, width + width % 2), -1, dtype=np.int32)
    grid[:height, :width] = np.arange(height * width).reshape(height, width)
    quads = grid.reshape(grid.shape[0] // 2, 2, grid.shape[1] // 2, 2).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(quads.reshape(-1, 4))


def window_indices(size: Size, window: Size, shift: Size) -> tuple[IndexArray, IndexArray, npt.NDArray[np.uint8]]:
    """The indices (into, back, region) of windows.

    `into` (windows * length, 1) puts tokens into window order, with -1 for padding; `back` (rows, 1) is the way back;
    `region` (windows, length) labels the tokens of a window. As in timm, tokens are rolled by -shift, padded at the
    bottom and right, and cut into windows. The three bands of each axis make the regions.
    """
    height, width = size
    padded = tuple(-(-side // window_side) * window_side for side, window_side in zip(size, window, strict=True))
    grid = np.full(padded, -1, dtype=np.int32)
    grid[:height, :width] = np.roll(np.arange(height * width).reshape(size), (-shift[0], -shift[1]), axis=(0, 1))
    bands = [np.zeros(side, dtype=np.uint8) for side in padded]
    for band, window_side, shift_side in zip(bands, window, shift, strict=True):
        if any(shift):
            band[len(band) - window_side :] = 1
            band[len(band) - shift_side :] = 2
    region = bands[0][:, None] * 3 + bands[1][None, :]

    def cut(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows, columns = padded[0] // window[0], padded[1] // window[1]
        return plane.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3).reshape(rows * columns, -1)

    into = cut(grid).reshape(-1)
    back = np.empty(height * width, dtype=np.int32)
    real = into >= 0
    back[into[real]] = np.flatnonzero(real)
    return into[:, None], back[:, None], cut(region)
