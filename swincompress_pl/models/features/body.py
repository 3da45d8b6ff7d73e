"""The network inside one of timm's feature extractors, and where its modules lie in the extractor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from timm.models._features import FeatureDictNet, FeatureGetterNet
from timm.models.swin_transformer import SwinTransformerStage
from torch import nn

from swincompress_pl.layer_types import full_name
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.quant import Graph, Node
from swincompress_pl.registry import UnsupportedNetworkError

Rename = Callable[[str], str]


def body_of(network: nn.Module) -> tuple[nn.Module, Rename]:
    """The network inside an extractor, and the path in the extractor of each path in that network.

    `FeatureListNet` takes the stages of a Swin apart; they are shown as a network again. An UnsupportedNetworkError is
    raised for an extractor of another family, whose class says which layers it took out.
    """
    if isinstance(network, FeatureGetterNet):
        inner = network.model
        assert isinstance(inner, nn.Module)
        return inner, lambda path: f"model.{path}" if path else "model"
    assert isinstance(network, FeatureDictNet)
    children = dict(network.named_children())
    stages = [name for name in children if name.startswith("layers_")]
    plain = list(children) == ["patch_embed", *(f"layers_{number}" for number in range(len(stages)))]
    if not stages or not plain or any(type(children[name]) is not SwinTransformerStage for name in stages):
        kinds = ", ".join(f"{name} ({full_name(type(child))})" for name, child in list(children.items())[:3])
        raise UnsupportedNetworkError(
            f"{type(network).__name__} around {kinds}, ...: only that of a Swin v1 is taken apart; make it by timm's "
            "create_model(..., features_only=True, feature_cls='getter')"
        )
    view: Any = type(type(network).__name__, (nn.Module,), {})()
    view.patch_embed = children["patch_embed"]
    view.layers = nn.Sequential(*(children[name] for name in stages))
    view.norm, view.head = nn.Identity(), nn.Identity()  # as timm leaves them in a FeatureGetterNet
    return view, lambda path: path.replace("layers.", "layers_", 1) if path.startswith("layers.") else path


def renamed_graph(graph: Graph, rename: Rename) -> Graph:
    """A graph of the body as one of the extractor. The names of its outputs stay."""
    outputs = tuple(replace(output, value=rename(output.value)) for output in graph.outputs)
    specs = {rename(name): replace(spec, name=rename(name)) for name, spec in graph.quantizers.items()}
    return replace(
        graph, quantizers=specs, nodes=tuple(_renamed_node(node, rename) for node in graph.nodes), outputs=outputs
    )


def _renamed_node(node: Node, rename: Rename) -> Node:
    """Every text in a node is a path of a module or parameter, or a name that is made of one."""

    def renamed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(renamed(item) for item in value)
        return rename(value) if isinstance(value, str) and value not in ("", "images") else value

    return replace(node, **{field.name: renamed(getattr(node, field.name)) for field in fields(node)})


def renamed_group(group: Group, rename: Rename) -> Group:
    """A group of the body as one of the extractor."""
    attributes = tuple(
        replace(a, module=rename(a.module), size_of=None if a.size_of is None else rename(a.size_of))
        for a in group.attributes
    )
    return replace(
        group,
        name=rename(group.name),
        slices=tuple(replace(part, tensor=rename(part.tensor)) for part in group.slices),
        attributes=attributes,
        norms=tuple(replace(norm, module=rename(norm.module)) for norm in group.norms),
        class_swaps=tuple(replace(swap, module=rename(swap.module)) for swap in group.class_swaps),
    )
