"""The quantizable graph of E-SpikeFormer. Importing this imports spikingjelly; the adapter does so on use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swincompress_pl.models.e_spikeformer.network import block_paths
from swincompress_pl.models.spiking.graph_builder import SpikingBuilder
from swincompress_pl.quant import Graph


def e_spikeformer_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of E-SpikeFormer: a stream of real values, which neurons read that give counts, without time steps."""
    build = SpikingBuilder(network, preprocessing)
    build.refuse("time_steps" in preprocessing, "it has no time steps; give the frames of a sequence one by one")
    x = "images"
    for number, (downsample, blocks) in enumerate(block_paths(network)):
        counts = x if number == 0 else build.neuron(f"{downsample}.encode_spike", x)
        x = build.conv(f"{downsample}.encode_conv", [f"{downsample}.encode_bn"], counts)
        for path in blocks:
            block = _conv_block if hasattr(network.get_submodule(path), "Conv") else _transformer_block
            x = block(build, path, x)
    build.head_on_stream("head", "spike", x)
    return build.finished()


def _conv_block(build: SpikingBuilder, path: str, x: str) -> str:
    x = build.stream(f"{path}.add1", x, _separable_conv(build, f"{path}.Conv", x))
    counts = build.conv_neuron(f"{path}.conv1", f"{path}.bn1", f"{path}.spike2", build.neuron(f"{path}.spike1", x))
    return build.stream(f"{path}.add2", x, build.conv(f"{path}.conv2", [f"{path}.bn2"], counts))


def _transformer_block(build: SpikingBuilder, path: str, x: str) -> str:
    x = build.stream(f"{path}.add1", x, _separable_conv(build, f"{path}.conv", x))
    x = build.stream(f"{path}.add2", x, _attention(build, f"{path}.attn", x))
    mlp = f"{path}.mlp"
    counts = build.conv_neuron(
        f"{mlp}.fc1_conv", f"{mlp}.fc1_bn", f"{mlp}.fc2_spike", build.neuron(f"{mlp}.fc1_spike", x)
    )
    return build.stream(f"{path}.add3", x, build.conv(f"{mlp}.fc2_conv", [f"{mlp}.fc2_bn"], counts))


def _separable_conv(build: SpikingBuilder, path: str, x: str) -> str:
    counts = build.neuron(f"{path}.spike1", x)
    counts = build.conv_neuron(f"{path}.pwconv1.0", f"{path}.pwconv1.1", f"{path}.spike2", counts)
    counts = build.conv_neuron(f"{path}.dwconv.0", f"{path}.dwconv.1", f"{path}.spike3", counts)
    return build.conv(f"{path}.pwconv2.0", [f"{path}.pwconv2.1"], counts)


def _attention(build: SpikingBuilder, path: str, x: str) -> str:
    counts = build.neuron(f"{path}.head_spike", x)
    q, k, v = (
        build.conv_neuron(f"{path}.{n}_conv.0", f"{path}.{n}_conv.1", f"{path}.{n}_spike", counts) for n in "qkv"
    )
    module: Any = build.network.get_submodule(path)
    y = build.spike_attention(path, q, k, v, scale=float(module.scale), neuron="attn_spike")
    return build.conv(f"{path}.proj_conv.0", [f"{path}.proj_conv.1"], y)
