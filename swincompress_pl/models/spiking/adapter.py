"""The adapter of spikingjelly's spiking transformers for pruning and quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pkgutil import resolve_name
from typing import Any

from swincompress_pl.models.spiking.memory import check_spiking, watching_spikes
from swincompress_pl.pruning import Group
from swincompress_pl.quant import Graph
from swincompress_pl.registry import register

_THEIRS = "spikingjelly.activation_based.model"
_GROUPS, _GRAPH = "swincompress_pl.models.spiking.groups", "swincompress_pl.models.spiking.graph"


class SpikingAdapter:
    """One family of spiking networks.

    `groups` and `graph` are "module:function", imported on use, as they import spikingjelly, which takes seconds.
    `stem` names modules before the blocks, and `blocks` the list of blocks behind each of them.
    """

    def __init__(
        self, family: str, *, groups: str, graph: str, stem: tuple[str, ...] = (), blocks: tuple[str, ...] = ()
    ) -> None:
        self.family, self._groups, self._graph, self._stem, self._blocks = family, groups, graph, stem, blocks

    def groups(self, network: Any) -> list[Group]:
        """The structured pruning groups (see `models.shared`)."""
        groups: Callable[[Any], list[Group]] = resolve_name(self._groups)
        return groups(network)

    def segments(self, network: Any) -> list[str]:
        """The stem and the blocks in the order of a pass."""
        names = []
        for stem, blocks in zip(self._stem, self._blocks, strict=True):
            names += [stem, *(f"{blocks}.{name}" for name, _ in network.get_submodule(blocks).named_children())]
        return names

    def size_arguments(self, network: Any) -> dict[str, Any]:
        """The number of time steps, by which a forward pass repeats the images."""
        return {"T": int(network.T)} if hasattr(network, "T") else {}

    def graph(self, network: Any, preprocessing: Mapping[str, Any]) -> Graph:
        """The quantizable graph; a ValueError as `check_spiking`."""
        check_spiking(network)
        graph: Callable[[Any, Mapping[str, Any]], Graph] = resolve_name(self._graph)
        return graph(network, preprocessing)

    def check_spiking(self, network: Any) -> None:
        """See `check_spiking`."""
        check_spiking(network)

    def watching_spikes(self, network: Any) -> AbstractContextManager[dict[str, float]]:
        """See `watching_spikes`."""
        return watching_spikes(network)


register(
    f"{_THEIRS}.spikformer:Spikformer",
    SpikingAdapter(
        "spikingjelly Spikformer",
        groups=f"{_GROUPS}:spikformer_groups",
        graph=f"{_GRAPH}:spikformer_graph",
        stem=("patch_embed",),
        blocks=("blocks",),
    ),
)
register(
    f"{_THEIRS}.spike_driven_transformer:SpikeDrivenTransformer",
    SpikingAdapter(
        "spikingjelly Spike-driven Transformer",
        groups=f"{_GROUPS}:sdt_groups",
        graph=f"{_GRAPH}:sdt_graph",
        stem=("patch_embed",),
        blocks=("blocks",),
    ),
)
register(
    f"{_THEIRS}.qkformer:QKFormer",
    SpikingAdapter(
        "spikingjelly QKFormer",
        groups=f"{_GROUPS}:staged_groups",
        graph=f"{_GRAPH}:qkformer_graph",
        stem=("patch_embed1", "patch_embed2", "patch_embed3"),
        blocks=("stage1", "stage2", "stage3"),
    ),
)
register(
    f"{_THEIRS}.maxformer:MaxFormer",
    SpikingAdapter(
        "spikingjelly MaxFormer",
        groups=f"{_GROUPS}:staged_groups",
        graph=f"{_GRAPH}:maxformer_graph",
        stem=("patch_embed1", "patch_embed2", "patch_embed3"),
        blocks=("stage1", "stage2", "stage3"),
    ),
)
