"""The quantizable graph of a feature extractor: the body's stream, with the maps that timm takes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import nn

from swincompress_pl.models.swin.graph import swin_stream
from swincompress_pl.models.vit.graph import vit_stream
from swincompress_pl.quant import Graph, GraphBuilder
from swincompress_pl.quant.graph.nodes import LayerNormNode
from swincompress_pl.quant.graph.outputs import GraphOutput


def vit_features(network: Any, body: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The maps after some blocks: the patches of the residual stream, or of its final norm."""
    build = GraphBuilder(body)
    taken = _taken(network, len(body.blocks))
    height, width = body.patch_embed.grid_size
    layout, outputs = str(network.output_fmt.value), []
    for index, x in enumerate(vit_stream(build, body, preprocessing), start=-1):
        if index in taken:
            name = f"blocks.{index}"
            if network.norm:
                x = _norm(build, name, x, body.embed_dim)
            first, patches = body.num_prefix_tokens, height * width
            if first:
                x = build.gather(f"{name}.patches", x, np.arange(first, first + patches, dtype=np.int32)[:, None])
            outputs.append(_output(name, x, (height, width), body.embed_dim, layout))
    height, width = body.patch_embed.img_size
    return build.graph(height=height, width=width, channels=_channels(build), outputs=_without_rest(build, outputs))


def swin_features(network: Any, body: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The maps after some stages: the residual stream, and of the last stage its final norm where timm takes that."""
    build = GraphBuilder(body)
    getter = isinstance(network, FeatureGetterNet)
    stages = len(body.layers)
    taken = _taken(network, stages) if getter else [int(name.rpartition("_")[2]) for name in network.return_layers]
    outputs = []
    for index, (x, size) in enumerate(swin_stream(build, body, preprocessing)):
        if index in taken:
            name, channels = f"layers.{index}", body.layers[index].blocks[0].mlp.fc2.out_features
            if getter and network.norm and index == stages - 1:
                x = _norm(build, name, x, channels)
            outputs.append(_output(name, x, size, channels, "NCHW" if getter else "NHWC"))
    height, width = body.patch_embed.img_size
    return build.graph(height=height, width=width, channels=_channels(build), outputs=_without_rest(build, outputs))


def _taken(network: Any, count: int) -> list[int]:
    """The indices that timm's `forward_intermediates` takes, in its order."""
    return sorted(set(feature_take_indices(count, network.out_indices)[0]))


def _norm(build: GraphBuilder, name: str, x: str, channels: int) -> str:
    """The final norm, which several maps may share, each with a scale of its own."""
    if isinstance(build.network.get_submodule("norm"), nn.Identity):
        return x
    build.plain("norm", nn.LayerNorm)
    quantizer = build.residual(f"{name}.norm", channels)
    return build.add(LayerNormNode(name=f"{name}.norm", inputs=(x,), quantizer=quantizer, module="norm"))


def _output(name: str, value: str, size: Sequence[int], channels: int, layout: str) -> GraphOutput:
    shape = (size[0] * size[1], channels) if layout == "NLC" else (size[0], size[1], channels)
    return GraphOutput(name=name, value=value, shape=shape, layout=layout)


def _channels(build: GraphBuilder) -> int:
    return build.plain("patch_embed.proj", nn.Conv2d).in_channels


def _without_rest(build: GraphBuilder, outputs: Sequence[GraphOutput]) -> Sequence[GraphOutput]:
    """The outputs; what comes after the last of them, which nobody reads, is taken out of the builder."""
    last = outputs[-1].value
    build.cut_after(last)
    return outputs
