"""Quantization: scales for every value of a network, trained or searched, and its exact integer form.

`quantize` makes a `QuantizedNetwork`; adapters describe a family with `GraphBuilder` and the node types.
"""

from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.diagnosis.diagnosis import (
    Diagnosis,
    Effect,
    QuantizerCost,
    cost_table,
    diagnose,
    quantization_errors,
    quantizer_costs,
)
from swincompress_pl.quant.diagnosis.quantization_errors import Histogram, QuantizationError, error_table
from swincompress_pl.quant.graph.builder import GraphBuilder
from swincompress_pl.quant.graph.graph import Graph, Node, WeightedNode, float_logits
from swincompress_pl.quant.graph.nodes import (
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
from swincompress_pl.quant.graph.quantizer_spec import QuantizerSpec
from swincompress_pl.quant.mixed_precision import (
    LayerSensitivity,
    Sensitivity,
    allocate,
    measure_sensitivity,
    mixed_precision,
)
from swincompress_pl.quant.network import METHODS, QuantizedNetwork, find_preprocessing
from swincompress_pl.quant.quantize import SearchOptions, quantize

__all__ = [
    "METHODS",
    "ActivationNode",
    "AddConstantNode",
    "AddNode",
    "AttentionNode",
    "Bits",
    "Diagnosis",
    "Effect",
    "GatherNode",
    "Graph",
    "GraphBuilder",
    "Histogram",
    "LayerNormNode",
    "LayerSensitivity",
    "LinearNode",
    "MeanNode",
    "Node",
    "PixelConvNode",
    "PrependNode",
    "QuantizationError",
    "QuantizedNetwork",
    "QuantizerCost",
    "QuantizerSpec",
    "SearchOptions",
    "Sensitivity",
    "WeightedNode",
    "allocate",
    "cost_table",
    "diagnose",
    "error_table",
    "find_preprocessing",
    "float_logits",
    "measure_sensitivity",
    "mixed_precision",
    "quantization_errors",
    "quantize",
    "quantizer_costs",
]
