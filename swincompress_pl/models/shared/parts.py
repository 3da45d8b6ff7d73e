"""What the families share: blocks by path, the groups of an attention and of an MLP, and refusals."""

from __future__ import annotations

from collections.abc import Iterable

from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import nn

from swincompress_pl.layer_types import full_name, in_order, maps_each_value, passes
from swincompress_pl.pruning.structure.groups import Attribute, ClassSwap, Group, Slice
from swincompress_pl.registry import UnsupportedNetworkError

MLPS = (Mlp, GluMlp, SwiGLU)


def length_of(path: str, name: str, *, axis: int = 0) -> Attribute:
    """An attribute `path.name` that is the length of `path.weight` along `axis`."""
    return Attribute(module=path, name=name, size_of=f"{path}.weight", axis=axis)


def rows(
    path: str, linear: nn.Module, width: int = 1, offsets: tuple[int, ...] = (0,), *, consumer: bool = False
) -> tuple[Slice, ...]:
    """Rows of a layer's weight and of its bias, if it has one."""
    names = ["weight"] if linear.bias is None else ["weight", "bias"]
    return tuple(
        Slice(tensor=f"{path}.{name}", axis=0, width=width, offsets=offsets, consumer=consumer) for name in names
    )


def columns(path: str, width: int = 1, offsets: tuple[int, ...] = (0,)) -> Slice:
    """Columns of a layer's weight, which read the units."""
    return Slice(tensor=f"{path}.weight", axis=1, width=width, offsets=offsets, consumer=True)


class AttentionGroups:
    """The groups of an attention with a fused `qkv` of rows (q | k | v), each (heads, head width), and a `proj`.

    Both groups get `attributes` and `class_swaps` in addition to those of the linear layers. `gate` is a linear layer
    with rows (heads, head width) that weighs the attention's output.
    """

    def __init__(
        self,
        path: str,
        attn: nn.Module,
        *,
        gate: nn.Linear | None = None,
        attributes: tuple[Attribute, ...] = (),
        class_swaps: tuple[ClassSwap, ...] = (),
    ) -> None:
        self.path, self.attn, self.class_swaps = path, attn, class_swaps
        self.qkv, _ = linear_of(attn, path, "qkv"), linear_of(attn, path, "proj")
        heads = attn.num_heads
        assert isinstance(heads, int)
        self.heads, self.width = heads, self.qkv.out_features // 3
        self.head_dim = self.width // heads
        self.gate = gate
        self.attributes = (
            *attributes,
            length_of(f"{path}.qkv", "out_features"),
            length_of(f"{path}.proj", "in_features", axis=1),
        )
        if gate is not None:
            self.attributes += (length_of(f"{path}.gate", "out_features"),)

    def head_group(
        self, *, slices: Iterable[Slice] = (), attributes: Iterable[Attribute] = (), biases: Iterable[str] = ()
    ) -> Group:
        """The group of whole heads, with more slices and attributes, and with separate q, k and v biases by name."""
        path, width = self.path, self.head_dim
        gate = () if self.gate is None else rows(f"{path}.gate", self.gate, width)
        return Group(
            name=f"{path}.heads",
            kind="heads",
            units=self.heads,
            slices=(
                *rows(f"{path}.qkv", self.qkv, width, (0, self.width, 2 * self.width)),
                *(Slice(tensor=f"{path}.{bias}", axis=0, width=width) for bias in biases),
                *gate,
                *slices,
                columns(f"{path}.proj", width),
            ),
            attributes=(Attribute(module=path, name="num_heads"), *attributes, *self.attributes),
            class_swaps=self.class_swaps,
        )

    def dimension_group(
        self, *, attributes: Iterable[Attribute] = (), biases: Iterable[str] = (), free_basis: bool = False
    ) -> Group:
        """The group of dimensions; one dimension goes from all heads at once, as the reshape to heads requires.

        A masked dimension is absent from q and k, and the projection does not read it. The fused attention is switched
        off, as it takes the scale from the width.
        """
        path, starts = self.path, tuple(head * self.head_dim for head in range(self.heads))
        q_and_k = (*starts, *(self.width + start for start in starts))
        gate = () if self.gate is None else rows(f"{path}.gate", self.gate, 1, starts)
        unfused = [Attribute(module=path, name="fused_attn", value=False)] if hasattr(self.attn, "fused_attn") else []
        return Group(
            name=f"{path}.head_dim",
            kind="head_dim",
            units=self.head_dim,
            slices=(
                *rows(f"{path}.qkv", self.qkv, 1, q_and_k, consumer=True),
                *rows(f"{path}.qkv", self.qkv, 1, tuple(2 * self.width + start for start in starts)),
                *(Slice(tensor=f"{path}.{b}", axis=0, offsets=starts, consumer=b != "v_bias") for b in biases),
                *gate,
                columns(f"{path}.proj", 1, starts),
            ),
            attributes=(*unfused, *attributes, *self.attributes),
            class_swaps=self.class_swaps,
            free_basis=free_basis and self.gate is None,
        )


def mlp_group(path: str, block: nn.Module) -> Group:
    """The hidden channels of fc1 -> activation -> fc2, each with its gate if the MLP is gated."""
    mlp = part_of(block, path.rpartition(".")[0], "mlp", *MLPS)
    refuse_norm(mlp, path, "scale_mlp_norm=False")
    fc2 = linear_of(mlp, path, "fc2")
    layers = {name: linear_of(mlp, path, name) for name in readers_of_mlp(mlp)}
    hidden = fc2.in_features
    starts = (0, hidden) if isinstance(mlp, GluMlp) else (0,)  # two halves of one layer
    act = mlp.get_submodule("act")
    widths = {layer.out_features for layer in layers.values()}
    if widths != {len(starts) * hidden} or not maps_each_value(act, hidden):
        raise UnsupportedNetworkError(
            f"{path}.act is a {full_name(type(act))}, which does not map each value alone, so its hidden channels "
            "cannot be removed one by one; use an elementwise activation, e.g. nn.GELU"
        )
    return Group(
        name=f"{path}.channels",
        kind="mlp",
        units=hidden,
        slices=(
            *(part for name, layer in layers.items() for part in rows(f"{path}.{name}", layer, 1, starts)),
            columns(f"{path}.fc2"),
        ),
        attributes=(
            *(length_of(f"{path}.{name}", "out_features") for name in layers),
            length_of(f"{path}.fc2", "in_features", axis=1),
        ),
    )


def readers_of_mlp(mlp: nn.Module) -> tuple[str, ...]:
    """The names of the layers that read the input of an MLP."""
    return ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",)


def blocks_of(network: nn.Module, *types: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The blocks by path; every member of the network's list of blocks must be of a known type."""
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


def part_of(block: nn.Module, path: str, name: str, *wanted: type[nn.Module]) -> nn.Module:
    """`block.name`, which must be one of `wanted`."""
    part = getattr(block, name, None)
    if not isinstance(part, wanted):
        raise _unsupported(f"{path}.{name}", part, f"a timm {' or '.join(kind.__name__ for kind in wanted)}")
    assert isinstance(part, nn.Module)
    return part


def linear_of(module: nn.Module, path: str, name: str) -> nn.Linear:
    """`module.name`, which must be an nn.Linear."""
    linear = getattr(module, name, None)
    if not isinstance(linear, nn.Linear):
        raise _unsupported(f"{path}.{name}", linear, "an nn.Linear")
    return linear


def reader_of_head(network: nn.Module, path: str = "head") -> str:
    """The path of the layer that reads the features: the classifier itself, or the first layer of an nn.Sequential.

    Dropout, and norms over the features (`norms_of_head`), may come before it.
    """
    return _beginning_of_head(network, path)[-1]


def norms_of_head(network: nn.Module, path: str = "head") -> list[str]:
    """The paths of the norms between the features and the layer that reads them."""
    return _beginning_of_head(network, path)[:-1]


def _beginning_of_head(network: nn.Module, path: str) -> list[str]:
    found = []
    for inner in in_order(network.get_submodule(path)):
        layer = network.get_submodule(f"{path}.{inner}" if inner else path)
        if not passes(layer):
            found.append(f"{path}.{inner}" if inner else path)
            if not isinstance(layer, nn.LayerNorm | nn.BatchNorm1d):
                return found
    return [path]


def refuse_norm(module: nn.Module, path: str, remedy: str) -> None:
    """Raises UnsupportedNetworkError for a norm over the units."""
    norm = getattr(module, "norm", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        raise UnsupportedNetworkError(
            f"{path}.norm is a {type(norm).__name__} whose statistics run over the units to be removed, so a masked "
            f"unit and a sliced one differ; build the model with {remedy}"
        )


def _unsupported(path: str, found: object, wanted: str) -> UnsupportedNetworkError:
    return UnsupportedNetworkError(f"{path} is a {full_name(type(found))}; structured pruning only supports {wanted}")
