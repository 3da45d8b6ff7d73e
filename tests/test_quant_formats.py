"""Networks and images in any number format, under autocast, another default type, and in inference mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from support.qat_cases import PREPROCESSING as QAT_PREPROCESSING
from support.qat_cases import VIT as QAT_VIT
from support.qat_cases import Plain, loader, trainer
from support.quant_cases import NETWORKS, PREPROCESSING, network_and_images
from support.spiking_cases import FAMILIES, lively
from torch import Tensor, nn

from swincompress_pl import accel
from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, collect_gradients, prune
from swincompress_pl.pruning.structure.weight_masks import register_masks
from swincompress_pl.quant import QuantizedNetwork, diagnose, measure_sensitivity, quantize

FORMATS = [torch.bfloat16, torch.float16, torch.float64]


def in_format(dtype: torch.dtype, name: str = "vit") -> tuple[nn.Module, Tensor, Tensor]:
    """The network in that format, images in it, and what it gives in float64."""
    network, _, images = network_and_images(name)
    network, images = network.to(dtype), images.to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(images.double())
    return network, images, expected


@pytest.mark.parametrize("options", [{}, {"method": "max", "percentile": 99.99}], ids=["searched", "percentile"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_network_of_another_format_is_quantized_in_float32(
    dtype: torch.dtype, options: dict[str, object], tmp_path: Path
) -> None:
    network, images, expected = in_format(dtype)
    parameters = list(network.parameters())
    with pytest.warns(UserWarning, match=f"VisionTransformer holds {dtype}; it is converted to float32 in place"):
        quantized = quantize(network, [images], preprocessing=PREPROCESSING, **options).eval()  # type: ignore[arg-type]
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    found = quantized(images)
    assert found.dtype is torch.float32
    assert (found - expected).norm() < 0.1 * expected.norm()
    engine = accel.load(accel.export(quantized, tmp_path / "a.safetensors"), threads=1)
    np.testing.assert_array_equal(engine(quantized.pixels(images).numpy()), found.numpy())
    assert quantized.train()(images).dtype is torch.float32


def test_layers_of_several_formats_and_images_of_another() -> None:
    network, images, expected = in_format(torch.bfloat16)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    with pytest.warns(UserWarning, match="converted to float32"):
        quantized = quantize(network, [images.double()], preprocessing=PREPROCESSING).eval()
    assert (quantized(images.half()) - expected).norm() < 0.1 * expected.norm()


def test_measuring_leaves_the_network_in_its_format() -> None:
    network, images, _ = in_format(torch.bfloat16)
    table = measure_sensitivity(network, [images], preprocessing=PREPROCESSING, widths=(8,))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert all(loss > 0 for layer in table.layers for loss in layer.loss.values())


def test_a_call_that_fails_leaves_the_network_in_its_format() -> None:
    network, images, _ = in_format(torch.float64)
    with pytest.raises(ValueError, match="images reach from"):
        quantize(network, [images * 100], preprocessing=PREPROCESSING)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}


def test_a_spiking_network_in_double_precision() -> None:
    network, _ = lively(FAMILIES["spikformer"], 3, trained_statistics=True)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "height": 32, "width": 32}
    single = quantize(copy.deepcopy(network).float(), [images], preprocessing=preprocessing).eval()
    with pytest.warns(UserWarning, match="Spikformer holds torch.float64"):
        quantized = quantize(network, [images], preprocessing=preprocessing).eval()
    assert torch.equal(quantized(images), single(images))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "bf16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fp16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: _default(torch.float64),
    "default bf16": lambda: _default(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("name", AROUND)
def test_what_surrounds_the_call_changes_nothing(name: str) -> None:
    network, _, images = network_and_images("vit")
    expected = quantize(copy.deepcopy(network), [images], preprocessing=PREPROCESSING).eval()
    integers = expected(images)
    with AROUND[name]():
        found = quantize(copy.deepcopy(network), [images.clone()], preprocessing=PREPROCESSING).eval()
        assert torch.equal(found(images), integers)
        assert torch.equal(expected(images), integers)
        assert diagnose(found, images, costs=False) == diagnose(expected, images, costs=False)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in found.state_dict().items())
    assert not any(tensor.is_inference() for tensor in (*found.parameters(), *found.buffers()))
    found.train()(images).sum().backward()


def test_a_network_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        network, _, images = network_and_images("vit")
        network.get_submodule("norm").weight = network.get_submodule("blocks.0.norm1").weight  # shared
    quantized = quantize(network, [images], preprocessing=PREPROCESSING)
    quantized(images.clone()).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.get_parameter("norm.weight") is network.get_parameter("blocks.0.norm1.weight")


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_cast_leaves_scales_and_weights_as_they_are(dtype: torch.dtype) -> None:
    network, _, images = network_and_images("vit")
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING).eval()
    expected, state = quantized(images), copy.deepcopy(quantized.state_dict())
    with pytest.warns(UserWarning, match=f"float32; the cast to {dtype} changed none"):
        outer = nn.Sequential(quantized, nn.Linear(7, 2)).to(dtype)
    assert outer[1].weight.dtype is dtype
    assert all(torch.equal(quantized.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(quantized(images), expected)
    quantized.network.to(dtype)  # by hand, beneath it
    with pytest.raises(TypeError, match=rf"network\.\S+ is {dtype}; .*quantized\.float"):
        quantized(images)
    with pytest.raises(TypeError, match=r"quantized\.float"):
        quantized.train()(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.float().eval()(images)


def test_a_record_restores_a_network_of_another_format() -> None:
    network, _, images = network_and_images("vit")
    quantized = quantize(network, [images], preprocessing=PREPROCESSING).eval()
    fresh = create_model(NETWORKS["vit"][0], num_classes=7, **NETWORKS["vit"][1]).bfloat16()
    with pytest.warns(UserWarning, match="converted to float32"):
        restored = restore_from_history(fresh, quantized.compression_history)
    restored.load_state_dict(quantized.state_dict())
    assert torch.equal(restored.eval()(images), quantized(images))


class Cast(Plain):
    """A module whose network is in another format than its images."""

    dtype_of_network = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_model("VisionTransformer", **QAT_VIT).to(self.dtype_of_network)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0].to(self.dtype_of_network), batch[1]], batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step([batch[0].to(self.dtype_of_network), batch[1]], batch_idx)


class CastDouble(Cast):
    dtype_of_network = torch.float64


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*converted to float32")
@pytest.mark.parametrize("module", [Cast, CastDouble])
def test_the_optimizer_goes_on_with_a_network_of_another_format(module: type[Cast], tmp_path: Path) -> None:
    fitted = module()
    callback = QuantizationAwareTraining(
        start_epoch=1,
        calibration_images=16,
        preprocessing=QAT_PREPROCESSING,
        model_attribute="backbone",
        distillation=0.5,
        learn_scales=True,
    )
    fit: Trainer = trainer(tmp_path, 2, callback)
    fit.fit(fitted, loader(), loader())
    assert isinstance(fitted.backbone, QuantizedNetwork)
    assert {parameter.dtype for parameter in fitted.backbone.parameters()} == {torch.float32}
    states = [state["exp_avg"].dtype for state in fit.optimizers[0].state.values()]
    assert set(states) == {torch.float32}


@pytest.mark.parametrize(("granularity", "criterion"), [("structured", "taylor"), ("weight", "magnitude")])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_pruning_in_another_format(dtype: torch.dtype, granularity: str, criterion: str) -> None:
    network, images, expected = in_format(dtype)
    labels = expected.argmax(1)
    config = AdaptivePruningConfig(tolerance=50, max_rounds=1, granularity=granularity, criterion=criterion)
    result = prune(
        network,
        HoldOut(images, labels),
        config,
        gradients=lambda one: collect_gradients(one, [(images, labels)]),
    )
    assert result.baseline_score > 80
    assert any(step.accepted for step in result.steps)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}


@pytest.mark.parametrize(("granularity", "criterion"), [("structured", "magnitude"), ("2:4", "fisher")])
def test_pruning_in_inference_mode_leaves_a_network_that_trains(granularity: str, criterion: str) -> None:
    with torch.inference_mode():
        network, _, images = network_and_images("vit")
        labels = network(images).argmax(1)
        config = AdaptivePruningConfig(tolerance=100, max_rounds=1, granularity=granularity, criterion=criterion)
        gradients = lambda one: collect_gradients(one, [(images, labels)])  # noqa: E731
        prune(network, HoldOut(images, labels), config, gradients=gradients)
        register_masks(network, ["patch_embed.proj.weight"])
    assert not any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers()))
    network.train()(images.clone()).sum().backward()
