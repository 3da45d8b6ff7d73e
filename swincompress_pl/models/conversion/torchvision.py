"""torchvision's VisionTransformer and SwinTransformer, versions 1 and 2."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from swincompress_pl.models.conversion.family import (
    Family,
    Size,
    Tensors,
    check_windows,
    out_features,
    pair,
    rates,
    ratio_for,
    refused,
)

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_STAGE = r"features\.(\d*[13579])\.(\d+)\."


def _answer(network: nn.Module, images: Tensor) -> Tensor:
    answer: Tensor = network(images)
    return answer


def _vit(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    if not isinstance(network.conv_proj, nn.Conv2d):
        raise refused(network, "it embeds patches by several convolutions (conv_stem_configs)", "use one without")
    if any(name.startswith("pre_logits") for name, _ in network.heads.named_children()):
        raise refused(network, "its head has two layers (representation_size)", "give it a head of one nn.Linear")
    block = network.encoder.layers[0]
    head = network.heads[-1] if isinstance(network.heads, nn.Sequential) and len(network.heads) else network.heads
    return "VisionTransformer", {
        "img_size": list(size),
        "patch_size": list(network.conv_proj.kernel_size),
        "in_chans": network.conv_proj.in_channels,
        "num_classes": out_features(head),
        "embed_dim": network.conv_proj.out_channels,
        "depth": len(network.encoder.layers),
        "num_heads": block.self_attention.num_heads,
        "mlp_ratio": ratio_for(block.mlp[0].out_features, network.conv_proj.out_channels),
        **rates(
            pos_drop_rate=network.encoder.dropout.p,
            proj_drop_rate=block.dropout.p,
            attn_drop_rate=block.self_attention.dropout,
        ),
    }


VISION_TRANSFORMER = Family(
    classes=("torchvision:VisionTransformer",),
    architecture=_vit,
    native_size=lambda network: pair(network.image_size),
    answer=_answer,
    names=(
        (r"class_token", r"cls_token"),
        (r"encoder\.pos_embedding", r"pos_embed"),
        (r"conv_proj", r"patch_embed.proj"),
        (_BLOCK + r"ln_(\d)", r"blocks.\1.norm\2"),
        (_BLOCK + r"self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
        (_BLOCK + r"self_attention\.out_proj", r"blocks.\1.attn.proj"),
        (_BLOCK + r"mlp\.(?:0|linear_1)", r"blocks.\1.mlp.fc1"),
        (_BLOCK + r"mlp\.(?:3|linear_2)", r"blocks.\1.mlp.fc2"),
        (r"encoder\.ln", r"norm"),
        (r"heads(?:\.head)?", r"head"),
    ),
)


def _stages(network: Any) -> list[Any]:
    return [stage for stage in list(network.features)[1:] if isinstance(stage, nn.Sequential)]


def _is_v2(network: nn.Module) -> bool:
    return any(name.endswith(".logit_scale") for name, _ in network.named_parameters())


def _swin_size(network: Any) -> Size:
    """The size of which the last stage has one window, as in all published networks."""
    patch, window = network.features[0][0].kernel_size, _stages(network)[0][0].attn.window_size
    scale = 2 ** (len(_stages(network)) - 1)
    return patch[0] * window[0] * scale, patch[1] * window[1] * scale


def _swin(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    stages, embed = _stages(network), network.features[0][0]
    block = stages[0][0]
    attn = block.attn
    check_windows(network, size, embed.kernel_size, attn.window_size, len(stages), clamped=False)
    last = stages[-1][-1]
    return "SwinTransformerV2" if _is_v2(network) else "SwinTransformer", {
        "img_size": list(size),
        "patch_size": list(embed.kernel_size),
        "in_chans": embed.in_channels,
        "num_classes": out_features(network.head),
        "embed_dim": embed.out_channels,
        "depths": [len(stage) for stage in stages],
        "num_heads": [stage[0].attn.num_heads for stage in stages],
        "window_size": list(attn.window_size),
        "mlp_ratio": ratio_for(block.mlp[0].out_features, embed.out_channels),
        "qkv_bias": attn.qkv.bias is not None,
        "drop_path_rate": float(last.stochastic_depth.p),
        **rates(proj_drop_rate=attn.dropout, attn_drop_rate=attn.attention_dropout),
    }


def _in_stage(rest: str) -> tuple[str, Any]:
    return _STAGE + rest, lambda match: f"layers.{int(match[1]) // 2}.blocks.{match[2]}.{match[3]}"


def _merging(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) // 2}.downsample.{match[2]}"


def _mlp(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) // 2}.blocks.{match[2]}.mlp.fc{1 if match[3] == '0' else 2}"


def _split_biases(tensors: Tensors, network: nn.Module, size: Size) -> None:
    """Version 2 takes the keys without their bias, in both libraries."""
    if _is_v2(network):
        for name in [name for name in tensors if name.endswith(".qkv.bias")]:
            query, _, value = tensors.pop(name).chunk(3)
            path = name.removesuffix("qkv.bias")
            tensors |= {f"{path}q_bias": query, f"{path}v_bias": value}


SWIN_TRANSFORMER = Family(
    classes=("torchvision:SwinTransformer",),
    architecture=_swin,
    native_size=_swin_size,
    any_size=True,
    answer=_answer,
    adjust=_split_biases,
    unused=(r".*\.relative_position_index", r".*\.relative_coords_table"),
    names=(
        (r"features\.0\.0", r"patch_embed.proj"),
        (r"features\.0\.2", r"patch_embed.norm"),
        _in_stage(r"(norm\d|attn\.(?:qkv|proj|relative_position_bias_table|logit_scale|cpb_mlp\.\d))"),
        (_STAGE + r"mlp\.(0|3)", _mlp),
        (r"features\.(\d*[02468])\.(norm|reduction)", _merging),
        (r"(norm)", r"\1"),
        (r"head", r"head.fc"),
    ),
)
FAMILIES = (VISION_TRANSFORMER, SWIN_TRANSFORMER)
