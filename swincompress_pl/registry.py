"""Finds the adapter of a network family by the network's type.

`pruning` and `quant` know nothing about particular networks: an adapter tells them the pruning groups and the graph.
Adapters live in `models/`, which these rooms must not import, and other packages may bring their own. So adapters are
entry points of the group `swincompress_pl.adapters`. Each entry names a module whose import calls `register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

ENTRY_POINT_GROUP = "swincompress_pl.adapters"
# The entry of pyproject.toml, repeated so that a source tree also works without an installation.
_OWN_ADAPTERS = "swincompress_pl.models"


class Adapter(Protocol):
    """What a family of networks tells the rest of the package about itself.

    Attributes:
        family: Name of the family, for messages.
    """

    family: str

    def groups(self, network: Any) -> list[Any]:
        """Returns the structured pruning groups.

        Args:
            network: A network of the family.

        Returns:
            A list of `swincompress_pl.pruning.Group`.

        Raises:
            UnsupportedNetworkError: If the adapter does not cover this variant of the network.
        """
        ...

    def segments(self, network: Any) -> list[str]:
        """Returns the names of the modules that a forward pass runs one after the other.

        Each takes the one tensor that the previous module returned: patch embedding, blocks, down-sampling. Whatever
        runs between them must be cheap.

        Args:
            network: A network of the family.

        Returns:
            Paths of modules in the order of a pass.
        """
        ...

    def graph(self, network: Any, preprocessing: Mapping[str, Any]) -> Any:
        """Returns the quantizable graph.

        Args:
            network: A network of the family.
            preprocessing: The fields of `data.Preprocessing`; mean and std are folded into the first layer.

        Returns:
            A `swincompress_pl.quant.Graph`.

        Raises:
            UnsupportedNetworkError: If this variant of the network has no integer form.
        """
        ...


@runtime_checkable
class SpikingAdapter(Adapter, Protocol):
    """What the adapter of a family of spiking networks tells in addition."""

    def check_spiking(self, network: Any) -> None:
        """Checks that a network spikes, is in multi-step mode, and forgets between calls.

        Args:
            network: A network of the family.

        Raises:
            ValueError: If it does not; the message names the remedy.
        """
        ...

    def watching_spikes(self, network: Any) -> AbstractContextManager[dict[str, float]]:
        """Counts the spikes of all calls inside a context.

        Args:
            network: A network of the family.

        Returns:
            A context manager that gives {neuron layer: spikes per time step and place}, complete when it ends.
        """
        ...


@runtime_checkable
class ExplainingAdapter(Adapter, Protocol):
    """What an adapter may tell in addition, for messages."""

    def uncovered(self, network: Any) -> Mapping[str, str]:
        """Explains which kinds of groups a network lacks.

        Args:
            network: A network of the family.

        Returns:
            {kind: why there is no such group}.
        """
        ...


@runtime_checkable
class ResizableAdapter(Adapter, Protocol):
    """What an adapter tells in addition if the input size of its networks can change after they are made."""

    def size_arguments(self, network: Any) -> dict[str, Any]:
        """Returns the arguments of the constructor that give the network's present size.

        Args:
            network: A network of the family.

        Returns:
            The arguments by name, as JSON-able data.
        """
        ...


class UnsupportedNetworkError(TypeError):
    """No adapter knows this network, or its adapter does not cover this variant of it."""


ChangedAttributes = dict[str, dict[str, Any]]
"""{module: {attribute: value}}"""

_adapters: dict[type | str, Adapter] = {}
_conversions: set[str] = set()
_comparison: Callable[[Any], ChangedAttributes] | None = None
_loaded = False


def register(network_type: type | str, adapter: Adapter) -> None:
    """Registers the adapter of a class of networks and its subclasses; a later registration replaces an earlier one.

    Args:
        network_type: The class, or "module:Class" so that its module need not be imported.
        adapter: The adapter.
    """
    _adapters[network_type] = adapter


def register_conversions(classes: Iterable[str]) -> None:
    """Announces the classes, as "package:Class", that `models.to_timm` converts, for messages.

    Args:
        classes: The names.
    """
    _conversions.update(classes)


def _load_adapters() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True  # set first: the modules below register by importing this one
    modules = {_OWN_ADAPTERS} | {entry.module for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for module in sorted(modules):
        importlib.import_module(module)


def families() -> Iterator[str]:
    """Yields the names of the supported families, sorted."""
    _load_adapters()
    yield from sorted({adapter.family for adapter in _adapters.values()})


def adapter_for(network: Any) -> Adapter:
    """Finds the adapter of a network, by its class or the nearest base class.

    Args:
        network: The network.

    Returns:
        The adapter.

    Raises:
        UnsupportedNetworkError: If there is none; the message names the class and the supported families.
    """
    _load_adapters()
    for base in type(network).__mro__:
        for key in (base, f"{base.__module__}:{base.__qualname__}"):
            if key in _adapters:
                return _adapters[key]
    kinds = {f"{base.__module__.partition('.')[0]}:{base.__qualname__}" for base in type(network).__mro__}
    converted = (
        "swincompress_pl.models.to_timm(network) makes a network of timm of it. " if kinds & _conversions else ""
    )
    raise UnsupportedNetworkError(
        f"{type(network).__module__}.{type(network).__qualname__}: no adapter for this network; supported families are "
        f"{', '.join(families())}. {converted}Pass the network itself (module.net, not the LightningModule), or "
        "register an adapter with swincompress_pl.registry.register(type, adapter)."
    )


def size_of(network: Any) -> dict[str, Any]:
    """The arguments of the constructor that give the network's present size; empty if its adapter does not say."""
    try:
        adapter = adapter_for(network)
    except UnsupportedNetworkError:
        return {}
    return adapter.size_arguments(network) if isinstance(adapter, ResizableAdapter) else {}


def register_comparison(comparison: Callable[[Any], ChangedAttributes]) -> None:
    """Announce what compares a network with the one that its arguments of creation give; see `changed_attributes`."""
    global _comparison
    _comparison = comparison


def changed_attributes(network: Any) -> ChangedAttributes:
    """Finds the plain attributes that were changed by hand on a network of `models.create_model`.

    Args:
        network: The network.

    Returns:
        {module: {attribute: value}}; empty for another network.

    Raises:
        ValueError: If the network changed in what no attribute brings back. The message names the module.
    """
    return {} if _comparison is None else _comparison(network)
