"""A graph at the widths of `Bits`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.graph.graph import Graph
from swincompress_pl.quant.graph.quantizer_spec import QuantizerSpec


def weight_bits(graph: Graph, bits: Bits) -> dict[str, int]:
    """{layer: the width of its weights}."""
    nodes = graph.weighted_nodes
    return {node.name: bits.of_layer(node.name, outer=node in (nodes[0], nodes[-1])) for node in nodes}


def with_bits(graph: Graph, bits: Bits, unsigned: Collection[str] = ()) -> Graph:
    """`graph` with its 8-bit quantizers at the widths of `bits`, and those named in `unsigned` without a sign.

    A ValueError is raised for a layer or a quantizer that the graph does not have, or a sign that cannot go.
    """
    layers = {node.name for node in graph.weighted_nodes}
    unknown = sorted(set(bits.layers) - layers)
    if unknown:
        raise ValueError(f"bits.layers names {unknown[0]!r}; the layers are {', '.join(sorted(layers))}")
    last = graph.spec_of(graph.weighted_nodes[-1].inputs[0])

    def adapted(spec: QuantizerSpec) -> QuantizerSpec:
        if not spec.searched:
            return spec
        width = bits.first_and_last if spec == last else bits.activations if spec.operand else spec.bits
        return replace(spec, bits=width, signed=spec.signed and spec.name not in unsigned)

    lost = sorted(
        set(unsigned) - {name for name, spec in graph.quantizers.items() if spec.searched and not spec.equalized}
    )
    if lost:
        raise ValueError(f"unsigned names {lost[0]!r}, which is not an 8-bit activation quantizer with its own scale")
    return replace(graph, quantizers={name: adapted(spec) for name, spec in graph.quantizers.items()})
