"""Finds the adapter of a network family by the network's type.

`pruning` and `quant` work on networks that they know nothing about: an adapter tells them the pruning groups and the
graph. Adapters live one floor above (`models/`), and other packages may bring their own, so they are announced as
entry points of the group `swincompress_pl.adapters`; each entry names a module whose import calls `register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

ENTRY_POINT_GROUP = "swincompress_pl.adapters"
# What pyproject.toml declares; repeated so that a source tree that was never installed works too.
_OWN_ADAPTERS = "swincompress_pl.models"


class Adapter(Protocol):
    """What a family of networks tells the rest of the package about itself."""

    family: str

    def groups(self, network: Any) -> list[Any]:
        """The structured pruning groups of `network`: a list of `swincompress_pl.pruning.Group`."""
        ...

    def segments(self, network: Any) -> list[str]:
        """The names of the modules that a forward pass runs one after the other, each taking the one tensor that the
        previous gave: patch embedding, blocks, down-sampling. What runs between them has to be cheap."""
        ...

    def graph(self, network: Any, preprocessing: Mapping[str, Any]) -> Any:
        """The quantizable graph of `network`, a `swincompress_pl.quant.Graph`; mean and std are folded into its first
        layer."""
        ...


@runtime_checkable
class SpikingAdapter(Adapter, Protocol):
    """What a family of spiking networks tells in addition."""

    def check_spiking(self, network: Any) -> None:
        """Raises ValueError unless `network` spikes, in multi-step mode, and forgets between calls."""
        ...

    def watching_spikes(self, network: Any) -> AbstractContextManager[dict[str, float]]:
        """{neuron: spikes a time step and a place} of the calls within the context, complete when it ends."""
        ...


@runtime_checkable
class ExplainingAdapter(Adapter, Protocol):
    """What an adapter may tell in addition."""

    def uncovered(self, network: Any) -> Mapping[str, str]:
        """{kind of group that `network` lacks: why}, for messages."""
        ...


@runtime_checkable
class ResizableAdapter(Adapter, Protocol):
    """What a family tells in addition whose networks take another input size after they were made."""

    def size_arguments(self, network: Any) -> dict[str, Any]:
        """The arguments of the constructor that give a network of the size that `network` has now, as JSON data."""
        ...


class UnsupportedNetworkError(TypeError):
    """No adapter knows this network, or its adapter does not cover this variant of it."""


ChangedAttributes = dict[str, dict[str, Any]]
"""{module: {attribute: value}}"""

_adapters: dict[type | str, Adapter] = {}
_comparison: Callable[[Any], ChangedAttributes] | None = None
_loaded = False


def register(network_type: type | str, adapter: Adapter) -> None:
    """Announce `adapter` for `network_type` and its subclasses; a second registration of a type replaces the first.

    network_type: the class, or "module:Class" for one that is not worth importing before a network of it comes along.
    """
    _adapters[network_type] = adapter


def _load_adapters() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True  # set first: the modules below register by importing this one
    modules = {_OWN_ADAPTERS} | {entry.module for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for module in sorted(modules):
        importlib.import_module(module)


def families() -> Iterator[str]:
    """The names of the supported families, sorted."""
    _load_adapters()
    yield from sorted({adapter.family for adapter in _adapters.values()})


def adapter_for(network: Any) -> Adapter:
    """The adapter of `network`'s type or of its nearest base class.

    Raises UnsupportedNetworkError, naming the type and the supported families, when there is none.
    """
    _load_adapters()
    for base in type(network).__mro__:
        for key in (base, f"{base.__module__}:{base.__qualname__}"):
            if key in _adapters:
                return _adapters[key]
    raise UnsupportedNetworkError(
        f"{type(network).__module__}.{type(network).__qualname__}: no adapter for this network; supported families are "
        f"{', '.join(families())}. Pass the network itself (module.net, not the LightningModule), or register an "
        f"adapter with swincompress_pl.registry.register(type, adapter)."
    )


def size_of(network: Any) -> dict[str, Any]:
    """The arguments of the constructor for the size that `network` has now; empty where its family does not say."""
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
    """The plain attributes that were changed by hand on a network of `models.create_model`; empty for another.

    Raises ValueError, naming the module, where the network changed in what no attribute brings back.
    """
    return {} if _comparison is None else _comparison(network)
