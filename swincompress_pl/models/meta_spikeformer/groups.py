"""The structured pruning groups of Meta-SpikeFormer, kinds as in `models.spiking.groups`."""

from __future__ import annotations

from typing import Any

from torch import nn

from swincompress_pl.models.shared.coupling import Coupling, width_of
from swincompress_pl.models.shared.parts import reader_of_head
from swincompress_pl.models.spiking.parts import hidden_group
from swincompress_pl.pruning.structure.groups import Group


def meta_spikeformer_groups(network: nn.Module) -> list[Group]:
    """The groups of Meta-SpikeFormer, stage by stage, each followed by its "stages.<n>.embed"."""
    groups: list[Group] = []
    stages = [f"stages.{name}" for name, _ in network.get_submodule("stages").named_children()]
    before: Coupling | None = None
    for stage in stages:
        downsample = f"{stage}.downsample"
        stream = Coupling(network, f"{stage}.embed", "embed", width_of(network, f"{downsample}.conv"))
        stream.writer(f"{downsample}.conv", f"{downsample}.bn")
        if before is not None:
            before.reader(f"{downsample}.conv")
            groups.append(before.group())
        for name, block in network.get_submodule(f"{stage}.blocks").named_children():
            path = f"{stage}.blocks.{name}"
            mix = _attention if hasattr(block.mixer, "attn_lif") else _separable
            groups += [*mix(network, f"{path}.mixer", stream), _mlp(network, f"{path}.mlp", stream)]
        before = stream
    assert before is not None
    before.reader(reader_of_head(network))
    return [*groups, before.group()]


def _separable(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    stream.reader(f"{path}.conv1")
    stream.writer(f"{path}.conv2", f"{path}.bn2")
    hidden = Coupling(network, f"{path}.channels", "conv", width_of(network, f"{path}.conv1"))
    hidden.writer(f"{path}.conv1", f"{path}.bn1")
    hidden.depthwise(f"{path}.depthwise", None)
    hidden.reader(f"{path}.conv2")
    return [hidden.group()]


def _mlp(network: nn.Module, path: str, stream: Coupling) -> Group:
    stream.reader(f"{path}.conv1")
    stream.writer(f"{path}.conv2", f"{path}.bn2")
    return hidden_group(network, f"{path}.channels", "mlp", (f"{path}.conv1", f"{path}.bn1"), f"{path}.conv2")


def _attention(network: nn.Module, path: str, stream: Coupling) -> list[Group]:
    """The inside of each RepConv, then heads, dimensions of q and k, and dimensions of v."""
    attention: Any = network.get_submodule(path)
    heads: int = attention.num_heads
    for name in "qkv":
        stream.reader(f"{path}.{name}_conv.conv1")
    stream.writer(f"{path}.proj_conv.conv2", f"{path}.proj_conv.bn2")
    stream.norm(f"{path}.proj_bn")
    inside = [_rep_conv(network, f"{path}.{name}_conv") for name in ("q", "k", "v", "proj")]
    dims = {name: width_of(network, f"{path}.{name}_conv.conv2") // heads for name in "qkv"}
    starts = {name: tuple(head * dim for head in range(heads)) for name, dim in dims.items()}

    whole = Coupling(network, f"{path}.heads", "heads", heads)
    for name, dim in dims.items():
        _rows(whole, path, name, dim)
    whole.reader(f"{path}.proj_conv.conv1", dims["v"])
    whole.attribute(path, "num_heads")
    inner = Coupling(network, f"{path}.qk", "qk", dims["q"], heads=heads)
    for name in "qk":
        _rows(inner, path, name, 1, starts[name], silent=True)
    outer = Coupling(network, f"{path}.v", "v", dims["v"], heads=heads)
    _rows(outer, path, "v", 1, starts["v"])
    outer.reader(f"{path}.proj_conv.conv1", 1, starts["v"])
    return [*inside, whole.group(), inner.group(), outer.group()]


def _rows(
    coupling: Coupling, path: str, name: str, width: int, offsets: tuple[int, ...] = (0,), *, silent: bool = False
) -> None:
    """Adds the rows that a RepConv writes, with its own last BatchNorm and the one behind it."""
    coupling.writer(f"{path}.{name}_conv.conv2", f"{path}.{name}_conv.bn2", width, offsets)
    coupling.norm(f"{path}.{name}_bn", width, offsets, silent=silent)


def _rep_conv(network: nn.Module, path: str) -> Group:
    inside = Coupling(network, f"{path}.channels", "conv", width_of(network, f"{path}.conv1"))
    inside.writer(f"{path}.conv1", f"{path}.bn1.bn")
    inside.depthwise(f"{path}.depthwise", None)
    inside.reader(f"{path}.conv2")
    return inside.group()
