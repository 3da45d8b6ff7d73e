"""Quantization: scales for every value of a network, trained or searched, and its exact integer form.

`quantize` makes a `QuantizedNetwork`; adapters describe a family with `GraphBuilder` and the node types.
"""

from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.build import GraphBuilder
from swincompress_pl.quant.graph import Graph, Node, Site, WeightedNode, float_logits
from swincompress_pl.quant.network import METHODS, QuantizedNetwork, find_preprocessing
from swincompress_pl.quant.nodes import (
    ActivationNode,
    AddConstantNode,
    AddNode,
    AttentionNode,
    GatherNode,
    LayerNormNode,
    LinearNode,
    MeanNode,
    PixelConvNode,
    PrependNode,
)
from swincompress_pl.quant.quantize import SearchOptions, quantize

__all__ = [
    "METHODS",
    "ActivationNode",
    "AddConstantNode",
    "AddNode",
    "AttentionNode",
    "Bits",
    "GatherNode",
    "Graph",
    "GraphBuilder",
    "LayerNormNode",
    "LinearNode",
    "MeanNode",
    "Node",
    "PixelConvNode",
    "PrependNode",
    "QuantizedNetwork",
    "SearchOptions",
    "Site",
    "WeightedNode",
    "find_preprocessing",
    "float_logits",
    "quantize",
]
