"""Searches for scales where the sensitivity says nothing, or not in numbers that float32 has."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quant_cases import PREPROCESSING, VIT, network_and_images
from torch import Tensor, nn

from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork, diagnose, measure_sensitivity, quantize
from swincompress_pl.quant.calibration import usable
from swincompress_pl.quant.diagnosis import Diagnosis
from swincompress_pl.quant.probe import Probe
from swincompress_pl.quant.search import LayerProblem, best_centered_scale, best_factor, best_value_scale
from swincompress_pl.spec.reference import run


def _head(network: nn.Module, factor: float) -> None:
    head = network.get_submodule("head")
    assert isinstance(head, nn.Linear)
    head.weight.mul_(factor)
    head.bias.mul_(factor)


def _dead_mlp(network: nn.Module) -> None:
    network.get_parameter("blocks.0.mlp.fc2.weight").zero_()
    network.get_parameter("blocks.0.mlp.fc2.bias").zero_()


def _constant(network: nn.Module) -> None:
    network.get_parameter("head.weight").zero_()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "a head of zeros": lambda network: _head(network, 0.0),
    "constant logits": _constant,
    "a dead MLP": _dead_mlp,
    "a head of 1e-30": lambda network: _head(network, 1e-30),
    "margins of hundreds": lambda network: _head(network, 1000.0),
}
SILENT = {"a head of zeros": 9, "constant logits": 9, "a dead MLP": 1, "a head of 1e-30": 0, "margins of hundreds": 0}


def changed(name: str) -> tuple[nn.Module, Tensor]:
    network, _, images = network_and_images("vit")
    with torch.no_grad():
        CHANGES[name](network)
    return network, images


LEARNED = {"search": {"rounding": "learned", "learning": {"iterations": 1}}}


@pytest.mark.filterwarnings("ignore:.*layers have no influence")
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in CHANGES), ("a head of zeros", LEARNED)])
def test_scales_are_sound_whatever_the_signal_is(name: str, options: dict[str, Any]) -> None:
    network, images = changed(name)
    with torch.no_grad():
        expected = network(images)
    at_maximum = quantize(copy.deepcopy(network), [images], method="max", preprocessing=PREPROCESSING)
    searched = quantize(network, [images], preprocessing=PREPROCESSING, **options).eval()
    assert len(searched.without_signal) == SILENT[name]
    assert (searched(images) - expected).norm() <= 0.1 * expected.norm()
    for key in ("blocks/0/attn/qkv", "blocks/0/attn/attention", "blocks/1/mlp/fc1", "blocks/1/mlp/act"):
        one, other = (each.scales.activations[key].scale for each in (searched, at_maximum))
        assert (one > 0.25 * other).all(), key  # unsigned codes halve it


@pytest.mark.parametrize("name", ["a head of zeros", "a dead MLP"])
def test_layers_without_a_signal_are_named(name: str) -> None:
    network, images = changed(name)
    first = "blocks.0.mlp.fc1" if name == "a dead MLP" else "patch_embed.proj"
    with pytest.warns(UserWarning, match=rf"{SILENT[name]} of 10 layers have no influence .* the first is {first}"):
        quantized = quantize(network, [images], preprocessing=PREPROCESSING).eval()
    diagnosis = diagnose(quantized, images, costs=False)
    assert diagnosis.without_signal == quantized.without_signal
    assert diagnosis.without_signal[0] == first
    assert f"without influence in calibration: {first}" in str(diagnosis)
    assert Diagnosis.from_dict(diagnosis.to_dict()) == diagnosis
    entry = quantized.compression_history[-1]["quantize"]
    assert QuantizedNetwork(network, **entry).without_signal == quantized.without_signal
    with pytest.warns(UserWarning, match="have no influence"):
        measure_sensitivity(network, [images], preprocessing=PREPROCESSING)


def test_an_ordinary_network_is_not_warned_of() -> None:
    network, _, images = network_and_images("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(network, [images], preprocessing=PREPROCESSING)
    assert quantized.without_signal == ()
    assert "without_signal" not in quantized.compression_history[-1]["quantize"]
    old = {
        key: value
        for key, value in diagnose(quantized.eval(), images, costs=False).to_dict().items()
        if key != "without_signal"
    }
    assert Diagnosis.from_dict(old).without_signal == ()


@pytest.mark.parametrize("factor", [1.0, 1e5])
def test_one_logit_is_as_good_in_integers(factor: float) -> None:
    network, _, images = network_and_images("vit")
    torch.manual_seed(1)
    network.head = nn.Linear(16, 1)
    with torch.no_grad():
        _head(network, factor)
        expected = network(images)
    quantized = quantize(network, [images], preprocessing=PREPROCESSING).eval()
    assert quantized.without_signal == ()
    assert (quantized(images) - expected).norm() < 0.05 * expected.norm()
    pixels = quantized.pixels(images)
    assert (run(quantized.to_program(), pixels.numpy()) == quantized.integer_logits(pixels).numpy()).all()


@pytest.mark.parametrize("name", ["head.weight", "blocks.1.mlp.fc1.weight"])
def test_nan_is_refused_by_name(name: str) -> None:
    network, _, images = network_and_images("vit")
    with torch.no_grad():
        network.get_parameter(name).view(-1)[0] = torch.nan
    where = "logits" if name.startswith("head") else "blocks.1.mlp.fc1"
    with pytest.raises(ValueError, match=f"{where}.*NaN"):
        quantize(network, [images], preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match=r"logits.*NaN"):
        Probe(torch.tensor([[1.0, torch.nan]]), classes=True, seed=0)


def test_a_fresh_layer_scale_has_a_signal() -> None:
    torch.manual_seed(0)
    network = create_model("VisionTransformer", num_classes=7, init_values=1e-6, **VIT).eval()
    _, _, images = network_and_images("vit")
    assert quantize(network, [images], preprocessing=PREPROCESSING).without_signal == ()


def gradient_of(answers: Tensor, **options: Any) -> tuple[Tensor, float]:
    probe = Probe(answers, seed=0, **options)
    leaf = answers.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(probe(leaf), leaf)
    return gradient, probe.temperature


def test_a_probe_of_sure_answers_is_that_of_softened_ones() -> None:
    answers = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 3
    ordinary, temperature = gradient_of(answers, classes=True)
    assert temperature == 1.0
    sure, raised = gradient_of(answers * 2000, classes=True)
    assert raised > 1
    assert sure.abs().amax(1).min() > 0  # each image says something
    softened, _ = gradient_of(answers * 2000 / raised, classes=True)
    torch.testing.assert_close(sure * raised, softened)
    assert ordinary.isfinite().all()


@pytest.mark.parametrize(("columns", "classes"), [(1, True), (4, False)])
def test_values_that_are_no_classes_count_alike(columns: int, classes: bool) -> None:
    gradient, _ = gradient_of(torch.randn(6, columns) * 1e4, classes=classes)
    assert torch.equal(gradient.abs(), torch.ones(6, columns))


@settings(max_examples=40, deadline=None)
@given(exponent=st.integers(-140, 120), seed=st.integers(0, 50))
def test_usable_sensitivities_have_squares_and_the_same_ratios(exponent: int, seed: int) -> None:
    sensitivity = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    found = usable((sensitivity.double() * 2.0**exponent).float())
    assert 0.5 <= float(found.abs().max()) <= 1
    factor = found.abs().max() / sensitivity.abs().max()
    tolerance = 1e-6 if exponent > -120 else 2.0 ** -(149 + exponent)  # few bits are left of the smallest floats
    torch.testing.assert_close(found, sensitivity * factor, rtol=tolerance, atol=tolerance)


def test_outputs_without_a_signal_weigh_next_to_nothing_beside_others() -> None:
    sensitivity = torch.tensor([[0.0, 0.3], [0.0, 0.0]])
    found = usable(sensitivity)
    assert found[0, 0] == found[1, 0] > 0
    assert found[1, 1] == 0
    assert found[0, 0] ** 2 < 1e-6 * found[0, 1] ** 2
    for nothing in (torch.zeros(2, 2), torch.full((2, 2), torch.nan), torch.tensor([[1.0, torch.inf]])):
        assert torch.equal(usable(nothing), torch.ones_like(nothing))


def test_equal_errors_take_the_widest_range() -> None:
    assert best_factor(lambda factor: torch.zeros(())) > 1
    assert best_factor(lambda factor: torch.tensor(torch.nan)) > 1
    assert best_factor(lambda factor: torch.tensor(abs(factor - 0.5))) == pytest.approx(0.5, abs=0.01)
    silent = torch.zeros(16, 4)
    assert best_value_scale(torch.randn(16, 4), silent, q_max=127, signed=True, magnitude=1.27) > 0.01
    scale, centering = best_centered_scale(torch.randn(16, 4), silent, q_max=127, bounds=(-1.0, 2.0))
    assert scale * 254 >= 3
    assert abs(centering) <= 2
    problem = LayerProblem(x=torch.randn(16, 5), weight=torch.randn(4, 5), sensitivity=silent, magnitude=3.0)
    assert (problem.best_step(problem.x) >= problem.weight.abs().amax(1) / 127.5).all()
