"""Quantized Swin and ViT: the graph is the network, eval is as specified, train comes close, bad input is named."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.quant_cases import NETWORKS, PREPROCESSING, VIT, network_and_images

from swincompress_pl import spec
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork, float_logits, quantize
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for


def few_rows(method: str) -> dict[str, Any] | None:
    return {"rows": 128} if method == "searched" else None


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_is_the_network(name: str) -> None:
    network, _, images = network_and_images(name)
    graph = adapter_for(network).graph(network, PREPROCESSING)
    with torch.no_grad():
        expected = network(images)
    assert torch.allclose(float_logits(graph, network, images), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["max", "searched"])
@pytest.mark.parametrize("name", NETWORKS)
def test_eval_is_the_norm_and_close_to_float(name: str, method: str) -> None:
    network, pixels, images = network_and_images(name)
    quantized = quantize(network, [images], method=method, preprocessing=PREPROCESSING, search=few_rows(method)).eval()
    with torch.no_grad():
        logits, expected = quantized(images), network(images)
    program = quantized.to_program()
    reference = spec.run(program, pixels.numpy())
    assert np.array_equal(quantized.integer_logits(pixels).numpy(), reference)
    assert torch.equal(logits, torch.from_numpy(reference).float() * program.logit_scale)
    assert (logits - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("name", ["swin", "swin drop", "vit"])
def test_training_simulates_what_evaluation_computes(name: str) -> None:
    network, _, images = network_and_images(name, count=64)
    quantized = quantize(network, [images], method="searched", preprocessing=PREPROCESSING, search={"rows": 256}).eval()
    with torch.no_grad():
        exact, simulated = quantized(images), quantized.fake_quantized(images)
    assert (exact.argmax(1) == simulated.argmax(1)).float().mean() >= 0.95
    assert (exact - simulated).abs().mean() < 0.05 * exact.std()


def test_training_has_gradients_for_every_weight_and_noise_from_dropout() -> None:
    network, _, images = network_and_images("swin drop")
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING).train()
    first = quantized(images)
    first.square().sum().backward()
    without = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    assert not torch.equal(first, quantized(images))


def test_a_training_step_changes_the_integers() -> None:
    network, pixels, images = network_and_images("vit")
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    before = quantized.integer_logits(pixels)
    quantized.train()(images).square().sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    assert not torch.equal(before, quantized.integer_logits(pixels))


def test_search_is_better_than_the_maximum() -> None:
    errors = {}
    for method in ("max", "searched"):
        network, _, images = network_and_images("vit", count=64)
        with torch.no_grad():
            network.blocks[0].norm1.weight[3] *= 20  # type: ignore[index,union-attr]  # an outlier channel
            network.blocks[0].attn.qkv.weight[:, 3] /= 20  # type: ignore[index,union-attr]
        quantized = quantize(network, [images[:32]], method=method, preprocessing=PREPROCESSING).eval()
        with torch.no_grad():
            errors[method] = float((quantized(images[32:]) - network(images[32:])).square().mean())
    assert errors["searched"] < 0.5 * errors["max"]


def test_affine_is_simulated_and_not_exported() -> None:
    network, _, images = network_and_images("swin")
    quantized = quantize(network, [images], method="affine", preprocessing=PREPROCESSING).eval()
    with torch.no_grad():
        assert (quantized(images) - network(images)).abs().mean() < 0.2 * network(images).std()
    with pytest.raises(ValueError, match="affine"):
        quantized.to_program()


def test_state_dict_restores_the_same_integers() -> None:
    network, pixels, images = network_and_images("swin")
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, search={"rows": 64})
    fresh = QuantizedNetwork(
        create_model(NETWORKS["swin"][0], num_classes=7, **NETWORKS["swin"][1]), preprocessing=PREPROCESSING
    )
    with pytest.raises(ValueError, match="calibrate"):
        fresh.to_program()
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh.integer_logits(pixels), quantized.integer_logits(pixels))
    assert torch.equal(copy.deepcopy(quantized).integer_logits(pixels), quantized.integer_logits(pixels))


def test_quantize_keeps_modes_and_weights() -> None:
    network, _, images = network_and_images("swin")
    before = copy.deepcopy(network.state_dict())
    network.train()
    network.head.eval()  # type: ignore[union-attr]
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    assert network.training
    assert not network.head.training  # type: ignore[union-attr]
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in quantized.network.state_dict().items())


def test_only_the_asked_number_of_images_is_used() -> None:
    network, _, images = network_and_images("vit", count=12)
    poisoned = torch.cat([images[:8], torch.full_like(images[:4], math.nan)])
    quantize(
        network, [poisoned[:5], poisoned[5:]], method="max", calibration_images=8, preprocessing=PREPROCESSING
    ).to_program()


def test_dead_layers_give_the_right_answer() -> None:
    network, pixels, images = network_and_images("vit")
    with torch.no_grad():
        network.blocks[0].mlp.fc2.weight.zero_()  # type: ignore[index,union-attr]
        network.blocks[1].attn.qkv.weight.zero_()  # type: ignore[index,union-attr]
        network.blocks[1].attn.qkv.bias.zero_()  # type: ignore[index,union-attr]
        network.blocks[1].mlp.fc1.weight[3] = 0  # type: ignore[index,union-attr]
    for method in ("max", "searched"):
        quantized = quantize(
            network, [images], method=method, preprocessing=PREPROCESSING, search=few_rows(method)
        ).eval()
        with torch.no_grad():
            expected = network(images)
            assert (quantized(images) - expected).abs().mean() < 0.1 * expected.std()
        assert np.array_equal(
            spec.run(quantized.to_program(), pixels.numpy()), quantized.integer_logits(pixels).numpy()
        )


def test_constant_images_calibrate_to_something_that_runs() -> None:
    network, _pixels, images = network_and_images("swin")
    quantized = quantize(network, [torch.zeros_like(images)], preprocessing=PREPROCESSING, search={"rows": 64}).eval()
    with torch.no_grad():
        assert torch.isfinite(quantized(images)).all()


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (lambda x: [], ValueError, "calibration is empty"),
        (lambda x: [x * math.nan], ValueError, "without NaN"),
        (lambda x: [x * 300], ValueError, "pixel steps"),
        (lambda x: [x[:, :, :8]], ValueError, "shape"),
        (lambda x: [x.to(torch.uint8)], TypeError, "normalized float"),
        (lambda x: ["images"], TypeError, "str"),
        (lambda x: [{"images": x}], TypeError, "dict"),
    ],
)
def test_bad_calibration_is_refused(calibration: Any, error: type[Exception], message: str) -> None:
    network, _, images = network_and_images("vit")
    with pytest.raises(error, match=message):
        quantize(network, calibration(images), preprocessing=PREPROCESSING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method='magic' is not available; choose one of 'searched', 'max', 'affine'"),
        ({"method": "max", "search": {"equalize": True}}, "search options go with method 'searched', not 'max'"),
        ({"search": {"balanced": True}}, "search has no option balanced; there are equalize"),
        ({"search": {"rounding": "up"}}, "search: rounding='up': it has to be one of nearest, second_order, learned"),
        ({"search": {"rows": 0}}, "search: rows=0: it has to be an integer of 1 or more"),
        ({"percentile": 40.0}, "percentile=40.0: it has to be above 50"),
        ({"method": "affine", "percentile": 99.9}, "percentile=99.9: .* 'affine' takes minimum and maximum"),
        ({"bits": "W9A8"}, "weights is 9 bits; widths are integers from 2 to 8"),
        ({"bits": "int4"}, "bits is 'int4'; give 'W8A8'"),
        ({"bits": {"weight": 4}}, "unknown entries weight"),
        ({"bits": {"layers": {"blocks.7.mlp.fc1": 4}}}, "bits.layers names 'blocks.7.mlp.fc1'"),
        ({"preprocessing": {"mean": [0.5] * 3}}, "preprocessing\\['std'\\]"),
        ({"preprocessing": {"mean": [127.0] * 3, "std": [64.0] * 3}}, "in \\[0, 1\\] units"),
        ({"preprocessing": {"mean": [0.5], "std": [0.5]}}, "1 means for the 3 input channels"),
        (
            {"preprocessing": {"mean": [0.5] * 3, "std": [0.5]}},
            "'mean'. has length 3 and .*'std'. has length 1",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    network, _, images = network_and_images("vit")
    with pytest.raises(ValueError, match=message):
        quantize(network, [images], **{"preprocessing": PREPROCESSING, **options})


def test_nan_weights_are_named() -> None:
    network, _, images = network_and_images("vit")
    with torch.no_grad():
        network.blocks[1].mlp.fc1.weight[0, 0] = math.nan  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1.*NaN"):
        quantize(network, [images], preprocessing=PREPROCESSING)
    network, _, images = network_and_images("vit")
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    with torch.no_grad():
        network.blocks[1].mlp.fc1.weight[0, 0] = math.nan  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1: weights hold NaN"):
        quantized.to_program()


def test_quantizing_twice_is_refused() -> None:
    network, _, images = network_and_images("vit")
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match="already quantized"):
        quantize(quantized, [images], preprocessing=PREPROCESSING)


def test_unknown_normalization_is_refused() -> None:
    network, _, images = network_and_images("vit")
    with pytest.raises(ValueError, match="how the images are normalized"):
        quantize(network, [images])


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("swinv2_cr_tiny_224", {}, "no adapter"),
        ("swinv2_tiny_window8_256", {}, "SwinTransformerV2.*no integer form"),
        ("VisionTransformer", {**VIT, "qk_norm": True}, "blocks.0.attn"),
        ("VisionTransformer", {**VIT, "global_pool": "max"}, "global_pool='max'"),
        ("VisionTransformer", {**VIT, "patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("resnet18", {}, "no adapter"),
    ],
)
def test_unsupported_networks_are_refused_by_name(model: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedNetworkError, match=message):
        QuantizedNetwork(create_model(model, **kwargs), preprocessing=PREPROCESSING)
