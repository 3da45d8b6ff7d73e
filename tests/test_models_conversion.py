"""to_timm: equal outputs, networks that prune, quantize, export and rebuild, and a refusal for what is not equal."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from support.conversion_cases import (
    CASES,
    FEW,
    IMAGES,
    PIXELS,
    PLAIN,
    PREPROCESSING,
    VIT,
    WINDOWS,
    close,
    hugging,
    lively,
    swin,
    vit,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import efficientnet_b0
from torchvision.models import vision_transformer as vits

from swincompress_pl import accel, load_network, prune, quantize, save_network
from swincompress_pl.models import CompressibleClassifier, create_model, rebuild, to_timm
from swincompress_pl.models.conversion import convert
from swincompress_pl.models.factory import recreate_model
from swincompress_pl.pruning import HoldOut, PruningPlan, apply_plan
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal_and_the_network_works(name: str, tmp_path: Path) -> None:
    build, answer, kind, integers = CASES[name]
    original = lively(build())
    before = {key: value.clone() for key, value in original.state_dict().items()}
    converted: Any = to_timm(original)
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    with torch.no_grad():
        expected = converted(IMAGES)
        assert close(answer(copy.deepcopy(original), IMAGES), expected)

    assert converted.creation["name"] == type(converted).__name__ == kind
    assert json.loads(json.dumps(converted.creation)) == converted.creation
    again = recreate_model(converted.creation)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in converted.state_dict().items()
    }
    loaded = load_network(again, save_network(converted, tmp_path / "network.ckpt")).eval()
    assert torch.equal(loaded(IMAGES), expected)  # with the epsilons of the original

    groups = adapter_for(converted).groups(converted)
    assert {group.kind for group in groups} >= {"heads", "mlp"}
    apply_plan(converted, PruningPlan.removing(groups, {group.name: [0] for group in groups if group.units > 1}))
    if not integers:
        with pytest.raises(UnsupportedNetworkError, match="no integer form"):
            quantize(converted, [IMAGES], method="max", preprocessing=PREPROCESSING)
        return
    embeddings = converted.num_classes == 0
    quantized = quantize(converted, [IMAGES], method="max", preprocessing=PREPROCESSING, embeddings=embeddings)
    file = accel.export(quantized, tmp_path / "model.safetensors")
    found = accel.load(file, threads=1).run_integer(PIXELS.numpy())
    assert np.array_equal(found, accel.reference(file).run_integer(PIXELS.numpy()))
    rebuilt: Any = rebuild(quantized.to_program().origin)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in converted.state_dict().items()
    }
    assert [m.eps for m in rebuilt.modules() if isinstance(m, nn.LayerNorm)] == [
        m.eps for m in converted.modules() if isinstance(m, nn.LayerNorm)
    ]


@pytest.mark.parametrize("name", FEW)
def test_a_network_that_cannot_be_compressed_is_told_about_to_timm(name: str) -> None:
    network = FEW[name][0]()
    for compress in (
        lambda: prune(network, HoldOut(IMAGES, torch.arange(6) % 3)),
        lambda: quantize(network, [IMAGES], preprocessing=PREPROCESSING),
    ):
        with pytest.raises(UnsupportedNetworkError, match=r"swincompress_pl\.models\.to_timm\(network\) makes"):
            compress()


def test_another_network_is_not_told_about_to_timm() -> None:
    with pytest.raises(UnsupportedNetworkError) as caught:
        adapter_for(efficientnet_b0())
    assert "to_timm" not in str(caught.value)


def test_a_mixed_up_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check inside compares outputs: keys and queries in each other's place have the right names and shapes."""
    network = lively(hugging("ViTForImageClassification", **VIT))
    family = convert._FAMILIES["transformers:ViTForImageClassification"]
    swapped = {"qkv@0": "qkv@1", "qkv@1": "qkv@0"}
    names = [(pattern, f"{name[:-5]}{swapped.get(name[-5:], name[-5:])}") for pattern, name in family.names]
    mixed = convert.Family(**{**vars(family), "names": tuple(names)})
    monkeypatch.setitem(convert._FAMILIES, "transformers:ViTForImageClassification", mixed)
    with pytest.raises(ValueError, match="ViTForImageClassification: the converted network answers differently"):
        to_timm(network)


def test_a_head_of_zeros_hides_no_difference() -> None:
    """torchvision starts with one, so that all outputs are equal."""
    network: Any = vit()
    assert not network.heads.head.weight.any()
    assert not to_timm(network).head.weight.any()  # type: ignore[union-attr]
    network.encoder.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ValueError, match="answers differently"):
        to_timm(network)


def test_patched_networks_are_refused() -> None:
    network: Any = lively(swin())
    network.features[1][0].mlp[1] = nn.ReLU()
    with pytest.raises(
        ValueError, match=r"SwinTransformer: the converted network answers differently: by up to .*0.0001 of"
    ):
        to_timm(network)
    network = lively(swin())
    network.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="answers differently"):
        to_timm(network)


def test_tensors_that_are_left_over_or_missing_are_named() -> None:
    network: Any = vit()
    network.heads = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"VisionTransformer: its tensors .* left over \(heads.0.weight, heads.0.bias"):
        to_timm(network)
    network = vit()
    network.encoder.ln = nn.Identity()
    with pytest.raises(ValueError, match=r"2 missing \(by timm's name\) \(norm.bias, norm.weight\)"):
        to_timm(network)
    network = vit()
    network.encoder.layers[1].mlp[0], network.encoder.layers[1].mlp[3] = nn.Linear(32, 16), nn.Linear(16, 32)
    with pytest.raises(
        ValueError, match=r"of another shape .*blocks.1.mlp.fc1.weight \(16, 32\) instead of \(48, 32\)"
    ):
        to_timm(network)


def test_a_network_that_is_built_otherwise_is_refused() -> None:
    network: Any = vit()
    network.encoder.layers[0].mlp = nn.Identity()
    with pytest.raises(ValueError, match="VisionTransformer: it is not built as its class builds it"):
        to_timm(network)


def test_heads_of_fine_tuning_are_taken_along() -> None:
    network: Any = lively(vit())
    network.heads = nn.Linear(32, 5)
    assert close(network(IMAGES), to_timm(network)(IMAGES))
    network.heads = nn.Identity()
    assert to_timm(network)(IMAGES).shape == (6, 32)


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "torchvision class": (efficientnet_b0, UnsupportedNetworkError, "EfficientNet: .*It converts torchvision: VisionT"),
    "timm": (
        lambda: create_model("vit", img_size=8, patch_size=8, embed_dim=8, depth=1, num_heads=1),
        UnsupportedNetworkError,
        "a network of timm already",
    ),
    "masked images": (
        lambda: hugging("ViTForMaskedImageModeling", **VIT),
        UnsupportedNetworkError,
        "ViTForMaskedImageModeling: to_timm has no conversion.*transformers: ViTForImageClassification, ViTModel",
    ),
    "backbone": (lambda: hugging("SwinBackbone", **WINDOWS), UnsupportedNetworkError, "SwinBackbone"),
    "not a network": (lambda: "google/vit", UnsupportedNetworkError, "str: "),  # type: ignore[dict-item, return-value]
    "DINOv2's head": (
        lambda: hugging("Dinov2ForImageClassification", **PLAIN),
        ValueError,
        r"the class token beside the mean of the patch tokens.*network\.dinov2",
    ),
    "gated MLP": (lambda: hugging("Dinov2Model", **PLAIN, use_swiglu_ffn=True), ValueError, "use_swiglu_ffn=True"),
    "pooler": (lambda: hugging("ViTModel", **VIT), ValueError, "add_pooling_layer=False"),
    "activation": (
        lambda: hugging("ViTForImageClassification", **VIT, hidden_act="silu"),
        ValueError,
        "hidden_act='silu'.*known are gelu",
    ),
    "activation of Swin": (
        lambda: hugging("SwinForImageClassification", **WINDOWS, hidden_act="relu"),
        ValueError,
        "hidden_act='relu'.*has gelu",
    ),
    "positions of Swin": (
        lambda: hugging("SwinForImageClassification", **WINDOWS, use_absolute_embeddings=True),
        ValueError,
        "use_absolute_embeddings=True",
    ),
    "padded windows": (
        lambda: hugging("SwinForImageClassification", **{**WINDOWS, "image_size": 40}),
        ValueError,
        "images of 40x40 pixels, stage 0 has a feature map of 10x10, no multiple of its window of 4x4",
    ),
    "convolutional stem": (
        lambda: vit(conv_stem_configs=[vits.ConvStemConfig(8, 3, 8)]),
        ValueError,
        "conv_stem_configs",
    ),
    "head of two layers": (lambda: vit(representation_size=8), ValueError, "representation_size"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_refused(name: str) -> None:
    build, error, message = UNSUPPORTED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        to_timm(build())


def test_dropout_comes_along_or_is_told() -> None:
    converted: Any = to_timm(vit(dropout=0.1, attention_dropout=0.2))
    block = converted.blocks[0]
    rates = [converted.pos_drop.p, block.attn.proj_drop.p, block.attn.attn_drop.p, block.mlp.drop1.p, block.mlp.drop2.p]
    assert rates == [0.1, 0.1, 0.2, 0.1, 0.1]
    paths: Any = to_timm(swin(stochastic_depth_prob=0.3))
    found = [getattr(each.drop_path1, "drop_prob", 0.0) for stage in paths.layers for each in stage.blocks]
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3])
    with pytest.warns(UserWarning, match="hidden_dropout_prob=0.1 drops hidden channels of the MLPs as well"):
        to_timm(hugging("ViTForImageClassification", **VIT, hidden_dropout_prob=0.1))
    with pytest.warns(UserWarning, match="hidden_dropout_prob=0.1 .*not behind the patch embedding"):
        to_timm(hugging("SwinForImageClassification", **WINDOWS, hidden_dropout_prob=0.1))
    with pytest.warns(UserWarning, match="drop_path_rate=0.1 counts for every block"):
        to_timm(hugging("Dinov2Model", **PLAIN, drop_path_rate=0.1))


def test_mode_and_compiled_networks() -> None:
    network = vit()
    assert to_timm(network.train()).training
    assert not to_timm(network.eval()).training
    assert not to_timm(torch.compile(network)).training  # type: ignore[arg-type]


def test_a_classifier_trains_and_restores_it(tmp_path: Path) -> None:
    converted: Any = to_timm(lively(hugging("ViTForImageClassification", **VIT)))
    arguments = {key: value for key, value in converted.creation["kwargs"].items() if key != "num_classes"}
    module = CompressibleClassifier("VisionTransformer", num_classes=3, model_kwargs=arguments)
    module.net = converted
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, torch.arange(6) % 3), batch_size=6))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(loaded(IMAGES), module.eval()(IMAGES))
    assert loaded.net.norm.eps == 1e-12  # type: ignore[union-attr]


def test_it_works_without_transformers() -> None:
    code = """
import importlib.metadata, sys
installed = importlib.metadata.distribution
def distribution(name):  # torchmetrics looks for it
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.distribution = distribution
sys.modules["transformers"] = None  # importing it fails
from torchvision.models.vision_transformer import VisionTransformer
from swincompress_pl.models import to_timm
print(to_timm(VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3)).creation["name"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "VisionTransformer"), ran.stderr
