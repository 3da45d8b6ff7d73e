"""The quantizable graphs of spikingjelly's networks; importing this module imports spikingjelly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from swincompress_pl.models.spiking.graph_builder import SpikingBuilder
from swincompress_pl.quant import Graph


def spikformer_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of spikingjelly's Spikformer: spikes and their sums from the first neuron to the head."""
    stem = network.patch_embed
    build = SpikingBuilder(network, preprocessing, size=stem.image_size)
    x = "images"
    for number in range(len(stem.stages)):
        x = _stem_stage(build, f"patch_embed.stages.{number}", x)
    x = build.count("patch_embed.add", _stem_stage(build, "patch_embed.positional_encoding", x), x)
    for number in range(len(network.blocks)):
        path = f"blocks.{number}"
        y = _ssa(build, f"{path}.attn", x)
        x = build.count(f"{path}.add1", x, y)
        y = _pair_neuron(build, f"{path}.mlp.fc1", f"{path}.mlp.neuron1", x)
        y = _pair_neuron(build, f"{path}.mlp.fc2", f"{path}.mlp.neuron2", y)
        x = build.count(f"{path}.add2", x, y)
    build.head_on_counts("head", x)
    return build.finished()


def _stem_stage(build: SpikingBuilder, path: str, x: str) -> str:
    """A SpikformerConv2dBNLIF."""
    block = f"{path}.conv_bn.block"
    layers: Any = build.network.get_submodule(block)
    pool = f"{block}.2" if len(layers) > 2 else None
    return build.conv_neuron(f"{block}.0", f"{block}.1", f"{path}.neuron", x, pool=pool)


def _pair_neuron(build: SpikingBuilder, pair: str, neuron: str, x: str) -> str:
    """A container of convolution and BatchNorm, then a neuron."""
    return build.conv_neuron(f"{pair}.0", f"{pair}.1", neuron, x)


def _ssa(build: SpikingBuilder, path: str, x: str) -> str:
    """The SpikingSelfAttention of spikingjelly, up to the spikes behind its projection."""
    y = build.self_attention(path, x, f"{path}.qkv_conv_bn", f"{path}.proj_conv_bn")
    return _pair_neuron(build, f"{path}.proj_conv_bn", f"{path}.proj_lif", y)


def qkformer_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of spikingjelly's QKFormer, with token or channel attention."""
    build = SpikingBuilder(network, preprocessing)
    x = "images"
    for stage in (1, 2, 3):
        x = _qkformer_embedding(build, f"patch_embed{stage}", x, first=stage == 1)
        for number in range(len(network.get_submodule(f"stage{stage}"))):
            path = f"stage{stage}.{number}"
            attention: Any = network.get_submodule(f"{path}.attn")
            y = (
                _ssa(build, f"{path}.attn", x)
                if hasattr(attention, "qkv_lif")
                else _qk_attention(build, f"{path}.attn", x)
            )
            x = build.count(f"{path}.add1", x, y)
            y = build.conv_neuron(f"{path}.mlp.fc1", f"{path}.mlp.bn1", f"{path}.mlp.lif1", x)
            y = build.conv_neuron(f"{path}.mlp.fc2", f"{path}.mlp.bn2", f"{path}.mlp.lif2", y)
            x = build.count(f"{path}.add2", x, y)
    build.head_on_counts("head", x)
    return build.finished()


def _qkformer_embedding(build: SpikingBuilder, path: str, x: str, *, first: bool) -> str:
    if first:
        x = build.conv_neuron(f"{path}.conv1", f"{path}.bn1", f"{path}.lif1", x, pool=f"{path}.pool1")
        y = build.conv_neuron(f"{path}.conv2", f"{path}.bn2", f"{path}.lif2", x, pool=f"{path}.pool2")
        y = build.conv_neuron(f"{path}.conv3", f"{path}.bn3", f"{path}.lif3", y)
    else:
        y = build.conv_neuron(f"{path}.conv1", f"{path}.bn1", f"{path}.lif1", x, pool=f"{path}.pool")
        y = build.conv_neuron(f"{path}.conv2", f"{path}.bn2", f"{path}.lif2", y)
    shortcut = build.conv_neuron(f"{path}.shortcut.0", f"{path}.shortcut.1", f"{path}.shortcut.2", x)
    return build.count(f"{path}.add", y, shortcut)


def _qk_attention(build: SpikingBuilder, path: str, x: str) -> str:
    """Gates k by the neurons of q's sums over the channels of a head, or over tokens."""
    module: Any = build.network.get_submodule(path)
    width, total = module.proj_conv_bn[0].in_channels, module.qk_conv_bn[0].out_channels
    q, k = build.parts(f"{path}.qk_conv_bn", f"{path}.qk_lif", x, (total - width, width), "qk")
    heads = module.num_heads if module.qka_type == "token" else None
    gate = build.neuron(f"{path}.attn_lif", build.block_sum(f"{path}.sum", q, heads=heads))
    y = build.gate(f"{path}.gate", k, gate)
    return _pair_neuron(build, f"{path}.proj_conv_bn", f"{path}.proj_lif", y)


def sdt_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of spikingjelly's Spike-driven Transformer: a stream of membrane potentials."""
    build = SpikingBuilder(network, preprocessing)
    x = "images"
    for number, stage in enumerate(network.patch_embed.stages):
        path = f"patch_embed.stages.{number}"
        x = build.conv_neuron(f"{path}.0", f"{path}.1", f"{path}.2", x)
        x = build.max_pool(f"{path}.3", x) if len(stage) > 3 else x
    path = "patch_embed.final_stage"
    x = build.conv(f"{path}.0", [f"{path}.1"], x)
    x = build.max_pool(f"{path}.2", x) if len(network.patch_embed.final_stage) > 2 else x
    y = build.conv("patch_embed.rpe_conv", ["patch_embed.rpe_bn"], build.neuron("patch_embed.final_lif", x))
    x = build.stream("patch_embed.add", x, y)
    for number in range(len(network.blocks)):
        path = f"blocks.{number}"
        x = _spike_driven_attention(build, f"{path}.attn", x)
        x = _stream_mlp(build, f"{path}.mlp", x)
    build.head_on_stream("head", "head_lif", x)
    return build.finished()


def _spike_driven_attention(build: SpikingBuilder, path: str, x: str) -> str:
    """Gates q by the neurons of the sums of k times v over tokens."""
    spikes = build.neuron(f"{path}.shortcut_lif", x)
    q, k, v = (build.conv_neuron(f"{path}.{n}_conv", f"{path}.{n}_bn", f"{path}.{n}_lif", spikes) for n in "qkv")
    both = build.gate(f"{path}.kv", k, v)
    gate = build.neuron(f"{path}.attn_lif", build.block_sum(f"{path}.sum", both))
    y = build.conv(f"{path}.proj_conv", [f"{path}.proj_bn"], build.gate(f"{path}.gate", q, gate))
    return build.stream(f"{path}.add", x, y)


def _stream_mlp(build: SpikingBuilder, path: str, x: str) -> str:
    """Computes x + fc2(lif2(fc1(lif1(x)))); with a residual MLP, the hidden channels are on the stream as well."""
    module: Any = build.network.get_submodule(path)
    spikes = build.neuron(f"{path}.lif1", x)
    if module.residual:
        x = build.stream(f"{path}.add1", x, build.conv(f"{path}.fc1", [f"{path}.bn1"], spikes))
        spikes = build.neuron(f"{path}.lif2", x)
    else:
        spikes = build.conv_neuron(f"{path}.fc1", f"{path}.bn1", f"{path}.lif2", spikes)
    return build.stream(f"{path}.add2", x, build.conv(f"{path}.fc2", [f"{path}.bn2"], spikes))


def maxformer_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """The graph of spikingjelly's Max-Former, for ImageNet and for CIFAR: a stream of membrane potentials."""
    build = SpikingBuilder(network, preprocessing)
    cifar = hasattr(network.patch_embed1, "branch")
    x = (_maxformer_cifar_embedding if cifar else _maxformer_embedding)(build, "patch_embed1", "images")
    for stage in (1, 2, 3):
        if stage > 1:
            x = _maxformer_stage_embedding(build, f"patch_embed{stage}", x)
        for number in range(len(network.get_submodule(f"stage{stage}"))):
            x = _maxformer_block(build, f"stage{stage}.{number}", x)
    build.head_on_stream("head", "head_lif", x)
    return build.finished()


def _maxformer_cifar_embedding(build: SpikingBuilder, path: str, x: str) -> str:
    """Two branches, each with its own neurons on the same current."""
    first = build.conv(f"{path}.conv", [f"{path}.bn"], x, neuron=f"{path}.branch.0")
    y, shortcut = (
        build.conv(f"{path}.{n}.1", [f"{path}.{n}.2"], build.neuron(f"{path}.{n}.0", first))
        for n in ("branch", "shortcut")
    )
    return build.stream(f"{path}.add", y, shortcut)


def _maxformer_embedding(build: SpikingBuilder, path: str, x: str) -> str:
    x = build.conv_neuron(f"{path}.conv1", f"{path}.bn1", f"{path}.lif1", x)
    y = build.conv_neuron(f"{path}.conv2", f"{path}.bn2", f"{path}.lif2", x)
    y = build.conv(f"{path}.conv3", [f"{path}.bn3"], y)
    return build.stream(f"{path}.add", y, build.conv(f"{path}.shortcut.0", [f"{path}.shortcut.1"], x))


def _maxformer_stage_embedding(build: SpikingBuilder, path: str, x: str) -> str:
    spikes = build.neuron(f"{path}.lif1", x)
    shortcut = build.conv(f"{path}.shortcut.0", [f"{path}.shortcut.1"], spikes)
    shortcut = build.max_pool(f"{path}.shortcut.2", shortcut)
    y = build.conv_neuron(f"{path}.conv1", f"{path}.bn1", f"{path}.lif2", spikes, pool=f"{path}.pool")
    return build.stream(f"{path}.add", build.conv(f"{path}.conv2", [f"{path}.bn2"], y), shortcut)


def _maxformer_block(build: SpikingBuilder, path: str, x: str) -> str:
    module: nn.Module = build.network.get_submodule(path)
    if hasattr(module, "dwconv"):
        y = build.conv(f"{path}.dwconv", [f"{path}.bn"], build.neuron(f"{path}.lif", x))
        x = build.stream(f"{path}.add", x, y)
    elif hasattr(module, "attn"):
        x = build.stream(f"{path}.add", x, _maxformer_attention(build, f"{path}.attn", x))
    return _stream_mlp(build, path if hasattr(module, "fc1") else f"{path}.mlp", x)


def _maxformer_attention(build: SpikingBuilder, path: str, x: str) -> str:
    """The attention of the CIFAR form, on spikes, or of the ImageNet form, whose q, k and v read the stream."""
    if hasattr(build.network.get_submodule(path), "input_lif"):
        y = build.self_attention(path, build.neuron(f"{path}.input_lif", x), f"{path}.qkv", f"{path}.proj")
        return build.conv(f"{path}.proj.0", [f"{path}.proj.1"], y)
    return build.widened(_ssa(build, path, build.real(f"{path}.input", x)))
