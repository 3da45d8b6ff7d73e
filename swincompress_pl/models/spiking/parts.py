"""The groups that spiking families share: of MLPs, chains of convolutions, and the kinds of spiking attention."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based.layer.attention import QKAttention, SpikeDrivenSelfAttention, SpikingSelfAttention
from torch import nn

from swincompress_pl.models.shared.coupling import Coupling, width_of
from swincompress_pl.models.spiking.attention import (
    MaxCifarSelfAttention,
    ResizableMaxCifarSelfAttention,
    ResizableQKAttention,
    ResizableSpikeDrivenSelfAttention,
    ResizableSpikingSelfAttention,
)
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.registry import UnsupportedNetworkError

_RESIZABLE: dict[type[nn.Module], type[nn.Module]] = {
    SpikingSelfAttention: ResizableSpikingSelfAttention,
    MaxCifarSelfAttention: ResizableMaxCifarSelfAttention,
    QKAttention: ResizableQKAttention,
    SpikeDrivenSelfAttention: ResizableSpikeDrivenSelfAttention,
}
Layer = tuple[str, str]
"""The paths of a convolution and of the BatchNorm behind it."""


def resizable(attention: nn.Module) -> type[nn.Module]:
    """The class that computes the same at any width; an UnsupportedNetworkError for an unknown attention."""
    for known, new_type in _RESIZABLE.items():
        if isinstance(attention, known):
            return new_type
    raise UnsupportedNetworkError(
        f"{type(attention).__name__}: the pruning groups of this attention are unknown; known are those of "
        f"{', '.join(known.__name__ for known in _RESIZABLE)}"
    )


def hidden_group(network: nn.Module, name: str, kind: str, writer: Layer, *readers: str) -> Group:
    """Channels between one convolution with its BatchNorm, a neuron, and the layers that read it."""
    coupling = Coupling(network, name, kind, width_of(network, writer[0]))
    coupling.writer(*writer)
    for reader in readers:
        coupling.reader(reader)
    return coupling.group()


def self_attention_groups(network: nn.Module, path: str, *, qkv: Layer, proj: Layer) -> list[Group]:
    """Heads, dimensions of q and k, and dimensions of v of an attention with fused rows (q | k | v).

    Each of q, k and v has rows (heads, dimensions). q meets k, and v meets the projection. Dimensions are removed from
    all heads at once, as the reshape to heads requires; the scale stays.
    """
    attention: Any = network.get_submodule(path)
    heads: int = attention.num_heads
    v_width = width_of(network, proj[0], axis=1)
    qk_width = (width_of(network, qkv[0]) - v_width) // 2
    qk_dim, v_dim = qk_width // heads, v_width // heads

    whole = Coupling(network, f"{path}.heads", "heads", heads)
    whole.writer(*qkv, qk_dim, (0, qk_width))
    whole.writer(*qkv, v_dim, (2 * qk_width,))
    whole.reader(proj[0], v_dim)
    whole.attribute(path, "num_heads")

    qk_starts = tuple(part * qk_width + head * qk_dim for part in range(2) for head in range(heads))
    inner = Coupling(network, f"{path}.qk", "qk", qk_dim, heads=heads)
    inner.writer(*qkv, 1, qk_starts, silent=True)

    v_starts = tuple(head * v_dim for head in range(heads))
    outer = Coupling(network, f"{path}.v", "v", v_dim, heads=heads)
    outer.writer(*qkv, 1, tuple(2 * qk_width + start for start in v_starts))
    outer.reader(proj[0], 1, v_starts)

    for coupling in (whole, inner, outer):
        coupling.swap_class(path, resizable(attention))
    return [whole.group(), inner.group(), outer.group()]


def qk_attention_groups(network: nn.Module, path: str) -> list[Group]:
    """The groups of QKFormer's attention with rows (q | k).

    Token attention sums q over the dimensions of a head, so these are free ("qk"), and k goes to the projection ("v").
    Channel attention gates k by q channel by channel, so both are removed together.
    """
    attention: Any = network.get_submodule(path)
    qk, proj = (f"{path}.qk_conv_bn.0", f"{path}.qk_conv_bn.1"), f"{path}.proj_conv_bn.0"
    heads, k_width = attention.num_heads, width_of(network, proj, axis=1)
    q_width = width_of(network, qk[0]) - k_width
    q_dim, k_dim = q_width // heads, k_width // heads
    q_starts, k_starts = (tuple(head * dim for head in range(heads)) for dim in (q_dim, k_dim))

    whole = Coupling(network, f"{path}.heads", "heads", heads)
    whole.writer(*qk, q_dim)
    whole.writer(*qk, k_dim, (q_width,))
    whole.reader(proj, k_dim)
    whole.attribute(path, "num_heads")
    outer = Coupling(network, f"{path}.v", "v", k_dim, heads=heads)
    k_rows = tuple(q_width + start for start in k_starts)
    couplings = [whole, outer]
    if attention.qka_type == "token":
        inner = Coupling(network, f"{path}.qk", "qk", q_dim, heads=heads)
        inner.writer(*qk, 1, q_starts, silent=True)
        couplings.insert(1, inner)
        outer.writer(*qk, 1, k_rows)
    else:
        outer.writer(*qk, 1, (*q_starts, *k_rows))
    outer.reader(proj, 1, k_starts)
    for coupling in couplings:
        coupling.swap_class(path, resizable(attention))
    return [coupling.group() for coupling in couplings]


def spike_driven_group(network: nn.Module, path: str) -> Group:
    """The group of SDT's attention; q, k and v meet channel by channel, so all go with the projection's column."""
    coupling = Coupling(network, f"{path}.v", "v", width_of(network, f"{path}.proj_conv", axis=1))
    for name in ("q", "k", "v"):
        coupling.writer(f"{path}.{name}_conv", f"{path}.{name}_bn")
    coupling.reader(f"{path}.proj_conv")
    coupling.swap_class(path, resizable(network.get_submodule(path)))
    return coupling.group()
