"""The adapter of timm's feature extractors for pruning and quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models._features import FeatureGetterNet, FeatureListNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from swincompress_pl.models.features.body import body_of, renamed_graph, renamed_group
from swincompress_pl.models.features.graph import swin_features, vit_features
from swincompress_pl.models.swin.adapter import SwinAdapter
from swincompress_pl.pruning import Group
from swincompress_pl.quant import Graph
from swincompress_pl.quant.graph.builder import AlteredLayerError
from swincompress_pl.registry import ExplainingAdapter, UnsupportedNetworkError, adapter_for, register, size_of

_WIDTH = "the widths of feature maps are what the layers outside of the network expect"


class FeatureAdapter:
    """What `create_model(name, features_only=True)` makes of a ViT or a Swin: a list of feature maps.

    Heads and hidden channels can be pruned; the widths of the maps stay.
    """

    family = "timm feature extractor (features_only=True)"

    def groups(self, network: Any) -> list[Group]:
        """The groups of the network inside, apart from those of the stream."""
        body, rename = body_of(network)
        return [renamed_group(g, rename) for g in self._adapter(network, body).groups(body) if g.kind != "embed"]

    def uncovered(self, network: Any) -> dict[str, str]:
        """{kind of group that the network lacks: why}."""
        body, _ = body_of(network)
        adapter = self._adapter(network, body)
        inside = dict(adapter.uncovered(body)) if isinstance(adapter, ExplainingAdapter) else {}
        return inside | {"embed": _WIDTH}

    def segments(self, network: Any) -> list[str]:
        """The segments of the network inside."""
        body, rename = body_of(network)
        return [rename(path) for path in self._adapter(network, body).segments(body)]

    def graph(self, network: Any, preprocessing: Mapping[str, Any]) -> Graph:
        """The quantizable graph; an UnsupportedNetworkError for a network without an integer form."""
        body, rename = body_of(network)
        getter = isinstance(network, FeatureGetterNet)
        if getter and type(body) not in (VisionTransformer, SwinTransformer):
            raise UnsupportedNetworkError(
                f"{type(network).__name__} around {type(body).__name__}: no integer form; feature maps of a plain timm "
                "VisionTransformer or SwinTransformer (v1) have one"
            )
        make = vit_features if isinstance(body, VisionTransformer) else swin_features
        try:
            return renamed_graph(make(network, body, preprocessing), rename)
        except AlteredLayerError as error:
            raise AlteredLayerError(str(error), path=rename(error.path), wanted=error.wanted) from error

    def size_arguments(self, network: Any) -> dict[str, Any]:
        """The arguments of the constructor that give the network's present size."""
        return size_of(body_of(network)[0]) if isinstance(network, FeatureGetterNet) else {}

    def _adapter(self, network: Any, body: Any) -> Any:
        if not isinstance(network, FeatureGetterNet):
            return SwinAdapter()
        try:
            return adapter_for(body)
        except UnsupportedNetworkError as error:
            raise UnsupportedNetworkError(f"{type(network).__name__} around {error}") from error


register(FeatureGetterNet, FeatureAdapter())
register(FeatureListNet, FeatureAdapter())
