"""The structured pruning groups of timm's Swin v1 and v2."""

from __future__ import annotations

from timm.layers.classifier import ClassifierHead
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import nn

from swincompress_pl.models.shared.parts import (
    AttentionGroups,
    blocks_of,
    length_of,
    mlp_group,
    norms_of_head,
    part_of,
    reader_of_head,
)
from swincompress_pl.models.shared.stream import NotCoveredError, Stream
from swincompress_pl.models.swin.window_attention import ResizableWindowAttention
from swincompress_pl.pruning.structure.groups import Attribute, ClassSwap, Group, Slice

_RESIZABLE = f"{ResizableWindowAttention.__module__}:{ResizableWindowAttention.__name__}"


def swin_groups(network: nn.Module) -> list[Group]:
    """The groups of a timm `SwinTransformer` or `SwinTransformerV2`.

    First come the blocks in order, e.g. "layers.0.blocks.1.attn.heads", "layers.0.blocks.1.attn.head_dim" and
    "layers.0.blocks.1.mlp.channels", then the stages, e.g. "layers.0.embed". A stage has no "embed" if its stream meets
    a layer that is not timm's own (another norm or patch embedding, or no classifier after the last stage). An
    attention of Swin v2 that is not timm's own has no "heads" and no "head_dim". Other variants raise
    UnsupportedNetworkError.
    """
    groups: list[Group] = []
    if isinstance(network, SwinTransformerV2):
        for path, block in blocks_of(network, SwinTransformerV2Block):
            if _is_resizable(block):
                groups += _attention_v2(f"{path}.attn", block, path)
            groups.append(mlp_group(f"{path}.mlp", block))
    else:
        for path, block in blocks_of(network, SwinTransformerBlock):
            groups += _attention(f"{path}.attn", block)
            groups.append(mlp_group(f"{path}.mlp", block))
    return groups + _embed_groups(network)


def _attention(path: str, block: nn.Module) -> tuple[Group, Group]:
    attn = part_of(block, path.rpartition(".")[0], "attn", swin_transformer.WindowAttention)
    parts = AttentionGroups(path, attn)
    table = Slice(tensor=f"{path}.relative_position_bias_table", axis=1)
    return parts.head_group(slices=(table,)), parts.dimension_group(free_basis=True)


def _is_resizable(block: nn.Module) -> bool:
    return type(block.attn) in (swin_transformer_v2.WindowAttention, ResizableWindowAttention)


def _attention_v2(path: str, block: nn.Module, block_path: str) -> tuple[Group, Group]:
    """Cosine attention with a scale per head, a bias from a small MLP, and separate q, k and v biases."""
    attn = part_of(block, block_path, "attn", swin_transformer_v2.WindowAttention)
    parts = AttentionGroups(path, attn, class_swaps=(ClassSwap(module=path, type=_RESIZABLE),))
    biases = () if attn.q_bias is None else ("q_bias", "k_bias", "v_bias")
    heads = parts.head_group(
        slices=(Slice(tensor=f"{path}.logit_scale", axis=0), Slice(tensor=f"{path}.cpb_mlp.2.weight", axis=0)),
        attributes=(
            Attribute(module=block_path, name="num_heads"),
            length_of(f"{path}.cpb_mlp.2", "out_features"),
        ),
        biases=biases,
    )
    return heads, parts.dimension_group(biases=biases)


def _embed_groups(network: nn.Module) -> list[Group]:
    groups = []
    stages = len(list(network.get_submodule("layers").children()))
    for number in range(stages):
        try:
            groups.append(_embed(network, number, last=number == stages - 1))
        except NotCoveredError:
            continue
    return groups


def _embed(network: nn.Module, number: int, *, last: bool) -> Group:
    """The residual stream of a stage: from patch embedding or patch merging to the next merging or the classifier."""
    path = f"layers.{number}"
    stream = Stream(network, f"{path}.embed", network.get_submodule(f"{path}.blocks.0.mlp.fc1").in_features)  # type: ignore[arg-type]
    stream.require(not list(network.parameters(recurse=False)), "a parameter of the network itself")
    stream.only("", {"patch_embed", "layers", "norm", "head"})
    stream.only(path, {"downsample", "blocks"})
    if number == 0:
        stream.embedding()
        stream.attributes("", "embed_dim")
        stream.attributes(path, "dim")
    else:
        _merging_into(stream, f"{path}.downsample")
    for index, block in enumerate(network.get_submodule(f"{path}.blocks").children()):
        if isinstance(network, SwinTransformerV2):
            stream.require(_is_resizable(block), f"{path}.blocks.{index}.attn")
            stream.swap_class(f"{path}.blocks.{index}.attn", _RESIZABLE)
        stream.block(f"{path}.blocks.{index}")
    if last:
        _classifier(stream)
    else:
        _merging_from(stream, f"layers.{number + 1}")
    stream.feature_info(number)
    return stream.group()


def _merging_into(stream: Stream, path: str) -> None:
    """The patch merging before a stage; v2 normalizes its output."""
    merging = stream.network.get_submodule(path)
    stream.require(type(merging) in (swin_transformer.PatchMerging, swin_transformer_v2.PatchMerging), path)
    stream.writer(f"{path}.reduction")
    if type(merging) is swin_transformer_v2.PatchMerging:
        stream.norm(f"{path}.norm")
    stream.attributes(path, "out_dim")


def _merging_from(stream: Stream, stage: str) -> None:
    """The patch merging after a stage, which joins four neighbors; v1 normalizes them."""
    path = f"{stage}.downsample"
    merging = stream.network.get_submodule(path)
    stream.require(type(merging) in (swin_transformer.PatchMerging, swin_transformer_v2.PatchMerging), path)
    neighbors = tuple(position * stream.units for position in range(4))
    if type(merging) is swin_transformer.PatchMerging:
        stream.norm(f"{path}.norm", neighbors, size_of=f"{path}.reduction.weight", axis=1)
    stream.reader(f"{path}.reduction", neighbors)
    stream.attributes(path, "dim")
    stream.attributes(stage, "dim")


def _classifier(stream: Stream) -> None:
    """The final norm, the pooling (which may join average and maximum) and the classifier."""
    stream.norm("norm")
    stream.require(isinstance(stream.network.head, ClassifierHead), "head")
    stream.only("head", {"fc"})
    reader = reader_of_head(stream.network, "head.fc")
    classifier = stream.network.get_submodule(reader)
    stream.require(isinstance(classifier, nn.Linear), reader)
    assert isinstance(classifier, nn.Linear)
    pooled = classifier.in_features // stream.units
    offsets = tuple(index * stream.units for index in range(pooled))
    for norm in norms_of_head(stream.network, "head.fc"):
        stream.require(pooled == 1, norm)
        stream.norm(norm, size_of=f"{reader}.weight", axis=1)
    stream.reader(reader, offsets)
    stream.attributes("", "num_features")
    stream.attributes("head", "in_features")
    stream.lengths("head", "num_features", size_of=f"{reader}.weight", axis=1)
    stream.lengths("", "head_hidden_size", size_of=f"{reader}.weight", axis=1)
