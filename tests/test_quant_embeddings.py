"""Networks without a classifier: their integers are the features, for a head outside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.qat_cases import PREPROCESSING as QAT_PREPROCESSING
from support.qat_cases import VIT as QAT_VIT
from support.qat_cases import Restorable, loader, trainer
from support.quant_cases import PREPROCESSING, SWIN, VIT
from torch import Tensor, nn

from swincompress_pl import accel
from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, PruningPlan, apply_plan, prune
from swincompress_pl.quant import QuantizedNetwork, diagnose, measure_sensitivity, quantization_errors, quantize
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for
from swincompress_pl.spec.reference import run

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("VisionTransformer", VIT),
    "average, norm behind it": ("VisionTransformer", {**VIT, "global_pool": "avg", "class_token": False}),
    "average": ("VisionTransformer", {**VIT, "global_pool": "avg", "class_token": False, "fc_norm": False}),
    "swin": ("SwinTransformer", {"img_size": 16, **SWIN}),
}


def backbone(name: str = "class token") -> tuple[nn.Module, Tensor, Tensor]:
    """The network, images and its features."""
    torch.manual_seed(0)
    model, options = BACKBONES[name]
    network = create_model(model, num_classes=0, **options).eval()
    pixels = torch.randint(0, 256, (12, 3, 16, 16)).float()
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    images = (pixels / 255 - mean) / std
    with torch.no_grad():
        return network, images, network(images)


def assert_one_meaning(quantized: QuantizedNetwork, images: Tensor, path: Path) -> None:
    """Twin, reference and engine give the same integers, before and after a file."""
    pixels = quantized.eval().pixels(images)
    expected = quantized.integer_logits(pixels).numpy()
    np.testing.assert_array_equal(run(quantized.to_program(), pixels.numpy()), expected)
    engine = accel.load(accel.export(quantized, path), threads=1)
    np.testing.assert_array_equal(engine.run_integer(pixels.numpy()), expected)
    np.testing.assert_array_equal(engine(pixels.numpy()), quantized(images).numpy())


LEARNED = {"search": {"rounding": "learned", "learning": {"iterations": 1}}}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in BACKBONES), ("class token", {"method": "max"}), ("class token", LEARNED)],
)
def test_features_are_those_of_the_network(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    network, images, features = backbone(name)
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, embeddings=True, **options)
    assert quantized(images).shape == features.shape
    assert (quantized.eval()(images) - features).norm() < 0.03 * features.norm()
    assert quantized.without_signal == ()
    assert_one_meaning(quantized, images, tmp_path / "a.safetensors")


def test_the_last_product_is_exact() -> None:
    network, images, _ = backbone()
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, embeddings=True, bits="W4A8").eval()
    program = quantized.to_program()
    weight = program.tensors[program.operations[-1].tensors["weight"]]
    assert np.array_equal(weight, 127 * np.eye(16, dtype=np.int8))


def test_features_that_nobody_asked_for_are_refused() -> None:
    network, images, _ = backbone()
    with pytest.raises(UnsupportedNetworkError, match=r"VisionTransformer: head is Identity.*embeddings=True"):
        quantize(network, [images], preprocessing=PREPROCESSING)


def test_features_come_in_the_format_of_the_images() -> None:
    network, images, _ = backbone()
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, embeddings=True, classes=["a", "b"]).eval()
    assert quantized.classes is None
    head = nn.Linear(16, 3).bfloat16()
    assert head(quantized(images.bfloat16())).dtype is torch.bfloat16
    assert quantized.train()(images.double()).dtype is torch.float64


def test_what_needs_classes_is_refused_and_the_rest_measured() -> None:
    network, images, _ = backbone()
    quantized = quantize(copy.deepcopy(network), [images], preprocessing=PREPROCESSING, embeddings=True).eval()
    with pytest.raises(ValueError, match="VisionTransformer gives features"):
        diagnose(quantized, images)
    assert quantization_errors(quantized, images)[-1].name == "head"
    table = measure_sensitivity(network, [images], preprocessing=PREPROCESSING, widths=(4, 8))
    assert table.layers[1].loss[4] > table.layers[1].loss[8] > 0


@pytest.mark.parametrize("name", ["class token", "swin"])
def test_scales_follow_when_units_are_cut(name: str, tmp_path: Path) -> None:
    network, images, _ = backbone(name)
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING, embeddings=True)
    group = next(each for each in adapter_for(network).groups(network) if each.name.endswith("mlp.channels"))
    plan = PruningPlan(units={group.name: group.units}, kept={group.name: tuple(range(group.units // 2))})
    cut = apply_plan(network, plan)
    quantized.follow({tensor.name: dict(tensor.kept) for tensor in cut.tensors})
    assert_one_meaning(quantized, images, tmp_path / "a.safetensors")


def test_the_width_of_the_features_is_not_pruned() -> None:
    network, _, _ = backbone()
    with pytest.raises(ValueError, match="VisionTransformer has no group of kind 'embed'"):
        prune(network, lambda _: 90.0, AdaptivePruningConfig(kinds=("embed",)))


class HeadOutside(Restorable):
    """The network gives features, the module's own head classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_model("VisionTransformer", **{**QAT_VIT, "num_classes": 0})
        self.head = nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(-1) == batch[1]).float().mean())


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("options", [{}, {"distillation": 0.5, "learn_scales": True}], ids=["plain", "distilled"])
def test_training_with_a_head_outside(options: dict[str, Any], tmp_path: Path) -> None:
    module = HeadOutside()
    callback = QuantizationAwareTraining(
        start_epoch=0, calibration_images=16, preprocessing=QAT_PREPROCESSING, model_attribute="backbone", **options
    )
    fit = trainer(tmp_path, 1, callback)
    fit.fit(module, loader(), loader())
    assert isinstance(module.backbone, QuantizedNetwork)
    images = next(iter(loader()))[0]
    assert_one_meaning(module.backbone, images, tmp_path / "a.safetensors")
    fit.save_checkpoint(tmp_path / "fit.ckpt")
    again = HeadOutside.load_from_checkpoint(tmp_path / "fit.ckpt", map_location="cpu")
    assert torch.equal(again.eval()(images), module.eval()(images))
