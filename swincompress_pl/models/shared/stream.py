"""The width of a residual stream: everything that writes it, reads it or normalizes it."""

from __future__ import annotations

from collections.abc import Collection

from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from swincompress_pl.layer_types import full_name
from swincompress_pl.models.shared.parts import MLPS, columns, length_of, readers_of_mlp, rows
from swincompress_pl.pruning.structure.groups import Attribute, ClassSwap, Group, NormSlice, Slice
from swincompress_pl.pruning.structure.unit_masks import MaskedLayerNorm

_NORMS = (nn.LayerNorm, LayerNorm, MaskedLayerNorm)  # over the last axis, in the way of F.layer_norm


class NotCoveredError(Exception):
    """The stream meets something whose coupling is unknown, so it has no group."""


class Stream:
    """Gathers what is coupled to a residual stream of `units` channels; `group()` is the result.

    The columns that read the stream are its consumers. Behind a LayerNorm this would not be necessary, as a masked norm
    gives zeros, but layers that read the stream directly (in post-norm blocks) need it.
    """

    def __init__(self, network: nn.Module, name: str, units: int) -> None:
        self.network, self.name, self.units = network, name, units
        self._slices: list[Slice] = []
        self._norms: list[NormSlice] = []
        self._attributes: list[Attribute] = []
        self._class_swaps: list[ClassSwap] = []

    def group(self) -> Group:
        """The group of kind "embed". At least two channels stay, as a LayerNorm over one is constant."""
        return Group(
            name=self.name,
            kind="embed",
            units=self.units,
            slices=tuple(self._slices),
            attributes=tuple(self._attributes),
            min_units=min(2, self.units),
            norms=tuple(self._norms),
            class_swaps=tuple(self._class_swaps),
        )

    def embedding(self, path: str = "patch_embed") -> None:
        """Adds timm's plain patch embedding."""
        module = self.network.get_submodule(path)
        self.require(type(module) is PatchEmbed, path)
        self.writer(f"{path}.proj")
        self.norm(f"{path}.norm")

    def writer(self, path: str) -> None:
        """Adds a linear layer or convolution that writes to the stream."""
        layer = self.network.get_submodule(path)
        convolution = isinstance(layer, nn.Conv2d)
        self.require(isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1), path)
        self._slices += rows(path, layer)
        self._attributes.append(length_of(path, "out_channels" if convolution else "out_features"))

    def reader(self, path: str, offsets: tuple[int, ...] = (0,)) -> None:
        """Adds a linear layer that reads the stream."""
        self.require(isinstance(self.network.get_submodule(path), nn.Linear), path)
        self._slices.append(columns(path, 1, offsets))
        self._attributes.append(length_of(path, "in_features", axis=1))

    def norm(self, path: str, offsets: tuple[int, ...] = (0,), *, size_of: str | None = None, axis: int = 0) -> None:
        """Adds a norm on the stream, if it is one; `size_of` and `axis` give its width if it has no weight."""
        norm = self.network.get_submodule(path)
        if isinstance(norm, nn.Identity):
            return
        if type(norm) is nn.BatchNorm1d:
            self._batch_norm(path, norm)
            return
        self.require(type(norm) in _NORMS, path)
        assert isinstance(norm, nn.LayerNorm)
        self._norms.append(NormSlice(module=path, offsets=offsets))
        for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
            if tensor is not None:
                self._slices.append(Slice(tensor=f"{path}.{name}", axis=0, offsets=offsets))
        if norm.weight is not None:
            size_of, axis = f"{path}.weight", 0
        self._attributes.append(Attribute(module=path, name="normalized_shape", size_of=size_of, axis=axis))

    def _batch_norm(self, path: str, norm: nn.BatchNorm1d) -> None:
        """Adds a BatchNorm over features (N, C)."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, name) is not None:
                self._slices.append(Slice(tensor=f"{path}.{name}", axis=0))
        size_of = next(
            (f"{path}.{name}" for name in ("weight", "running_mean") if getattr(norm, name) is not None), None
        )
        self.require(size_of is not None, path)
        self._attributes.append(Attribute(module=path, name="num_features", size_of=size_of))

    def tensors(self, *names: str) -> None:
        """Adds parameters (1, tokens, channels) of the network that are added or prepended to the stream."""
        for name in names:
            tensor = getattr(self.network, name, None)
            if isinstance(tensor, Tensor):
                self.require(tensor.ndim == 3 and tensor.shape[-1] == self.units, name)
                self._slices.append(Slice(tensor=name, axis=2))

    def block(self, path: str) -> None:
        """Adds attention and MLP, with the norms before them (reading) or behind them (writing)."""
        block = self.network.get_submodule(path)
        self.only(path, {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"})
        mlp = block.mlp
        self.require(isinstance(mlp, MLPS) and isinstance(block.attn, nn.Module), path)
        assert isinstance(mlp, nn.Module)
        for half in ("1", "2"):
            self.norm(f"{path}.norm{half}")
            self._layer_scale(f"{path}.ls{half}", getattr(block, f"ls{half}", None))
        self.reader(f"{path}.attn.qkv")
        if isinstance(block.attn, Attention) and block.attn.gate is not None:
            self.reader(f"{path}.attn.gate")
        self.writer(f"{path}.attn.proj")
        for name in readers_of_mlp(mlp):
            self.reader(f"{path}.mlp.{name}")
        self.writer(f"{path}.mlp.fc2")
        self.attributes(path, "dim")
        self.attributes(f"{path}.attn", "dim")

    def _layer_scale(self, path: str, scale: nn.Module | None) -> None:
        if scale is None or isinstance(scale, nn.Identity):
            return
        self.require(type(scale) is LayerScale, path)
        self._slices.append(Slice(tensor=f"{path}.gamma", axis=0))

    def attributes(self, module: str, *names: str) -> None:
        """Adds those of the module's attributes that exist; they are the width of the stream."""
        present = vars(self.network.get_submodule(module))
        self._attributes += [Attribute(module=module, name=name) for name in names if name in present]

    def lengths(self, module: str, *names: str, size_of: str, axis: int) -> None:
        """Adds those of the module's attributes that exist; they are the length of a tensor of the group."""
        present = vars(self.network.get_submodule(module))
        self._attributes += [
            Attribute(module=module, name=name, size_of=size_of, axis=axis) for name in names if name in present
        ]

    def swap_class(self, module: str, new_type: str) -> None:
        """Adds a module whose own forward cannot read a stream of another width."""
        self._class_swaps.append(ClassSwap(module=module, type=new_type))

    def feature_info(self, *indices: int) -> None:
        """Adds entries of timm's list of what each stage gives."""
        info = getattr(self.network, "feature_info", None)
        for index in indices:
            if isinstance(info, list) and index < len(info) and info[index].get("num_chs") == self.units:
                self._attributes.append(Attribute(module="", name=f"feature_info.{index}.num_chs"))

    def only(self, path: str, children: Collection[str]) -> None:
        """Requires that a module has no other children, because an unknown one might be on the stream as well."""
        for name, child in self.network.get_submodule(path).named_children():
            self.require(name in children or not list(child.parameters()), f"{path}.{name}")

    def require(self, condition: bool, path: str) -> None:
        """Raises NotCoveredError unless `condition` holds."""
        if not condition:
            raise NotCoveredError(f"{self.name} is not covered because of {self._named(path)}")

    def _named(self, path: str) -> str:
        try:
            return f"{path}, a {full_name(type(self.network.get_submodule(path)))}"
        except AttributeError:  # a tensor, or words
            return path
