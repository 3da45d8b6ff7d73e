"""The end of timm's Vision Transformer in a graph: final norm, pooling, and the head."""

from __future__ import annotations

from typing import Any

import numpy as np
from timm.layers.attention_pool import AttentionPoolLatent, AttentionPoolPrr
from torch import nn

from swincompress_pl.quant import GraphBuilder, QuantizerSpec
from swincompress_pl.quant.graph.head_nodes import LatentQkvNode
from swincompress_pl.quant.graph.heads import Head
from swincompress_pl.quant.graph.nodes import AddNode, AttentionNode, MeanNode
from swincompress_pl.quant.graph.quantizer_spec import LOGIT_BITS

_POOLS = ("token", "avg", "map", "prr")
_REMEDY = "network.reset_classifier(num_classes, global_pool=...) changes it"


def end(build: GraphBuilder, network: Any, x: str) -> None:
    """Adds the norm, the pooling and the head of a VisionTransformer, which reads the residual stream `x`."""
    pool = network.global_pool
    build.refuse(pool not in _POOLS, f"global_pool={pool!r}; use one of {', '.join(map(repr, _POOLS))}. {_REMEDY}")
    head = Head(network, "fc_norm", "head_drop", "head")
    if pool == "prr":
        x = _refined(build, network, x)
        pool = network.attn_pool.pool
        build.head(head, _class_token(build, x) if pool == "token" else _mean(build, network, head, x))
    elif pool == "map":
        build.head(head, _rescaled(build, network, head, _attended(build, network, x)))
    elif pool == "token":
        # The norm acts on each token, so the others need none.
        build.head(head, _normed(build, network, head, _class_token(build, x)))
    else:
        x = _patch_tokens(build, network, x)
        if not isinstance(network.norm, nn.Identity):
            x = build.layer_norm("norm", x, quantizer=build.residual("norm", network.embed_dim))
        build.head(head, _mean(build, network, head, x))


def distilled_end(build: GraphBuilder, network: Any, x: str) -> None:
    """Adds the norm and the two heads of a VisionTransformerDistilled, whose answer is the mean of both."""
    build.refuse(
        network.distilled_training,
        "distilled_training=True gives two answers in training, and its integer form has one: call "
        "network.set_distilled_training(False)",
    )
    heads = Head(network, "head_drop", "head"), Head(network, "head_drop", "head_dist")
    x = build.gather("prefix_rows", x, np.arange(2, dtype=np.int32)[:, None])
    if heads[0].embeds:
        build.head(heads[0], _normed(build, network, heads[0], x, rows=2))
        return
    build.refuse(isinstance(network.norm, nn.Identity), "no final norm before two heads; final_norm=True is needed")
    kinds = [head.steps[0].kind for head in heads if head.steps]
    build.refuse(len(set(kinds)) != 1 or len(kinds) != 2, "head and head_dist begin with other layers; make them alike")
    x = _normed(build, network, heads[0], x)
    answers = []
    for number, head in enumerate(heads):
        row = build.gather(f"{head.path}.token", x, np.array([[number]], dtype=np.int32))
        answers.append(build.head(head, row, factor=0.5))
    channels = network.num_classes
    quantizer = build.quantizer(QuantizerSpec(name="logits", segments=(channels,), bits=LOGIT_BITS))
    build.add(AddNode(name="mean_of_heads", inputs=tuple(answers), quantizer=quantizer))


def _class_token(build: GraphBuilder, x: str) -> str:
    return build.gather("class_token", x, np.zeros((1, 1), dtype=np.int32))


def _patch_tokens(build: GraphBuilder, network: Any, x: str) -> str:
    """The tokens over which the mean is taken."""
    first = _first(network)
    if not first:
        return x
    tokens = network.num_prefix_tokens + network.patch_embed.num_patches
    return build.gather("patch_tokens", x, np.arange(first, tokens, dtype=np.int32)[:, None])


def _first(network: Any) -> int:
    return 0 if network.pool_include_prefix else int(network.num_prefix_tokens)


def _normed(build: GraphBuilder, network: Any, head: Head, x: str, rows: int = 1) -> str:
    """The final norm of what the head reads; the stream itself has 16 bits, so it needs another scale without one."""
    width = network.embed_dim
    if isinstance(network.norm, nn.Identity):
        return _rescaled(build, network, head, x, rows)
    if rows == 1:
        return build.layer_norm("norm", x, quantizer=build.quantizer(head.operand("norm", width, normed=True)))
    x = build.layer_norm("norm", x, quantizer=build.residual("norm", width))
    return _rescaled(build, network, head, x, rows)


def _rescaled(build: GraphBuilder, network: Any, head: Head, x: str, rows: int = 1) -> str:
    """The mean of `rows` tokens of 16 bits, in the unit of what the head reads."""
    if rows == 1 and head.steps and head.steps[0].kind == "layer_norm":
        return x
    quantizer = build.quantizer(head.operand("pool", network.embed_dim))
    return build.add(MeanNode(name="pool", inputs=(x,), quantizer=quantizer, rows=rows))


def _mean(build: GraphBuilder, network: Any, head: Head, x: str) -> str:
    rows = network.num_prefix_tokens + network.patch_embed.num_patches - _first(network)
    quantizer = build.quantizer(head.operand("pool", network.embed_dim))
    return build.add(MeanNode(name="pool", inputs=(x,), quantizer=quantizer, rows=rows))


def _attended(build: GraphBuilder, network: Any, x: str) -> str:
    """The attention pooling of 'map', in which one learned query attends to all tokens, and its MLP."""
    path, pool, width = "attn_pool", network.attn_pool, network.embed_dim
    plain = type(pool) is AttentionPoolLatent and pool.latent_len == 1 and pool.pos_embed is None
    plain = plain and all(isinstance(getattr(pool, name), nn.Identity) for name in ("q_norm", "k_norm"))
    plain = plain and pool.mlp is not None and isinstance(pool.norm, nn.LayerNorm) and pool.pool == "token"
    build.refuse(not plain, "attn_pool is built in another way than global_pool='map' builds it")
    build.refuse(
        isinstance(network.norm, nn.Identity), "no final norm before global_pool='map'; final_norm=True is needed"
    )
    build.plain(f"{path}.kv", nn.Linear)
    if not isinstance(pool.q, nn.Identity):
        build.plain(f"{path}.q", nn.Linear)
    x = build.layer_norm("norm", _patch_tokens(build, network, x))
    qkv = QuantizerSpec(name=f"{path}.qkv", segments=(width, width, width))
    x = build.add(
        LatentQkvNode(
            name=f"{path}.qkv",
            inputs=(x,),
            quantizer=build.quantizer(qkv),
            module=f"{path}.kv",
            latent=f"{path}.latent",
            query=f"{path}.q",
        )
    )
    x = build.gather(f"{path}.latent", _attention(build, pool, x, width), np.zeros((1, 1), dtype=np.int32))
    residual = build.residual(f"{path}.residual", width)
    x = build.linear(f"{path}.proj", x, quantizer=residual, regularizers=build.active(f"{path}.proj_drop"))
    return build.mlp(path, x, norm=f"{path}.norm", residual=residual, layer_scale=None, drop_path=None)


def _attention(build: GraphBuilder, pool: Any, qkv: str, width: int) -> str:
    return build.add(
        AttentionNode(
            name="attn_pool.attention",
            inputs=(qkv,),
            quantizer=build.quantizer(QuantizerSpec(name="attn_pool.attention", segments=(width,))),
            module="attn_pool",
            windows=1,
            qk_dim=pool.head_dim,
            v_dim=pool.head_dim,
        )
    )


def _refined(build: GraphBuilder, network: Any, x: str) -> str:
    """The attention of 'prr', whose q, k and v are the normed tokens themselves."""
    pool = network.attn_pool
    plain = type(pool) is AttentionPoolPrr and all(
        isinstance(getattr(pool, name), nn.Identity) for name in ("pre_norm", "post_norm")
    )
    build.refuse(not plain, "attn_pool has norms of its own, or another type than global_pool='prr' makes it")
    build.refuse(
        isinstance(network.norm, nn.Identity), "no final norm before global_pool='prr'; final_norm=True is needed"
    )
    width = network.embed_dim
    x = build.layer_norm("norm", x, quantizer=build.quantizer(QuantizerSpec(name="norm", segments=(width,))))
    rows = np.arange(network.num_prefix_tokens + network.patch_embed.num_patches, dtype=np.int32)
    x = build.gather("attn_pool.qkv", x, np.repeat(rows[:, None], 3, axis=1))
    return _attention(build, pool, x, width)
