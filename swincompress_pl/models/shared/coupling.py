"""What is coupled to the channels of a spiking network: convolutions with their BatchNorms, and their readers."""

from __future__ import annotations

from torch import nn

from swincompress_pl.layer_types import alteration, full_name
from swincompress_pl.models.shared.parts import columns, length_of, rows
from swincompress_pl.pruning.structure.groups import Attribute, ClassSwap, Group, Slice
from swincompress_pl.registry import UnsupportedNetworkError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Coupling:
    """Gathers the slices of one group of `units` channels, heads, or dimensions of heads; `group()` is the result.

    A neuron acts on every channel separately and has no width, so it needs no slice. `heads` is as in `Group`.
    """

    def __init__(self, network: nn.Module, name: str, kind: str, units: int, *, heads: int = 1) -> None:
        self.network, self.name, self.kind, self.units, self.heads = network, name, kind, units, heads
        self._slices: list[Slice] = []
        self._attributes: list[Attribute] = []
        self._class_swaps: list[ClassSwap] = []

    def group(self) -> Group:
        """The group; at least one unit stays."""
        return Group(
            name=self.name,
            kind=self.kind,
            units=self.units,
            slices=tuple(self._slices),
            attributes=tuple(dict.fromkeys(self._attributes)),
            class_swaps=tuple(self._class_swaps),
            heads=self.heads,
        )

    def writer(
        self, conv: str, norm: str, width: int = 1, offsets: tuple[int, ...] = (0,), *, silent: bool = False
    ) -> None:
        """Adds rows of a convolution and the channels of the BatchNorm behind it.

        If `silent`, the BatchNorm of a masked unit gives 0, so that the neuron behind it never fires. This is for units
        that meet in a product before a layer's columns read them.
        """
        module = self._convolution(conv)
        if module.groups != 1:
            raise self._unknown(conv, "a convolution without groups")
        self._slices += rows(conv, module, width, offsets)
        self.norm(norm, width, offsets, silent=silent)
        self._attributes += [length_of(conv, "out_channels")]

    def reader(self, path: str, width: int = 1, offsets: tuple[int, ...] = (0,)) -> None:
        """Adds columns of a convolution without groups, or of a linear layer."""
        module = self.network.get_submodule(path)
        if isinstance(module, nn.Linear):
            self._attributes.append(length_of(path, "in_features", axis=1))
        elif self._convolution(path).groups == 1:
            self._attributes.append(length_of(path, "in_channels", axis=1))
        else:
            raise self._unknown(path, "a convolution without groups")
        self._slices.append(columns(path, width, offsets))

    def depthwise(self, conv: str, norm: str | None) -> None:
        """Adds a depthwise convolution and the BatchNorm behind it, if there is one."""
        module = self._convolution(conv)
        if not module.groups == module.in_channels == module.out_channels:
            raise self._unknown(conv, "a depthwise convolution")
        self._slices += rows(conv, module)
        self._attributes += [length_of(conv, name) for name in ("groups", "in_channels", "out_channels")]
        if norm is not None:
            self.norm(norm)

    def attribute(self, module: str, name: str) -> None:
        """Adds an attribute that is the number of units."""
        self._attributes.append(Attribute(module=module, name=name))

    def swap_class(self, module: str, new_type: type[nn.Module]) -> None:
        """Adds a module whose own forward cannot take another width."""
        self._class_swaps.append(ClassSwap(module=module, type=f"{new_type.__module__}:{new_type.__qualname__}"))

    def norm(self, path: str, width: int = 1, offsets: tuple[int, ...] = (0,), *, silent: bool = False) -> None:
        """Adds a BatchNorm on the channels, with its statistics; `silent` as in `writer`."""
        norm = self.network.get_submodule(path)
        if not isinstance(norm, _BATCH_NORMS):
            raise self._unknown(path, "a BatchNorm")
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, name) is None:
                raise self._unknown(path, "a BatchNorm with affine=True and running statistics")
            consumer = silent and name in ("weight", "bias")
            part = Slice(tensor=f"{path}.{name}", axis=0, width=width, offsets=offsets, consumer=consumer)
            self._slices.append(part)
        self._attributes.append(length_of(path, "num_features"))

    def _convolution(self, path: str) -> nn.Conv1d | nn.Conv2d:
        module = self.network.get_submodule(path)
        if not isinstance(module, _CONVOLUTIONS):
            raise self._unknown(path, "a convolution")
        return module

    def _unknown(self, path: str, wanted: str) -> UnsupportedNetworkError:
        found = full_name(type(self.network.get_submodule(path)))
        return UnsupportedNetworkError(
            f"{self.name}: {path} is a {found}; structured pruning of spiking networks expects {wanted} there"
        )


def width_of(network: nn.Module, path: str, axis: int = 0) -> int:
    """The length of a layer's weight along an axis; an UnsupportedNetworkError for a module without a weight."""
    module = network.get_submodule(path)
    weight = module._parameters.get("weight")
    if weight is None:
        reason = alteration(module)
        raise UnsupportedNetworkError(
            f"{path} is a {full_name(type(module))}; structured pruning of spiking networks expects a layer with a "
            f"weight there{'' if reason is None else f': {reason}'}"
        )
    return weight.shape[axis]
