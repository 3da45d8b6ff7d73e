"""The structured pruning groups of spikingjelly's spiking transformers, written down explicitly.

The kinds are "mlp" (hidden channels), "conv" (channels between the convolutions of stems and down-sampling), "heads"
(whole heads), "qk" (dimensions in which q and k, or q and its sum, meet), "v" (dimensions that go to the projection)
and "embed" (a residual stream). Scales of attention and thresholds stay. The tests prove the groups by
`masked == sliced`, spike for spike.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from swincompress_pl.models.shared.coupling import Coupling, width_of
from swincompress_pl.models.shared.parts import reader_of_head
from swincompress_pl.models.spiking.parts import (
    Layer,
    hidden_group,
    qk_attention_groups,
    resizable,
    self_attention_groups,
    spike_driven_group,
)
from swincompress_pl.pruning.structure.groups import Group


def _pair(path: str, conv: str, norm: str) -> Layer:
    return f"{path}.{conv}", f"{path}.{norm}"


def _spiking_self_attention(path: str) -> dict[str, Layer]:
    return {
        "qkv": _pair(path, "qkv_conv_bn.0", "qkv_conv_bn.1"),
        "proj": _pair(path, "proj_conv_bn.0", "proj_conv_bn.1"),
    }


def _children(network: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in network.get_submodule(path).named_children()]


# Spikformer


def spikformer_groups(network: nn.Module) -> list[Group]:
    """The groups of spikingjelly's `Spikformer`: stem, then the blocks, then "embed"."""
    stem = [_pair(stage, "conv_bn.block.0", "conv_bn.block.1") for stage in _children(network, "patch_embed.stages")]
    groups = [
        hidden_group(network, f"patch_embed.stages.{number}", "conv", layer, following[0])
        for number, (layer, following) in enumerate(pairwise(stem))
    ]
    position = _pair("patch_embed.positional_encoding", "conv_bn.block.0", "conv_bn.block.1")
    stream = Coupling(network, "embed", "embed", width_of(network, reader_of_head(network), axis=1))
    stream.writer(*stem[-1])
    stream.writer(*position)
    stream.reader(position[0])
    for block in _children(network, "blocks"):
        attention = _spiking_self_attention(f"{block}.attn")
        fc1, fc2 = _pair(f"{block}.mlp", "fc1.0", "fc1.1"), _pair(f"{block}.mlp", "fc2.0", "fc2.1")
        groups += self_attention_groups(network, f"{block}.attn", **attention)
        groups.append(hidden_group(network, f"{block}.mlp.channels", "mlp", fc1, fc2[0]))
        _on_stream(stream, readers=[attention["qkv"][0], fc1[0]], writers=[attention["proj"], fc2])
        stream.attribute(f"{block}.attn", "dim")
    stream.reader(reader_of_head(network))
    stream.attribute("", "embed_dims")
    stream.attribute("patch_embed", "embed_dims")
    return [*groups, stream.group()]


def _on_stream(stream: Coupling, *, readers: list[str], writers: list[Layer]) -> None:
    for reader in readers:
        stream.reader(reader)
    for writer in writers:
        stream.writer(*writer)


# Spike-driven Transformer


def sdt_groups(network: nn.Module) -> list[Group]:
    """The groups of spikingjelly's `SpikeDrivenTransformer`: stem, then the blocks, then "embed"."""
    stages = [*_children(network, "patch_embed.stages"), "patch_embed.final_stage"]
    stem = [_pair(stage, "0", "1") for stage in stages]
    groups = [
        hidden_group(network, stage, "conv", layer, following[0])
        for stage, (layer, following) in zip(stages, pairwise(stem), strict=False)
    ]
    stream = Coupling(network, "embed", "embed", width_of(network, reader_of_head(network), axis=1))
    stream.writer(*stem[-1])
    stream.reader("patch_embed.rpe_conv")
    stream.writer("patch_embed.rpe_conv", "patch_embed.rpe_bn")
    for block in _children(network, "blocks"):
        attention = f"{block}.attn"
        groups.append(spike_driven_group(network, attention))
        groups += _mlp(network, f"{block}.mlp", stream)
        projections = [f"{attention}.{name}_conv" for name in "qkv"]
        _on_stream(stream, readers=projections, writers=[_pair(attention, "proj_conv", "proj_bn")])
        stream.attribute(attention, "dim")
        stream.swap_class(attention, resizable(network.get_submodule(attention)))
    stream.reader(reader_of_head(network))
    return [*groups, stream.group()]


def _mlp(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    """fc1, bn1, fc2, bn2 on the stream, and the group of their hidden channels, unless these are the stream's own."""
    mlp: Any = network.get_submodule(path)
    fc1, fc2 = _pair(path, "fc1", "bn1"), _pair(path, "fc2", "bn2")
    _on_stream(stream, readers=[fc1[0]], writers=[fc2])
    if getattr(mlp, "residual", False):  # the stream is added to the hidden channels
        _on_stream(stream, readers=[fc2[0]], writers=[fc1])
        return []
    return [hidden_group(network, f"{path}.channels", "mlp", fc1, fc2[0])]


# QKFormer and MaxFormer: three stages, each with a residual stream of its own


def staged_groups(network: nn.Module) -> list[Group]:
    """The groups of spikingjelly's `QKFormer` and `MaxFormer`, stage by stage, each followed by its "stage<n>.embed".

    `MaxFormer` may be the one for ImageNet or for CIFAR.
    """
    groups: list[Group] = []
    before: Coupling | None = None
    for number in (1, 2, 3):
        stream = _stage_stream(network, number)
        groups += _embedding(network, f"patch_embed{number}", stream, before)
        groups += [] if before is None else [before.group()]
        for block in _children(network, f"stage{number}"):
            groups += _stage_block(network, block, stream)
        before = stream
    stream.reader(reader_of_head(network))
    return [*groups, stream.group()]


def _stage_stream(network: nn.Module, number: int) -> Coupling:
    width = width_of(network, f"patch_embed{number + 1}.conv1" if number < 3 else reader_of_head(network), axis=1)
    return Coupling(network, f"stage{number}.embed", "embed", width)


def _embedding(network: nn.Module, path: str, stream: Coupling, before: Coupling | None) -> Iterator[Group]:
    """Down-sampling that ends in two branches on the stream; `before` is the stream that it reads, None for images."""
    if before is None and hasattr(network.get_submodule(path), "branch"):  # MaxFormer for CIFAR
        branch, shortcut = _pair(path, "branch.1", "branch.2"), _pair(path, "shortcut.1", "shortcut.2")
        yield hidden_group(network, f"{path}.conv", "conv", _pair(path, "conv", "bn"), branch[0], shortcut[0])
        _on_stream(stream, readers=[], writers=[branch, shortcut])
        return
    first, second, third = (_pair(path, f"conv{n}", f"bn{n}") for n in (1, 2, 3))
    shortcut = _pair(path, "shortcut.0", "shortcut.1")
    if before is None:
        yield hidden_group(network, f"{path}.conv1", "conv", first, second[0], shortcut[0])
        yield hidden_group(network, f"{path}.conv2", "conv", second, third[0])
        _on_stream(stream, readers=[], writers=[third, shortcut])
        return
    _on_stream(before, readers=[first[0], shortcut[0]], writers=[])
    yield hidden_group(network, f"{path}.conv1", "conv", first, second[0])
    _on_stream(stream, readers=[], writers=[second, shortcut])


def _stage_block(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    """A block of QKFormer or MaxFormer: an attention or a depthwise convolution before the MLP, or the MLP alone."""
    block: Any = network.get_submodule(path)
    if not hasattr(block, "mlp"):
        return _mlp(network, path, stream)
    if hasattr(block, "dwconv"):
        stream.depthwise(f"{path}.dwconv", f"{path}.bn")
        return _mlp(network, f"{path}.mlp", stream)
    groups = _stage_attention(network, f"{path}.attn", stream)
    return [*groups, *_mlp(network, f"{path}.mlp", stream)]


def _stage_attention(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    attention: Any = network.get_submodule(path)
    stream.swap_class(path, resizable(attention))
    if hasattr(attention, "dim"):
        stream.attribute(path, "dim")
    if hasattr(attention, "qk_conv_bn"):
        stream.reader(f"{path}.qk_conv_bn.0")
        stream.writer(f"{path}.proj_conv_bn.0", f"{path}.proj_conv_bn.1")
        return qk_attention_groups(network, path)
    fused = hasattr(attention, "qkv_conv_bn")
    layers = (
        _spiking_self_attention(path)
        if fused
        else {"qkv": _pair(path, "qkv.0", "qkv.1"), "proj": _pair(path, "proj.0", "proj.1")}
    )
    stream.reader(layers["qkv"][0])
    stream.writer(*layers["proj"])
    return self_attention_groups(network, path, **layers)
