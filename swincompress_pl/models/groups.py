"""The structured pruning groups of timm's Swin and ViT, written down explicitly.

Two kinds: "heads" (q, k and v rows, the projection's columns, Swin's relative-position column; the attention scale
stays) and "mlp" (hidden channels). Proven by `masked == sliced` in the tests. A variant whose couplings are not written
down here is refused by name rather than cut wrongly.
"""

from __future__ import annotations

from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn

from ..pruning.groups import Attribute, Group, Slice
from ..registry import UnsupportedNetworkError


def swin_groups(network: nn.Module) -> list[Group]:
    """The groups of a timm `SwinTransformer` or `SwinTransformerV2`, in the order of the blocks, heads before channels.

    E.g. "layers.0.blocks.1.attn.heads" and "layers.0.blocks.1.mlp.channels". Raises UnsupportedNetworkError for a
    variant.
    """
    if isinstance(network, SwinTransformerV2):
        return _swin_v2_groups(network)
    groups: list[Group] = []
    for path, block in _blocks(network, SwinTransformerBlock):
        attn = _part(block, path, "attn", WindowAttention)
        table = Slice(tensor=f"{path}.attn.relative_position_bias_table", axis=1)
        groups.append(_heads(f"{path}.attn", attn, extra=(table,)))
        groups.append(_mlp(f"{path}.mlp", block))
    return groups


def _swin_v2_groups(network: nn.Module) -> list[Group]:
    """The groups of a timm `SwinTransformerV2`: MLP channels only.

    timm's v2 attention reshapes its output to the embedding width, so a head cannot be taken out of it without changing
    its forward; asking for kinds=("heads",) is answered by `prunable_groups` with the kinds that there are.
    """
    return [_mlp(f"{path}.mlp", block) for path, block in _blocks(network, SwinTransformerV2Block)]


def vit_groups(network: nn.Module) -> list[Group]:
    """The groups of a timm `VisionTransformer` (ViT, DeiT, distilled, with register tokens), heads before channels.

    E.g. "blocks.0.attn.heads" and "blocks.0.mlp.channels". Raises UnsupportedNetworkError for a variant that is not
    covered: parallel blocks, differential attention, gated MLPs, a norm over the attention's output or the MLP's hidden
    channels.
    """
    groups: list[Group] = []
    for path, block in _blocks(network, Block, ResPostBlock):
        attn = _part(block, path, "attn", Attention)
        _refuse_norm(attn, f"{path}.attn", "scale_attn_norm=False")
        gate: tuple[Slice, ...] = ()
        attributes: tuple[Attribute, ...] = (
            Attribute(module=f"{path}.attn", name="attn_dim", size_of=f"{path}.attn.proj.weight", axis=1),
        )
        if isinstance(attn.gate, nn.Linear):
            assert isinstance(attn.num_heads, int)
            width = attn.gate.out_features // attn.num_heads
            gate = _rows(f"{path}.attn.gate", attn.gate, width)
            attributes += (
                Attribute(module=f"{path}.attn.gate", name="out_features", size_of=f"{path}.attn.gate.weight"),
            )
        groups.append(_heads(f"{path}.attn", attn, extra=gate, attributes=attributes))
        groups.append(_mlp(f"{path}.mlp", block))
    return groups


def _heads(
    path: str, attn: nn.Module, *, extra: tuple[Slice, ...] = (), attributes: tuple[Attribute, ...] = ()
) -> Group:
    """The heads of an attention with a fused `qkv` of rows (q | k | v), each (heads, head width), and a `proj`."""
    qkv, _ = _linear(attn, path, "qkv"), _linear(attn, path, "proj")
    heads = attn.num_heads
    assert isinstance(heads, int)
    attn_width = qkv.out_features // 3
    head_width = attn_width // heads
    offsets = (0, attn_width, 2 * attn_width)
    return Group(
        name=f"{path}.heads",
        kind="heads",
        units=heads,
        slices=(
            *_rows(f"{path}.qkv", qkv, head_width, offsets),
            *extra,
            Slice(tensor=f"{path}.proj.weight", axis=1, width=head_width, consumer=True),
        ),
        attributes=(
            Attribute(module=path, name="num_heads"),
            *attributes,
            Attribute(module=f"{path}.qkv", name="out_features", size_of=f"{path}.qkv.weight"),
            Attribute(module=f"{path}.proj", name="in_features", size_of=f"{path}.proj.weight", axis=1),
        ),
    )


def _mlp(path: str, block: nn.Module) -> Group:
    """The hidden channels of fc1 -> activation -> fc2."""
    mlp = _part(block, path.rpartition(".")[0], "mlp", Mlp)
    _refuse_norm(mlp, path, "scale_mlp_norm=False")
    fc1, _ = _linear(mlp, path, "fc1"), _linear(mlp, path, "fc2")
    return Group(
        name=f"{path}.channels",
        kind="mlp",
        units=fc1.out_features,
        slices=(*_rows(f"{path}.fc1", fc1, 1), Slice(tensor=f"{path}.fc2.weight", axis=1, consumer=True)),
        attributes=(
            Attribute(module=f"{path}.fc1", name="out_features", size_of=f"{path}.fc1.weight"),
            Attribute(module=f"{path}.fc2", name="in_features", size_of=f"{path}.fc2.weight", axis=1),
        ),
    )


def _rows(path: str, linear: nn.Linear, width: int, offsets: tuple[int, ...] = (0,)) -> tuple[Slice, ...]:
    names = ["weight"] if linear.bias is None else ["weight", "bias"]
    return tuple(Slice(tensor=f"{path}.{name}", axis=0, width=width, offsets=offsets) for name in names)


def _blocks(network: nn.Module, *types: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The blocks by path; every member of the network's list of blocks has to be of a known type."""
    found = []
    for path, module in network.named_modules():
        parent, _, index = path.rpartition(".")
        if index.isdigit() and parent.rpartition(".")[2] == "blocks":
            if type(module) not in types:
                raise _unsupported(path, module, f"blocks of type {', '.join(t.__name__ for t in types)}")
            found.append((path, module))
    if not found:
        raise UnsupportedNetworkError(f"{type(network).__name__}: no transformer block found to prune")
    return found


def _part(block: nn.Module, path: str, name: str, wanted: type[nn.Module]) -> nn.Module:
    part = getattr(block, name, None)
    if not isinstance(part, wanted):
        raise _unsupported(f"{path}.{name}", part, f"a timm {wanted.__name__}")
    return part


def _linear(module: nn.Module, path: str, name: str) -> nn.Linear:
    linear = getattr(module, name, None)
    if not isinstance(linear, nn.Linear):
        raise _unsupported(f"{path}.{name}", linear, "an nn.Linear")
    return linear


def _refuse_norm(module: nn.Module, path: str, remedy: str) -> None:
    norm = getattr(module, "norm", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        raise UnsupportedNetworkError(
            f"{path}.norm is a {type(norm).__name__} whose statistics run over the units to be removed, so a masked "
            f"unit and a sliced one differ; build the model with {remedy}"
        )


def _unsupported(path: str, found: object, wanted: str) -> UnsupportedNetworkError:
    return UnsupportedNetworkError(f"{path} is a {type(found).__name__}; structured pruning knows {wanted} only")
