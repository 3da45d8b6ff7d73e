"""timm's feature extractors: their maps in training, in integers, in the engine, and after pruning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support.qat_cases import PREPROCESSING as QAT_PREPROCESSING
from support.qat_cases import Restorable, loader, trainer
from support.quant_cases import PREPROCESSING, SWIN, VIT, draw_weights
from timm.models._features import FeatureGetterNet, FeatureListNet
from torch import Tensor, nn

from swincompress_pl import accel, spec
from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, PruningPlan, apply_plan, prune
from swincompress_pl.pruning.structure.trial import check_cuts
from swincompress_pl.quant import QuantizedNetwork, diagnose, measure_sensitivity, quantization_errors, quantize
from swincompress_pl.quant.probe import Probe
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

VIT_NAME, SWIN_NAME = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
THREE: dict[str, Any] = {**SWIN, "img_size": 16, "depths": [1, 2, 1], "num_heads": [2, 3, 3]}


def getter(name: str, options: dict[str, Any], **wrapping: Any) -> nn.Module:
    return FeatureGetterNet(timm.create_model(name, **options), **wrapping)


MAKERS = {
    "vit": lambda: create_model(VIT_NAME, features_only=True, out_indices=(0, 2), **{**VIT, "depth": 4}),
    "vit tokens": lambda: getter(VIT_NAME, VIT, out_indices=(0, 1), norm=True, output_fmt="NLC"),
    "vit registers": lambda: getter(
        VIT_NAME, {**VIT, "reg_tokens": 2, "class_token": False, "global_pool": "avg"}, out_indices=(1,)
    ),
    "vit without prefix": lambda: getter(
        VIT_NAME, {**VIT, "class_token": False, "global_pool": "avg"}, out_indices=2, prune=False
    ),
    "swin": lambda: create_model(SWIN_NAME, features_only=True, out_indices=(0, 1, 2), **THREE),
    "swin list, early": lambda: create_model(SWIN_NAME, features_only=True, out_indices=(1,), **THREE),
    "swin getter": lambda: getter(SWIN_NAME, THREE, out_indices=(0, 2), norm=True),
    "swin getter, early": lambda: getter(SWIN_NAME, THREE, out_indices=(0, 1), prune=False),
}
NAMES = {
    "vit": ["blocks.0", "blocks.2"],
    "vit tokens": ["blocks.0", "blocks.1"],
    "vit registers": ["blocks.1"],
    "vit without prefix": ["blocks.0", "blocks.1"],
    "swin": ["layers.0", "layers.1", "layers.2"],
    "swin list, early": ["layers.1"],
    "swin getter": ["layers.0", "layers.2"],
    "swin getter, early": ["layers.0", "layers.1"],
}


def extractor(case: str, count: int = 6) -> tuple[Any, Tensor]:
    """An extractor with lively weights, and normalized images."""
    torch.manual_seed(0)
    network: Any = MAKERS[case]().eval()
    draw_weights(network)
    pixels = torch.randint(0, 256, (count, 3, 16, 16)).float()
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return network, (pixels / 255 - mean) / std


def assert_one_meaning(quantized: QuantizedNetwork, images: Tensor, path: Path) -> None:
    """Twin, reference and engine give the same integers on all outputs, and the network in eval mode their floats."""
    pixels = quantized.eval().pixels(images)
    program = quantized.to_program()
    expected = spec.run_outputs(program, pixels.numpy())
    twin = quantized.integer_logits(pixels)
    engine = accel.load(accel.export(quantized, path), threads=1)
    found, floats = engine.run_integer(pixels.numpy()), engine(pixels.numpy())
    assert list(expected) == list(twin) == list(found) == [output.name for output in quantized.graph.outputs]
    for output, answer in zip(quantized.graph.outputs, quantized(images), strict=True):
        assert expected[output.name].dtype == found[output.name].dtype == np.int16
        np.testing.assert_array_equal(found[output.name], expected[output.name])
        np.testing.assert_array_equal(twin[output.name].numpy(), expected[output.name])
        assert torch.equal(output.from_value(torch.from_numpy(floats[output.name])), answer)


LEARNED = {"search": {"rounding": "learned", "learning": {"iterations": 1, "sensitive": True}}}


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, {"method": "max"}) for case in MAKERS),
        ("vit", {}),
        ("swin", {}),
        ("vit tokens", LEARNED),
        ("swin", LEARNED),
    ],
)
def test_maps_are_those_of_the_network(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    network, images = extractor(case)
    with torch.no_grad():
        features = network(images)
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, classes=["a"], **options)
    assert quantized.classes is None
    assert quantized.without_signal == ()
    assert [output.name for output in quantized.graph.outputs] == NAMES[case]
    simulated, exact = quantized(images), quantized.eval()(images)
    for feature, trained, evaluated in zip(features, simulated, exact, strict=True):
        assert feature.shape == trained.shape == evaluated.shape
        assert (trained - feature).norm() < 0.05 * feature.norm()
        assert (evaluated - feature).norm() < 0.05 * feature.norm()
    assert_one_meaning(quantized, images, tmp_path / "maps.safetensors")


def test_names_are_those_of_timm() -> None:
    for case in ("vit", "swin"):
        network, _ = extractor(case)
        assert network.feature_info.module_name() == NAMES[case]


@pytest.mark.parametrize("case", ["vit", "swin"])
def test_maps_have_gradients_and_the_type_of_the_images(case: str) -> None:
    network, images = extractor(case)
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, method="max")
    answers = quantized(images.double())
    assert {answer.dtype for answer in answers} == {torch.float64}
    torch.stack([answer.square().mean() for answer in answers]).sum().backward()
    reached = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert any("mlp.fc2" in name for name in reached)
    assert len(reached) > 0.9 * len(list(network.parameters()))
    simulated = quantized.eval().fake_quantized(images)
    assert [part.shape for part in simulated] == [answer.shape for answer in answers]


@pytest.mark.parametrize("case", ["vit", "swin"])
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    network, images = extractor(case)
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, method="max")
    plain = quantized(images)
    inner = network.model if isinstance(network, FeatureGetterNet) else network
    inner.grad_checkpointing = True
    for kept, again in zip(plain, quantized(images), strict=True):
        assert torch.equal(kept, again)


def test_every_map_counts_the_same_in_the_search() -> None:
    """The probe's weights make the expected squared gradient of a map one over its mean sum of squares."""
    network, images = extractor("swin")
    graph = adapter_for(network).graph(network, PREPROCESSING)
    probe = Probe.of(graph, network, [images[:4], images[4:]], seed=0)
    with torch.no_grad():
        features = network(images)
    weights = probe._weights
    assert weights is not None
    for part, feature in zip(weights.split([f[0].numel() for f in features]), features, strict=True):
        assert part.unique().numel() == 1
        norm = feature.double().flatten(1).norm(dim=1).square().mean().sqrt()
        torch.testing.assert_close(float(part[0]), float(1 / norm), rtol=1e-5, atol=0)


def test_broken_maps_are_named() -> None:
    network, images = extractor("vit")
    network.model.blocks[0].mlp.fc2.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinite values"):
        quantize(network, [images], preprocessing=PREPROCESSING)


def test_what_needs_classes_is_refused_and_the_rest_measured() -> None:
    network, images = extractor("vit")
    quantized = quantize(copy.deepcopy(network), [images], preprocessing=PREPROCESSING, method="max").eval()
    with pytest.raises(ValueError, match="FeatureGetterNet gives features"):
        diagnose(quantized, images)
    assert quantization_errors(quantized, images)
    table = measure_sensitivity(network, [images], preprocessing=PREPROCESSING, widths=(4, 8))
    assert table.layers[1].loss[4] > table.layers[1].loss[8] > 0


@pytest.mark.parametrize("case", MAKERS)
def test_each_group_can_be_cut(case: str, tmp_path: Path) -> None:
    network, images = extractor(case)
    groups = adapter_for(network).groups(network)
    assert {group.kind for group in groups} == {"heads", "head_dim", "mlp"}
    with torch.no_grad():
        shapes = [feature.shape for feature in network(images)]
    check_cuts(network, groups, (images[:1],))
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    group = next(group for group in groups if group.kind == "mlp")
    plan = PruningPlan(units={group.name: group.units}, kept={group.name: tuple(range(group.units // 2))})
    cut = apply_plan(network, plan)
    quantized.follow({tensor.name: dict(tensor.kept) for tensor in cut.tensors})
    assert_one_meaning(quantized, images, tmp_path / "maps.safetensors")
    assert [answer.shape for answer in quantized(images)] == shapes


@pytest.mark.parametrize("case", ["vit", "swin"])
def test_segments_are_modules_in_the_order_of_a_pass(case: str) -> None:
    network, images = extractor(case)
    paths, seen = adapter_for(network).segments(network), []
    for path in paths:
        network.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    with torch.no_grad():
        network(images)
    assert seen == paths


def test_a_search_takes_a_function_and_refuses_labels() -> None:
    network, images = extractor("swin")
    with pytest.raises(ValueError, match=r"FeatureListNet gave list for \d+ images.*Give HoldOut a predict"):
        prune(network, HoldOut(images, torch.zeros(6, dtype=torch.long)), AdaptivePruningConfig())
    result = prune(
        network, lambda _: 90.0, AdaptivePruningConfig(max_rounds=1, step=0.25, round_to=1), input_shape=(1, 3, 16, 16)
    )
    assert result.plan.kept
    with pytest.raises(ValueError, match=r"has no group of kind 'embed', only .*; the widths of feature maps"):
        prune(network, lambda _: 90.0, AdaptivePruningConfig(kinds=("embed",)), input_shape=(1, 3, 16, 16))


class Dense(Restorable):
    """A module of a user's own: a head over the list of maps."""

    def __init__(self) -> None:
        super().__init__()
        options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
        self.backbone = create_model(VIT_NAME, features_only=True, out_indices=(0, 1), **options)
        self.head = nn.Conv2d(64, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat(self.backbone(images), 1)).mean((2, 3))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(-1) == batch[1]).float().mean())


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("options", [{}, {"distillation": 0.5, "learn_scales": True}], ids=["plain", "distilled"])
def test_training_with_a_head_over_the_maps(options: dict[str, Any], tmp_path: Path) -> None:
    module = Dense()
    callback = QuantizationAwareTraining(
        start_epoch=0, calibration_images=16, preprocessing=QAT_PREPROCESSING, model_attribute="backbone", **options
    )
    fit = trainer(tmp_path, 1, callback)
    fit.fit(module, loader(), loader())
    assert isinstance(module.backbone, QuantizedNetwork)
    images = next(iter(loader()))[0]
    assert_one_meaning(module.backbone, images, tmp_path / "maps.safetensors")
    fit.save_checkpoint(tmp_path / "fit.ckpt")
    again = Dense.load_from_checkpoint(tmp_path / "fit.ckpt", map_location="cpu")
    assert torch.equal(again.eval()(images), module.eval()(images))


REFUSED = {
    "hook": (
        lambda: create_model(SWIN_NAME, features_only=True, feature_cls="hook", **{**SWIN, "img_size": 16}),
        "FeatureHookNet: no adapter",
    ),
    "list of a ViT": (
        lambda: FeatureListNet(timm.create_model(VIT_NAME, **VIT), out_indices=(1,), flatten_sequential=True),
        "FeatureListNet around .*only that of a Swin v1 is taken apart.*feature_cls='getter'",
    ),
    "another family": (
        lambda: create_model("eva02_tiny_patch14_224", features_only=True, out_indices=(0, 1), img_size=28, depth=2),
        "FeatureGetterNet around Eva: no integer form",
    ),
    "Swin v2": (
        lambda: create_model(
            "swinv2_tiny_window8_256", features_only=True, feature_cls="getter", **{**SWIN, "img_size": 16}
        ),
        "FeatureGetterNet around SwinTransformerV2: no integer form",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedNetworkError, match=message):
        quantize(make(), [torch.zeros(1, 3, 16, 16)], preprocessing=PREPROCESSING)


def test_an_altered_layer_is_folded_or_named_by_its_path() -> None:
    network, images = extractor("swin")
    linear = network["layers_0"].blocks[0].mlp.fc1
    network["layers_0"].blocks[0].mlp.fc1 = nn.utils.parametrizations.weight_norm(linear)
    with pytest.warns(UserWarning, match=r"layers_0\.blocks\.0\.mlp\.fc1"):
        quantize(network, [images], preprocessing=PREPROCESSING, method="max")
    assert type(network["layers_0"].blocks[0].mlp.fc1) is nn.Linear
