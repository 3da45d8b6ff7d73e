"""The networks of the table: published architectures with random weights, with fewer blocks where they are large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers.mlp import Mlp
from torch import nn
from torchvision.models import swin_transformer as swins
from torchvision.models import vision_transformer as vits

from swincompress_pl.models import create_model, to_timm

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a name, what was changed of it, and how to make the network of timm."""

    library: str
    name: str
    changed: str
    build: Callable[[], nn.Module]


def timm_case(name: str, changed: str = "", head: Callable[[int], nn.Module] | None = None, **options: Any) -> Case:
    """A name of timm with arguments; `head` makes a head for the width of the features."""
    told = ", ".join(f"{key}={value}" for key, value in options.items())

    def build() -> nn.Module:
        network = create_model(name, **{"num_classes": CLASSES, **options})
        given: Any = network
        if head is not None and hasattr(given.head, "fc"):
            given.head.fc = head(given.num_features)
        elif head is not None:
            given.head = head(given.num_features)
        return network

    return Case(library="timm", name=name, changed=", ".join(part for part in (changed, told) if part), build=build)


def _torchvision_vit(name: str, patch: int, width: int, heads: int) -> Case:
    def build() -> nn.Module:
        return to_timm(vits.VisionTransformer(224, patch, 2, heads, width, 4 * width, num_classes=CLASSES))

    return Case(library="torchvision", name=name, changed="num_layers=2", build=build)


def _torchvision_swin(name: str, width: int, heads: list[int], window: int, *, second: bool = False) -> Case:
    parts = {"block": swins.SwinTransformerBlockV2, "downsample_layer": swins.PatchMergingV2} if second else {}

    def build() -> nn.Module:
        sizes: Any = ([4, 4], width, [1, 1, 1, 1], heads, [window, window])
        return to_timm(swins.SwinTransformer(*sizes, num_classes=CLASSES, **parts), image_size=32 * window)

    return Case(library="torchvision", name=name, changed="depths=(1, 1, 1, 1)", build=build)


def _transformers(kind: str, **options: Any) -> Case:
    told = ", ".join(f"{key}={value}" for key, value in options.items())

    def build() -> nn.Module:
        import transformers

        own = {"add_pooling_layer": False} if kind in ("ViTModel", "DeiTModel") else {}
        network_type = getattr(transformers, kind)
        return to_timm(network_type(network_type.config_class(num_labels=CLASSES, **options), **own))

    return Case(library="transformers", name=kind, changed=told, build=build)


_TWO: dict[str, Any] = {"depth": 2}
_STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1)}
_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
_NARROW: dict[str, Any] = {"depth": 1, "embed_dim": 384, "num_heads": 6}

CASES: tuple[Case, ...] = (
    timm_case("vit_tiny_patch16_224", **_TWO),
    timm_case("vit_base_patch32_224", **_TWO),
    timm_case("flexivit_small", **_TWO),
    timm_case("vit_base_patch16_clip_224", **_TWO),
    timm_case("vit_medium_patch16_gap_240", **_TWO),
    timm_case("vit_small_patch14_dinov2", num_classes=0, img_size=224, **_TWO),
    timm_case("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=224, **_TWO),
    timm_case("vit_base_patch16_siglip_224", **_TWO),
    timm_case("vit_base_patch16_siglip_gap_224", **_TWO),
    timm_case("deit_tiny_patch16_224", **_TWO),
    timm_case("deit_tiny_distilled_patch16_224", **_TWO),
    timm_case("deit3_small_patch16_224", **_TWO),
    timm_case("eva_large_patch14_196", depth=1),
    timm_case("swin_tiny_patch4_window7_224", **_STAGES),
    timm_case("swin_base_patch4_window7_224", **_STAGES),
    timm_case("swin_s3_tiny_224", **_STAGES),
    timm_case("swinv2_tiny_window8_256", **_STAGES),
    timm_case("vit_tiny_patch16_224", in_chans=1, **_TWO),
    timm_case("vit_tiny_patch16_224", in_chans=4, img_size=(192, 256), **_TWO),
    timm_case("vit_tiny_patch16_224", dynamic_img_size=True, final_norm=False, **_TWO),
    timm_case("vit_tiny_patch16_224", global_pool="prr", **_TWO),
    timm_case("vit_tiny_patch16_224", global_pool="avg", fc_norm=False, **_TWO),
    timm_case("vit_tiny_patch16_224", global_pool="max", **_TWO),
    timm_case(
        "vit_tiny_patch16_224",
        "head of BatchNorm1d and Linear",
        lambda width: nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, CLASSES)),
        **_TWO,
    ),
    timm_case(
        "swin_tiny_patch4_window7_224",
        "head of LayerNorm and Linear",
        lambda width: nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.1), nn.Linear(width, CLASSES)),
        img_size=(192, 256),
        in_chans=1,
        **_STAGES,
    ),
    timm_case("deit_tiny_patch16_224", "head of timm's Mlp", lambda width: Mlp(width, 64, CLASSES), **_TWO),
    timm_case("vit_small_resnet26d_224", depth=1),
    timm_case("vit_base_patch16_rpn_224", depth=1),
    timm_case("vit_giant_patch14_dinov2", img_size=224, **_NARROW),
    timm_case("beit3_base_patch16_224", depth=1),
    timm_case("vit_small_patch16_18x2_224", depth=1),
    timm_case("vit_dwee_patch16_reg1_gap_256", depth=1),
    timm_case("eva02_tiny_patch14_224", depth=1),
    _torchvision_vit("vit_b_16", 16, 768, 12),
    _torchvision_vit("vit_b_32", 32, 768, 12),
    _torchvision_swin("swin_t", 96, [3, 6, 12, 24], 7),
    _torchvision_swin("swin_b", 128, [4, 8, 16, 32], 7),
    _torchvision_swin("swin_v2_t", 96, [3, 6, 12, 24], 8, second=True),
    _transformers("ViTForImageClassification", **_LAYERS),
    _transformers("ViTModel", **_LAYERS),
    _transformers("DeiTForImageClassification", **_LAYERS),
    _transformers("DeiTForImageClassificationWithTeacher", **_LAYERS),
    _transformers("Dinov2Model", image_size=224, **_LAYERS),
    _transformers("Dinov2WithRegistersModel", image_size=224, **_LAYERS),
    _transformers("Dinov2ForImageClassification", image_size=224, **_LAYERS),
    _transformers("SwinForImageClassification", depths=[1, 1, 1, 1]),
    _transformers("SwinModel", depths=[1, 1, 1, 1]),
    _transformers("Swinv2ForImageClassification", depths=[1, 1, 1, 1]),
)
