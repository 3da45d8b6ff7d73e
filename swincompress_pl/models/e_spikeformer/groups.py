"""The structured pruning groups of E-SpikeFormer, kinds as in `models.spiking.groups`.

A neuron acts on every channel separately, and gives a count of 0 for 0, so a masked channel is a removed one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from swincompress_pl.models.e_spikeformer.network import block_paths
from swincompress_pl.models.shared.coupling import Coupling, width_of
from swincompress_pl.models.shared.parts import reader_of_head
from swincompress_pl.models.spiking.parts import Layer, hidden_group
from swincompress_pl.pruning.structure.groups import Group


def e_spikeformer_groups(network: nn.Module) -> list[Group]:
    """The groups of E-SpikeFormer, stage by stage, each followed by its "<down-sampling>.embed"."""
    groups: list[Group] = []
    before: Coupling | None = None
    for downsample, blocks in block_paths(network):
        first = f"{downsample}.encode_conv"
        stream = Coupling(network, f"{downsample}.embed", "embed", width_of(network, first))
        stream.writer(first, f"{downsample}.encode_bn")
        if before is not None:
            before.reader(first)
            groups.append(before.group())
        for path in blocks:
            block = _conv_block if hasattr(network.get_submodule(path), "Conv") else _transformer_block
            groups += block(network, path, stream)
        before = stream
    assert before is not None
    before.reader(reader_of_head(network))
    return [*groups, before.group()]


def _conv_block(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    first, second = ((f"{path}.conv{number}", f"{path}.bn{number}") for number in (1, 2))
    return [_separable(network, f"{path}.Conv", stream), _mlp(network, path, first, second, stream)]


def _transformer_block(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    mlp = f"{path}.mlp"
    first, second = ((f"{mlp}.fc{number}_conv", f"{mlp}.fc{number}_bn") for number in (1, 2))
    return [
        _separable(network, f"{path}.conv", stream),
        *_attention(network, f"{path}.attn", stream),
        _mlp(network, mlp, first, second, stream),
    ]


def _separable(network: nn.Module, path: str, stream: Coupling) -> Group:
    stream.reader(f"{path}.pwconv1.0")
    stream.writer(f"{path}.pwconv2.0", f"{path}.pwconv2.1")
    hidden = Coupling(network, f"{path}.channels", "conv", width_of(network, f"{path}.pwconv1.0"))
    hidden.writer(f"{path}.pwconv1.0", f"{path}.pwconv1.1")
    hidden.depthwise(f"{path}.dwconv.0", f"{path}.dwconv.1")
    hidden.reader(f"{path}.pwconv2.0")
    return hidden.group()


def _mlp(network: nn.Module, path: str, first: Layer, second: Layer, stream: Coupling) -> Group:
    stream.reader(first[0])
    stream.writer(*second)
    return hidden_group(network, f"{path}.channels", "mlp", first, second[0])


def _attention(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    """Heads, dimensions of q and k, which meet in a product, and dimensions of v; the scale stays."""
    attention: Any = network.get_submodule(path)
    heads: int = attention.num_heads
    layers: dict[str, Layer] = {name: (f"{path}.{name}_conv.0", f"{path}.{name}_conv.1") for name in "qkv"}
    projection = f"{path}.proj_conv.0"
    for conv, _ in layers.values():
        stream.reader(conv)
    stream.writer(projection, f"{path}.proj_conv.1")
    dims = {name: width_of(network, conv) // heads for name, (conv, _) in layers.items()}
    starts = {name: tuple(head * dim for head in range(heads)) for name, dim in dims.items()}

    whole = Coupling(network, f"{path}.heads", "heads", heads)
    for name, dim in dims.items():
        whole.writer(*layers[name], dim)
    whole.reader(projection, dims["v"])
    whole.attribute(path, "num_heads")
    inner = Coupling(network, f"{path}.qk", "qk", dims["q"], heads=heads)
    for name in "qk":
        inner.writer(*layers[name], 1, starts[name], silent=True)
    outer = Coupling(network, f"{path}.v", "v", dims["v"], heads=heads)
    outer.writer(*layers["v"], 1, starts["v"])
    outer.reader(projection, 1, starts["v"])
    return [whole.group(), inner.group(), outer.group()]
