"""The quantizable graph of Meta-SpikeFormer. Importing this imports spikingjelly; the adapter does so on use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swincompress_pl.models.spiking.graph_builder import SpikingBuilder
from swincompress_pl.quant import Graph, QuantizerSpec

_REAL = QuantizerSpec(name="", segments=(1,))  # the builder sets both


def meta_spikeformer_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of Meta-SpikeFormer: a stream of membrane potentials, real values inside separable convolutions."""
    build = SpikingBuilder(network, preprocessing)
    x = "images"
    for number, stage in enumerate(network.stages):
        path = f"stages.{number}"
        spikes = x if number == 0 else build.neuron(f"{path}.downsample.lif", x)
        x = build.conv(f"{path}.downsample.conv", [f"{path}.downsample.bn"], spikes)
        for index, block in enumerate(stage.blocks):
            part = f"{path}.blocks.{index}"
            mixer = _separable_conv if hasattr(block.mixer, "depthwise") else _meta_attention
            x = build.stream(f"{part}.add1", x, mixer(build, f"{part}.mixer", x))
            spikes = build.neuron(f"{part}.mlp.lif1", x)
            spikes = build.conv_neuron(f"{part}.mlp.conv1", f"{part}.mlp.bn1", f"{part}.mlp.lif2", spikes)
            x = build.stream(f"{part}.add2", x, build.conv(f"{part}.mlp.conv2", [f"{part}.mlp.bn2"], spikes))
    build.head_on_stream("head", "head_lif", x)
    return build.finished()


def _separable_conv(build: SpikingBuilder, path: str, x: str) -> str:
    y = build.conv_neuron(f"{path}.conv1", f"{path}.bn1", f"{path}.lif2", build.neuron(f"{path}.lif1", x))
    y = build.conv(f"{path}.depthwise", [], y, spec=_REAL)
    return build.conv(f"{path}.conv2", [f"{path}.bn2"], y)


def _rep_conv(build: SpikingBuilder, path: str, norm: str, x: str, *, neuron: str | None = None) -> str:
    """A convolution in three parts, with real values between them, and the BatchNorm behind it."""
    y = build.conv(f"{path}.conv1", [f"{path}.bn1.bn"], x, spec=_REAL)
    y = build.conv(f"{path}.depthwise", [], y, spec=_REAL, border=f"{path}.bn1.bn")
    return build.conv(f"{path}.conv2", [f"{path}.bn2", norm], y, neuron=neuron)


def _meta_attention(build: SpikingBuilder, path: str, x: str) -> str:
    spikes = build.neuron(f"{path}.lif", x)
    q, k, v = (
        build.neuron(
            f"{path}.{n}_lif", _rep_conv(build, f"{path}.{n}_conv", f"{path}.{n}_bn", spikes, neuron=f"{path}.{n}_lif")
        )
        for n in "qkv"
    )
    module: Any = build.network.get_submodule(path)
    y = build.spike_attention(path, q, k, v, scale=float(module.scale))
    return _rep_conv(build, f"{path}.proj_conv", f"{path}.proj_bn", y)
