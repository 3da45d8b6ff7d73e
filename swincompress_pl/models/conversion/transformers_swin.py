"""Swin and Swin v2 of Hugging Face transformers.

The patterns know the names of transformers 5.0 (`attention.self.query`) and the later ones (`attention.q_proj`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from swincompress_pl.models.conversion.family import (
    Family,
    Name,
    Size,
    Tensors,
    check_windows,
    out_features,
    pair,
    rates,
    refused,
    warn_of_dropout,
)
from swincompress_pl.models.conversion.transformers_vit import activation, logits, native_size


def _mean(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(pixel_values=images, return_dict=True).last_hidden_state.mean(1)
    return answer


def _arguments(network: Any, size: Size, *, clamped: bool) -> dict[str, Any]:
    config = network.config
    if config.use_absolute_embeddings:
        raise refused(network, "it adds position embeddings (use_absolute_embeddings=True)", "use one without")
    patch, window = pair(config.patch_size), pair(config.window_size)
    check_windows(network, size, patch, window, len(config.depths), clamped=clamped)
    if config.hidden_dropout_prob:
        warn_of_dropout(
            network,
            f"hidden_dropout_prob={config.hidden_dropout_prob} drops hidden channels of the MLPs in timm, and not "
            "behind the patch embedding",
        )
    return {
        "img_size": list(size),
        "patch_size": list(patch),
        "in_chans": config.num_channels,
        "num_classes": out_features(getattr(network, "classifier", None)),
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": list(window),
        "mlp_ratio": float(config.mlp_ratio),
        "qkv_bias": bool(config.qkv_bias),
        "drop_path_rate": float(config.drop_path_rate),
        **rates(proj_drop_rate=config.hidden_dropout_prob, attn_drop_rate=config.attention_probs_dropout_prob),
    }


def _swin(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    if activation(network):
        name = network.config.hidden_act
        raise refused(network, f"its activation is hidden_act={name!r}", "timm's SwinTransformer has gelu")
    return "SwinTransformer", _arguments(network, size, clamped=False)


def _swin_v2(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    windows = network.config.pretrained_window_sizes
    return "SwinTransformerV2", {
        **_arguments(network, size, clamped=True),
        **activation(network),
        **({"pretrained_window_sizes": list(windows)} if windows and any(windows) else {}),
    }


def _v2_biases(tensors: Tensors, network: Any, size: Size) -> None:
    """Puts the biases of queries and values beside the joined weight, as timm does."""
    for name in [name for name in tensors if name.endswith(".qkv.bias")]:
        query, value = tensors.pop(name).chunk(2)
        path = name.removesuffix("qkv.bias")
        tensors |= {f"{path}q_bias": query, f"{path}v_bias": value}


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample.{match[2]}"


def _names(base: str) -> tuple[tuple[str, Name], ...]:
    """The table, for networks with a head and without."""
    prefix = rf"(?:{base}\.)?"
    block, to = prefix + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.", r"layers.\1.blocks.\2."
    own, table = r"attention\.(?:self\.)?", "relative_position_bias_table"
    return (
        (prefix + r"embeddings\.patch_embeddings\.projection", r"patch_embed.proj"),
        (prefix + r"embeddings\.norm", r"patch_embed.norm"),
        (block + r"layernorm_before", to + "norm1"),
        (block + r"layernorm_after", to + "norm2"),
        *(
            (block + own + rf"(?:{names})", to + f"attn.qkv@{part}")
            for part, names in enumerate(("query|q_proj", "key|k_proj", "value|v_proj"))
        ),
        (block + r"attention\.(?:o_proj|output\.dense)", to + "attn.proj"),
        (block + own + rf"(?:relative_position_bias\.)?{table}", to + f"attn.{table}"),
        (block + own + r"logit_scale", to + "attn.logit_scale"),
        (block + own + r"continuous_position_bias_mlp\.(\d)", to + r"attn.cpb_mlp.\3"),
        (block + r"(?:mlp\.fc1|intermediate\.dense)", to + "mlp.fc1"),
        (block + r"(?:mlp\.fc2|output\.dense)", to + "mlp.fc2"),
        (prefix + r"encoder\.layers\.(\d+)\.downsample\.(norm|reduction)", _next_stage),
        (prefix + r"layernorm", r"norm"),
        (r"classifier", r"head.fc"),
    )


_UNUSED = (r"(?:\w+\.)?embeddings\.mask_token", r".*\.relative_position_index", r".*\.relative_coords_table")


def _family(kind: str, architecture: Any, answer: Any, **more: Any) -> Family:
    return Family(
        classes=(f"transformers:{kind}",),
        architecture=architecture,
        names=_names("swinv2" if "v2" in kind else "swin"),
        answer=answer,
        native_size=native_size,
        unused=_UNUSED,
        **more,
    )


FAMILIES = (
    _family("SwinForImageClassification", _swin, logits),
    _family("SwinModel", _swin, _mean),
    _family("Swinv2ForImageClassification", _swin_v2, logits, adjust=_v2_biases),
    _family("Swinv2Model", _swin_v2, _mean, adjust=_v2_biases),
)
