"""The structured pruning groups of timm's ViT and DeiT."""

from __future__ import annotations

from contextlib import suppress

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn

from swincompress_pl.layer_types import full_name
from swincompress_pl.models.shared.parts import (
    AttentionGroups,
    blocks_of,
    mlp_group,
    norms_of_head,
    part_of,
    reader_of_head,
    refuse_norm,
)
from swincompress_pl.models.shared.stream import NotCoveredError, Stream
from swincompress_pl.pruning.structure.groups import Attribute, Group

_TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")


def vit_groups(network: nn.Module) -> list[Group]:
    """The groups of a timm `VisionTransformer` (ViT, DeiT, distilled, with register tokens).

    First come the blocks in order, e.g. "blocks.0.attn.heads", "blocks.0.attn.head_dim" and "blocks.0.mlp.channels",
    then "embed". With qk_norm there is no "head_dim", as the statistics run over the dimensions of a head. There is no
    "embed" if the stream meets something that is not timm's own (RmsNorm, a hybrid patch embedding, attention pooling,
    no classifier). Other variants raise UnsupportedNetworkError: parallel blocks, differential attention, and
    norms over the attention's output or the MLP's hidden channels.
    """
    groups: list[Group] = []
    for path, block in blocks_of(network, Block, ResPostBlock):
        groups += _attention(f"{path}.attn", block)
        groups.append(mlp_group(f"{path}.mlp", block))
    with suppress(NotCoveredError):
        groups.append(_embed(network))
    return groups


def vit_uncovered(network: nn.Module) -> dict[str, str]:
    """{kind of which there is no group: why}."""
    try:
        _embed(network)
    except NotCoveredError as error:
        return {"embed": str(error)}
    return {}


def _attention(path: str, block: nn.Module) -> list[Group]:
    attn = part_of(block, path.rpartition(".")[0], "attn", Attention)
    refuse_norm(attn, path, "scale_attn_norm=False")
    width = Attribute(module=path, name="attn_dim", size_of=f"{path}.proj.weight", axis=1)
    gate = attn.gate if isinstance(attn.gate, nn.Linear) else None
    parts = AttentionGroups(path, attn, gate=gate, attributes=(width,))
    groups = [parts.head_group()]
    if isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity):
        head_dim = Attribute(module=path, name="head_dim")
        groups.append(parts.dimension_group(attributes=(head_dim,), free_basis=True))
    return groups


def _embed(network: nn.Module) -> Group:
    """The residual stream, from patch embedding and tokens to the classifiers."""
    head = reader_of_head(network)
    classifier = network.get_submodule(head)
    if not isinstance(classifier, nn.Linear):
        raise NotCoveredError(
            f"its head is {full_name(type(classifier))}; an nn.Linear, or an nn.Sequential that begins with one "
            "(norms and nn.Dropout aside), can follow the width of the stream"
        )
    stream = Stream(network, "embed", classifier.in_features)
    stream.require(getattr(network, "attn_pool", None) is None, "attn_pool")
    stream.only("", {"patch_embed", "norm_pre", "blocks", "norm", "fc_norm", "head", "head_dist"})
    for name, _ in network.named_parameters(recurse=False):
        stream.require(name in _TOKENS, name)
    stream.embedding()
    stream.tensors(*_TOKENS)
    stream.norm("norm_pre")
    blocks = range(len(list(network.get_submodule("blocks").children())))
    for index in blocks:
        stream.block(f"blocks.{index}")
    stream.norm("norm")
    stream.norm("fc_norm")
    for path in ("head", "head_dist") if hasattr(network, "head_dist") else ("head",):
        reader = reader_of_head(network, path)
        for norm in norms_of_head(network, path):
            stream.norm(norm, size_of=f"{reader}.weight", axis=1)
        stream.reader(reader)
    stream.attributes("", "embed_dim", "num_features", "head_hidden_size")
    stream.feature_info(*blocks)
    return stream.group()
