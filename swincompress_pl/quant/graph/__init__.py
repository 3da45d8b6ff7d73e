"""A network as a graph of quantizable nodes, from which training, calibration and the integer Program are derived."""

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.quant.graph.graph import (
    Delegating,
    Graph,
    Lowering,
    Node,
    Passthrough,
    Quantizer,
    Run,
    WeightedNode,
    float_logits,
)
from swincompress_pl.quant.graph.quantizer_spec import QuantizerSpec

__all__ = [
    "Delegating",
    "Graph",
    "Lowering",
    "Node",
    "Passthrough",
    "Quantizer",
    "QuantizerSpec",
    "Run",
    "WeightedNode",
    "float_logits",
]


def __getattr__(name: str) -> object:
    return find_old_name("quant.graph", name)
