"""Quantization: scales for every value of a network, searched or trained, and its exact integer form.

`quantize` returns a `QuantizedNetwork`. Adapters describe a family of networks with `GraphBuilder` and the nodes of
`quant.graph.nodes`.
"""

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.diagnosis import (
    Diagnosis,
    cost_table,
    diagnose,
    error_table,
    quantization_errors,
    quantizer_costs,
)
from swincompress_pl.quant.graph import Graph, Node, QuantizerSpec, WeightedNode, float_logits
from swincompress_pl.quant.graph.builder import GraphBuilder
from swincompress_pl.quant.mixed_precision import allocate, mixed_precision
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.quantize import SearchOptions, quantize
from swincompress_pl.quant.rounding import Learning
from swincompress_pl.quant.sensitivity import Sensitivity, measure_sensitivity

__all__ = [
    "Bits",
    "Diagnosis",
    "Graph",
    "GraphBuilder",
    "Learning",
    "Node",
    "QuantizedNetwork",
    "QuantizerSpec",
    "SearchOptions",
    "Sensitivity",
    "WeightedNode",
    "allocate",
    "cost_table",
    "diagnose",
    "error_table",
    "float_logits",
    "measure_sensitivity",
    "mixed_precision",
    "quantization_errors",
    "quantize",
    "quantizer_costs",
]


def __getattr__(name: str) -> object:
    return find_old_name("quant", name)


def __dir__() -> list[str]:
    return list(__all__)
