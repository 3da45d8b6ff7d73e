"""to_timm: the names of the classes, the preprocessing and the image size that come along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.conversion_cases import (
    IMAGES,
    PLAIN,
    PREPROCESSING,
    VIT,
    WINDOWS,
    close,
    hugging,
    lively,
    pooled,
    swin,
    vit,
)
from torch import nn
from torchvision.models import Swin_T_Weights, Swin_V2_T_Weights

from swincompress_pl import quantize
from swincompress_pl.models import preprocessing_for, to_timm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_labels_come_along() -> None:
    names = {2: "fox", 0: "cat", 1: "dog"}
    network: Any = hugging("SwinForImageClassification", **WINDOWS, id2label=names)
    converted: Any = to_timm(network)
    assert converted.class_names == ("cat", "dog", "fox")
    assert copy.deepcopy(converted).class_names == ("cat", "dog", "fox")
    assert not hasattr(to_timm(hugging("SwinForImageClassification", **WINDOWS)), "class_names")  # LABEL_0, ...
    quantized = quantize(converted, [IMAGES], method="max", preprocessing=PREPROCESSING)
    assert quantized.to_program().classes == ("cat", "dog", "fox")
    named = quantize(converted, [IMAGES], method="max", preprocessing=PREPROCESSING, classes=["a", "b", "c"])
    assert named.to_program().classes == ("a", "b", "c")
    converted.reset_classifier(2)
    assert quantize(converted, [IMAGES], method="max", preprocessing=PREPROCESSING).classes is None
    network.classifier = nn.Linear(32, 4)
    with pytest.raises(ValueError, match=r"config.id2label has 3 names \(cat, dog, fox, ...\) for 4 classes"):
        to_timm(network)


def test_torchvisions_weights_bring_labels_and_preprocessing() -> None:
    weights = Swin_T_Weights.IMAGENET1K_V1
    small = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": [7, 7]}
    converted: Any = to_timm(swin(**small, num_classes=1000), weights=weights)
    assert converted.class_names[0] == "tench"
    assert len(converted.class_names) == 1000
    assert preprocessing_for(converted) == {
        "height": 224,
        "width": 224,
        "resize": 232,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    with pytest.raises(ValueError, match=r"weights has 1000 names \(tench, .*for 3 classes"):
        to_timm(swin(**small), weights=weights)
    unnamed = to_timm(swin(**small), weights=weights.transforms())
    assert preprocessing_for(unnamed)["resize"] == 232
    with pytest.raises(ValueError, match="no multiple of its window of 7x7"):
        to_timm(swin(**small, num_classes=1000), weights=Swin_V2_T_Weights.IMAGENET1K_V1)
    with pytest.raises(TypeError, match="weights is 'IMAGENET1K_V1'; it must be"):
        to_timm(swin(**small), weights="IMAGENET1K_V1")


PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
}


def test_a_processor_brings_preprocessing() -> None:
    network = lively(hugging("ViTForImageClassification", **VIT))
    converted = to_timm(network, processor=PROCESSOR)
    described = {"height": 32, "width": 32, "resize": 40, "crop_mode": "center", "interpolation": "bicubic"}
    described |= PREPROCESSING
    assert preprocessing_for(converted) == described
    transformers = pytest.importorskip("transformers")
    assert preprocessing_for(to_timm(network, processor=transformers.BitImageProcessor(**PROCESSOR))) == described
    plain = to_timm(network, processor=PROCESSOR | {"do_normalize": False})
    assert preprocessing_for(plain)["std"] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="no preprocessing of its own"):
        preprocessing_for(to_timm(network))
    squashed: Any = to_timm(network, processor=PROCESSOR | {"size": {"height": 32, "width": 32}, "crop_size": None})
    assert squashed.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    assert preprocessing_for(squashed) == described | {"resize": 32, "crop_mode": "squash"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 40}, "size is 40; it must be"),
        ({"do_center_crop": False}, "does not give images of one size"),
        ({"do_resize": False}, "do_resize=False"),
        ({"rescale_factor": 1 / 127.5}, "is not 1/255"),
        ({"image_mean": None}, "image_mean is None"),
        ({"crop_size": {"height": 24, "width": 24}}, "images 24x24, the network's own 32x32"),
    ],
)
def test_a_processor_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_timm(hugging("ViTForImageClassification", **VIT), processor=PROCESSOR | change)


def test_a_processor_that_is_none() -> None:
    with pytest.raises(TypeError, match="processor is 3; it must be an image processor"):
        to_timm(vit(), processor=3)
    with pytest.raises(ValueError, match="processor and weights are both given"):
        to_timm(vit(), processor=PROCESSOR, weights=Swin_T_Weights.IMAGENET1K_V1)


@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_dinov2_at_another_size_resamples_positions_as_transformers_does(kind: str) -> None:
    network = lively(hugging(kind, **{**PLAIN, "image_size": 48}))
    smaller = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(2))
    converted: Any = to_timm(network, image_size=(32, 40))
    assert converted.creation["kwargs"]["img_size"] == [32, 40]
    with torch.no_grad():
        assert close(pooled(network, smaller), converted(smaller))
    by_processor: Any = to_timm(network, processor=PROCESSOR)
    assert by_processor.patch_embed.img_size == (32, 32)
    with pytest.raises(ValueError, match="image_size 48x48, images 32x32"):
        to_timm(network, image_size=48, processor=PROCESSOR)


@pytest.mark.parametrize("size", [0, 3.5, "32", (32, 32, 32)])
def test_an_image_size_that_is_none(size: Any) -> None:
    with pytest.raises(ValueError, match="image_size"):
        to_timm(swin(), image_size=size)
