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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import Swin_T_Weights, Swin_V2_T_Weights, efficientnet_b0
from torchvision.models import swin_transformer as swins
from torchvision.models import vision_transformer as vits

from swincompress_pl import accel, load_network, prune, quantize, save_network
from swincompress_pl.models import CompressibleClassifier, create_model, preprocessing_for, rebuild, to_timm
from swincompress_pl.models.conversion import convert
from swincompress_pl.models.factory import recreate_model
from swincompress_pl.pruning import HoldOut, PruningPlan, apply_plan
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
PLAIN = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = {**PLAIN, "intermediate_size": 48}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def hugging(kind: str, **options: Any) -> nn.Module:
    """A network of transformers, with the constructor's own arguments among the options of its configuration."""
    transformers = pytest.importorskip("transformers")
    own = {name: options.pop(name) for name in ("add_pooling_layer",) if name in options}
    options.setdefault("num_labels", 3)
    kind_of_network = getattr(transformers, kind)
    network: nn.Module = kind_of_network(kind_of_network.config_class(**options), **own)
    return network


def swin(**options: Any) -> nn.Module:
    arguments = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return swins.SwinTransformer(**(arguments | {"num_classes": 3} | options))


def swin_v2(**options: Any) -> nn.Module:
    return swin(block=swins.SwinTransformerBlockV2, downsample_layer=swins.PatchMergingV2, **options)


def vit(**options: Any) -> nn.Module:
    return vits.VisionTransformer(32, 8, 2, 4, 32, 48, **({"num_classes": 3} | options))


def pooled(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images).pooler_output
    return answer


def first_token(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images).last_hidden_state[:, 0]
    return answer


def logits(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images).logits
    return answer


def output(network: Any, images: Tensor) -> Tensor:
    answer: Tensor = network(images)
    return answer


Case = tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str, bool]
# network, its answer, the class of timm, whether it has an integer form
CASES: dict[str, Case] = {
    "ViT": (lambda: hugging("ViTForImageClassification", **VIT), logits, "VisionTransformer", True),
    "ViT of bf16": (
        lambda: hugging("ViTForImageClassification", **VIT, qkv_bias=False).bfloat16(),
        lambda network, images: logits(network.float(), images),
        "VisionTransformer",
        True,
    ),
    "ViT, tanh": (
        lambda: hugging("ViTForImageClassification", **VIT, hidden_act="gelu_pytorch_tanh"),
        logits,
        "VisionTransformer",
        True,
    ),
    "ViT, embedding": (
        lambda: hugging("ViTModel", **VIT, add_pooling_layer=False),
        first_token,
        "VisionTransformer",
        True,
    ),
    "DeiT": (lambda: hugging("DeiTForImageClassification", **VIT), logits, "VisionTransformer", True),
    "DeiT, distilled": (
        lambda: hugging("DeiTForImageClassificationWithTeacher", **VIT),
        logits,
        "VisionTransformerDistilled",
        False,
    ),
    "DINOv2": (lambda: hugging("Dinov2Model", **PLAIN), pooled, "VisionTransformer", True),
    "DINOv2, registers": (
        lambda: hugging("Dinov2WithRegistersModel", **PLAIN, num_register_tokens=2),
        pooled,
        "VisionTransformer",
        True,
    ),
    "Swin": (lambda: hugging("SwinForImageClassification", **WINDOWS), logits, "SwinTransformer", True),
    "Swin, embedding": (lambda: hugging("SwinModel", **WINDOWS), pooled, "SwinTransformer", True),
    "Swin v2": (lambda: hugging("Swinv2ForImageClassification", **WINDOWS), logits, "SwinTransformerV2", False),
    "Swin v2, pretrained windows": (
        lambda: hugging("Swinv2ForImageClassification", **WINDOWS, pretrained_window_sizes=[3, 2]),
        logits,
        "SwinTransformerV2",
        False,
    ),
    "torchvision ViT": (vit, output, "VisionTransformer", True),
    "torchvision Swin": (swin, output, "SwinTransformer", True),
    "torchvision Swin v2": (swin_v2, output, "SwinTransformerV2", False),
}
FEW = {name: CASES[name] for name in ("ViT", "Swin", "torchvision Swin v2")}


def lively(network: nn.Module) -> nn.Module:
    """The network in evaluation, with weights of which each counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
    return network.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def images(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4 * one.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal_and_the_network_works(name: str, images: Tensor, pixels: Tensor, tmp_path: Path) -> None:
    build, answer, kind, integers = CASES[name]
    original = lively(build())
    before = {key: value.clone() for key, value in original.state_dict().items()}
    converted: Any = to_timm(original)
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    with torch.no_grad():
        expected = converted(images)
        assert close(answer(copy.deepcopy(original), images), expected)

    assert converted.creation["name"] == type(converted).__name__ == kind
    assert json.loads(json.dumps(converted.creation)) == converted.creation
    again = recreate_model(converted.creation)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in converted.state_dict().items()
    }
    loaded = load_network(again, save_network(converted, tmp_path / "network.ckpt")).eval()
    assert torch.equal(loaded(images), expected)  # with the epsilons of the original

    groups = adapter_for(converted).groups(converted)
    assert {group.kind for group in groups} >= {"heads", "mlp"}
    apply_plan(converted, PruningPlan.removing(groups, {group.name: [0] for group in groups if group.units > 1}))
    if not integers:
        with pytest.raises(UnsupportedNetworkError, match="no integer form"):
            quantize(converted, [images], method="max", preprocessing=PREPROCESSING)
        return
    embeddings = converted.num_classes == 0
    quantized = quantize(converted, [images], method="max", preprocessing=PREPROCESSING, embeddings=embeddings)
    file = accel.export(quantized, tmp_path / "model.safetensors")
    found = accel.load(file, threads=1).run_integer(pixels.numpy())
    assert np.array_equal(found, accel.reference(file).run_integer(pixels.numpy()))
    rebuilt: Any = rebuild(quantized.to_program().origin)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in converted.state_dict().items()
    }
    assert [m.eps for m in rebuilt.modules() if isinstance(m, nn.LayerNorm)] == [
        m.eps for m in converted.modules() if isinstance(m, nn.LayerNorm)
    ]


@pytest.mark.parametrize("name", FEW)
def test_a_network_that_cannot_be_compressed_is_told_about_to_timm(name: str, images: Tensor) -> None:
    network = FEW[name][0]()
    for compress in (
        lambda: prune(network, HoldOut(images, torch.arange(6) % 3)),
        lambda: quantize(network, [images], preprocessing=PREPROCESSING),
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


def test_heads_of_fine_tuning_are_taken_along(images: Tensor) -> None:
    network: Any = lively(vit())
    network.heads = nn.Linear(32, 5)
    assert close(network(images), to_timm(network)(images))
    network.heads = nn.Identity()
    assert to_timm(network)(images).shape == (6, 32)


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


def test_labels_come_along(images: Tensor) -> None:
    names = {2: "fox", 0: "cat", 1: "dog"}
    network: Any = hugging("SwinForImageClassification", **WINDOWS, id2label=names)
    converted: Any = to_timm(network)
    assert converted.class_names == ("cat", "dog", "fox")
    assert copy.deepcopy(converted).class_names == ("cat", "dog", "fox")
    assert not hasattr(to_timm(hugging("SwinForImageClassification", **WINDOWS)), "class_names")  # LABEL_0, ...
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


def test_a_processor_brings_preprocessing(images: Tensor) -> None:
    network = lively(hugging("ViTForImageClassification", **VIT))
    converted = to_timm(network, processor=PROCESSOR)
    described = {"height": 32, "width": 32, "resize": 40, "interpolation": "bicubic", **PREPROCESSING}
    assert preprocessing_for(converted) == described
    transformers = pytest.importorskip("transformers")
    assert preprocessing_for(to_timm(network, processor=transformers.BitImageProcessor(**PROCESSOR))) == described
    plain = to_timm(network, processor=PROCESSOR | {"do_normalize": False})
    assert preprocessing_for(plain)["std"] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="no preprocessing of its own"):
        preprocessing_for(to_timm(network))
    # What Preprocessing cannot do is said by name, and the mean is known all the same.
    squashed: Any = to_timm(network, processor=PROCESSOR | {"size": {"height": 32, "width": 32}, "crop_size": None})
    assert squashed.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    with pytest.raises(ValueError, match="crop mode 'squash'"):
        preprocessing_for(squashed)


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


def test_a_classifier_trains_and_restores_it(images: Tensor, tmp_path: Path) -> None:
    converted: Any = to_timm(lively(hugging("ViTForImageClassification", **VIT)))
    arguments = {key: value for key, value in converted.creation["kwargs"].items() if key != "num_classes"}
    module = CompressibleClassifier("VisionTransformer", num_classes=3, model_kwargs=arguments)
    module.net = converted
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=6))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(loaded(images), module.eval()(images))
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
