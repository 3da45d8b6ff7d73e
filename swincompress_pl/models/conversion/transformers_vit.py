"""ViT, DeiT and DINOv2 of Hugging Face transformers.

The patterns know the names of transformers 5.0 (`encoder.layer.0.attention.attention.query`) and the later ones
(`layers.0.attention.q_proj`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swincompress_pl.models.conversion.family import (
    Family,
    Name,
    Size,
    Tensors,
    out_features,
    pair,
    rates,
    ratio_for,
    refused,
    warn_of_dropout,
)

_ACTIVATIONS = {
    "gelu": {},
    "gelu_python": {},
    "gelu_new": {"act_layer": "gelu_tanh"},
    "gelu_pytorch_tanh": {"act_layer": "gelu_tanh"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "relu": {"act_layer": "relu"},
}


def activation(network: Any) -> dict[str, str]:
    """The argument for the activation of the MLPs."""
    name = network.config.hidden_act
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise refused(network, f"its activation is hidden_act={name!r}", f"known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def logits(network: Any, images: Tensor) -> Tensor:
    """The answer of a network with a head for classification."""
    answer: Tensor = network(pixel_values=images, return_dict=True).logits
    return answer


def _class_token(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(pixel_values=images, return_dict=True).last_hidden_state[:, 0]
    return answer


def native_size(network: Any) -> Size:
    """The image size of the configuration."""
    return pair(network.config.image_size)


def _base(network: Any) -> Any:
    return getattr(network, network.base_model_prefix, network)


def _common(network: Any, size: Size) -> dict[str, Any]:
    """The arguments that ViT, DeiT and DINOv2 share."""
    config = network.config
    if getattr(_base(network), "pooler", None) is not None:
        raise refused(
            network,
            "it has a pooler (a layer and tanh behind the class token)",
            f"load it with add_pooling_layer=False ({type(network).__name__}.from_pretrained(..., "
            "add_pooling_layer=False)), whose answer is the class token",
        )
    return {
        "img_size": list(size),
        "patch_size": list(pair(config.patch_size)),
        "in_chans": config.num_channels,
        "num_classes": out_features(getattr(network, "classifier", None)),
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "qkv_bias": bool(config.qkv_bias),
        **activation(network),
        **rates(attn_drop_rate=config.attention_probs_dropout_prob, pos_drop_rate=config.hidden_dropout_prob),
    }


def _vit(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    config = network.config
    if config.hidden_dropout_prob:
        warn_of_dropout(
            network,
            f"hidden_dropout_prob={config.hidden_dropout_prob} drops hidden channels of the MLPs as well in timm",
        )
    return "VisionTransformer", {
        **_common(network, size),
        "mlp_ratio": ratio_for(config.intermediate_size, config.hidden_size),
        **rates(proj_drop_rate=config.hidden_dropout_prob),
    }


def _deit(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    # The distillation token is one more token without a head, as a register is.
    _, arguments = _vit(network, size)
    return "VisionTransformer", arguments | {"reg_tokens": 1}


def _distilled(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    _, arguments = _vit(network, size)
    return "VisionTransformerDistilled", arguments | {"num_classes": out_features(network.cls_classifier)}


def _dinov2(network: Any, size: Size) -> tuple[str, dict[str, Any]]:
    config = network.config
    if getattr(config, "use_swiglu_ffn", False):
        raise refused(network, "it has gated MLPs (use_swiglu_ffn=True, DINOv2 giant)", "use a smaller DINOv2")
    if config.drop_path_rate:
        warn_of_dropout(
            network, f"drop_path_rate={config.drop_path_rate} counts for every block there, and rises from 0 in timm"
        )
    registers = getattr(config, "num_register_tokens", 0)
    return "VisionTransformer", {
        **_common(network, size),
        "mlp_ratio": ratio_for(int(config.hidden_size * config.mlp_ratio), config.hidden_size),
        "init_values": 1.0,
        **({"reg_tokens": registers, "no_embed_class": True} if registers else {}),
        **rates(drop_path_rate=config.drop_path_rate),
    }


def _positions(tensors: Tensors, network: Any, size: Size) -> None:
    """The position embeddings as the network resamples them itself for the image size."""
    embeddings = _base(network).embeddings
    patch = pair(network.config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    probe = torch.empty(1, patches + 1, network.config.hidden_size, device=embeddings.position_embeddings.device)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(probe, *size).to("cpu", torch.float32)
    if getattr(network.config, "num_register_tokens", 0):
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
    tensors["pos_embed"] = positions


def _names(base: str) -> tuple[tuple[str, Name], ...]:
    """The table, for networks with a head and without."""
    prefix = rf"(?:{base}\.)?"
    block = prefix + r"(?:encoder\.)?layers?\.(\d+)\."
    parts = (("query|.*q_proj", 0), ("key|.*k_proj", 1), ("value|.*v_proj", 2))
    return (
        (prefix + r"embeddings\.cls_token", r"cls_token"),
        (prefix + r"embeddings\.register_tokens", r"reg_token"),
        (prefix + r"embeddings\.position_embeddings", r"pos_embed"),
        (prefix + r"embeddings\.patch_embeddings\.projection", r"patch_embed.proj"),
        (block + r"(?:layernorm_before|norm1)", r"blocks.\1.norm1"),
        (block + r"(?:layernorm_after|norm2)", r"blocks.\1.norm2"),
        *((block + rf"attention\.(?:attention\.)?(?:{names})", rf"blocks.\1.attn.qkv@{part}") for names, part in parts),
        (block + r"attention\.(?:o_proj|output\.dense)", r"blocks.\1.attn.proj"),
        (block + r"layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
        (block + r"(?:mlp\.fc1|intermediate\.dense)", r"blocks.\1.mlp.fc1"),
        (block + r"(?:mlp\.fc2|output\.dense)", r"blocks.\1.mlp.fc2"),
        (prefix + r"layernorm", r"norm"),
        (r"classifier", r"head"),
    )


_UNUSED = (r"(?:\w+\.)?embeddings\.mask_token",)


def _family(classes: tuple[str, ...], base: str, architecture: Any, answer: Any, **more: Any) -> Family:
    return Family(
        classes=classes,
        architecture=architecture,
        names=(*more.pop("names", ()), *_names(base)),
        answer=answer,
        native_size=native_size,
        unused=_UNUSED,
        **more,
    )


_TOKEN = ((r"(?:deit\.)?embeddings\.distillation_token", r"reg_token"),)
_TWO_HEADS = (
    (r"deit\.embeddings\.distillation_token", r"dist_token"),
    (r"cls_classifier", r"head"),
    (r"distillation_classifier", r"head_dist"),
)
FAMILIES = (
    _family(("transformers:ViTForImageClassification",), "vit", _vit, logits),
    _family(("transformers:ViTModel",), "vit", _vit, _class_token),
    _family(("transformers:DeiTForImageClassification",), "deit", _deit, logits, names=_TOKEN),
    _family(("transformers:DeiTModel",), "deit", _deit, _class_token, names=_TOKEN),
    _family(("transformers:DeiTForImageClassificationWithTeacher",), "deit", _distilled, logits, names=_TWO_HEADS),
    _family(
        ("transformers:Dinov2Model", "transformers:Dinov2WithRegistersModel"),
        "dinov2",
        _dinov2,
        _class_token,
        any_size=True,
        adjust=_positions,
    ),
)


def refuse_dinov2_head(kind: type) -> ValueError:
    """The error for DINOv2's own head, which reads two vectors."""
    return refused(
        kind,
        "its head reads the class token beside the mean of the patch tokens",
        "convert its embedding (network.dinov2 or network.dinov2_with_registers), and train a head on it",
    )
