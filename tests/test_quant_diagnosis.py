"""The debug tables say what one quantizer does: against runs made by hand, and with one that is spoilt on purpose."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from support.diagnosis_cases import LABELS, PREPROCESSING, network_and_images, quantized_and_images
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import standing_still
from swincompress_pl.quant import (
    Diagnosis,
    QuantizedNetwork,
    cost_table,
    diagnose,
    error_table,
    quantization_errors,
    quantize,
    quantizer_costs,
)
from swincompress_pl.quant.diagnosis.errors import decibels


def by_key(rows: Any) -> dict[tuple[str, str], Any]:
    return {(row.kind, row.name): row for row in rows}


@pytest.fixture(scope="module")
def whole() -> tuple[QuantizedNetwork, Tensor, Diagnosis]:
    quantized, images = quantized_and_images(bits="W4A6")
    return quantized, images, diagnose(quantized, images, LABELS, batch_size=6)


def test_one_weight_alone_is_the_network_with_that_weight_rounded() -> None:
    quantized, images = quantized_and_images(bits="W3A8")
    row = by_key(quantizer_costs(quantized, images, LABELS, batch_size=5))["weight", "blocks.1.mlp.fc2"]
    (node,) = [node for node in quantized.graph.weighted_nodes if node.name == row.name]
    with torch.no_grad():
        expected = quantized.network(images).double().log_softmax(1)
        weight = quantized.network.blocks[1].mlp.fc2.weight
        weight.copy_(quantized.scales.weight_quantizer(node)(weight))
        found = quantized.network(images).double().log_softmax(1)
    assert row.alone.kl == pytest.approx(float((expected.exp() * (expected - found)).sum(1).mean()), rel=1e-3)
    same = (expected.argmax(1) == found.argmax(1)).float().mean().item()
    assert row.alone.agreement_percent == pytest.approx(100 * same)
    assert row.alone.top1_percent == pytest.approx(100 * (found.argmax(1) == LABELS).float().mean().item())
    assert row.bits == 3


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_spoilt_site_leads_and_without_it_all_is_well(name: str) -> None:
    quantized, images = quantized_and_images(name)
    before = quantizer_costs(quantized, images)
    spoilt = "blocks.1.norm2" if name == "vit" else "layers.1.blocks.0.norm2"
    quantized.scales.activation_quantizer(quantized.graph.quantizers[spoilt]).scale.div_(40)  # clips nearly everything
    costs = quantizer_costs(quantized, images)
    assert (costs[0].kind, costs[0].name) == ("activation", spoilt)
    assert costs[0].alone.kl > 100 * by_key(before)["activation", spoilt].alone.kl
    assert costs[0].others.kl == pytest.approx(by_key(before)["activation", spoilt].others.kl)
    assert costs[0].others.kl < 0.1 * min(cost.others.kl for cost in costs[1:])
    assert [c.alone.kl for c in costs] == sorted((c.alone.kl for c in costs), reverse=True)
    error = by_key(quantization_errors(quantized, images))["activation", spoilt]
    assert error.clipped_percent > 50
    assert error.clip_to_max == pytest.approx(1 / 40, rel=1e-4)  # "max" puts the clip at the maximum
    assert error.own_snr_db is not None
    assert error.own_snr_db < 3


def test_every_site_and_weight_is_there_once(whole: tuple[QuantizedNetwork, Tensor, Diagnosis]) -> None:
    quantized, _, diagnosis = whole
    weights = {("weight", node.name) for node in quantized.graph.weighted_nodes}
    activations = {("activation", name) for name, spec in quantized.graph.quantizers.items() if spec.bits <= 16}
    assert len(diagnosis.costs) == len(diagnosis.errors) == len(weights | activations)
    assert set(by_key(diagnosis.costs)) == set(by_key(diagnosis.errors)) == weights | activations
    assert {(cost.bits, cost.kind) for cost in diagnosis.costs} == {
        (4, "weight"), (8, "weight"), (6, "activation"), (8, "activation"), (16, "activation"),
    }  # fmt: skip


def test_errors_are_those_of_the_values(whole: tuple[QuantizedNetwork, Tensor, Diagnosis]) -> None:
    quantized, _, diagnosis = whole
    errors = by_key(diagnosis.errors)
    (node,) = [node for node in quantized.graph.weighted_nodes if node.name == "blocks.0.mlp.fc2"]
    weight = node.folded_weight(quantized.network, None).detach()
    rounded = quantized.scales.weight_quantizer(node)(weight)
    error = errors["weight", "blocks.0.mlp.fc2"]
    expected = 10 * math.log10(float(weight.square().sum() / (rounded - weight).square().sum()))
    assert error.snr_db == error.own_snr_db == pytest.approx(expected, rel=1e-4)
    assert (error.used_codes, error.codes, error.clipped_percent) == (15, 15, 0)
    assert error.clip_to_max == pytest.approx(1)
    first, last = errors["activation", "blocks.0.norm1"], errors["activation", "blocks.1.norm2"]
    assert first.snr_db > last.snr_db  # errors grow with depth
    for error in diagnosis.errors:
        assert error.used_codes <= error.codes <= 2**error.bits
        assert error.clip_to_max <= error.clip_to_p9999 * 1.0001
        assert error.kind == "weight" or error.snr_db <= error.own_snr_db + 0.5
    assert errors["activation", "residual"].clip_to_max == pytest.approx(2, rel=0.2)  # its headroom


def test_a_diagnosis_is_plain_data_of_the_integer_network(whole: tuple[QuantizedNetwork, Tensor, Diagnosis]) -> None:
    quantized, images, diagnosis = whole
    data = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert (data["version"], data["method"], data["bits"], data["images"]) == (1, "max", "W4A6", 16)
    assert data["layers"][0] == {"name": "patch_embed.proj", "bits": 8, "weights": 768}
    assert data["costs"][0] == diagnosis.costs[0].to_dict()
    assert data["errors"][0] == diagnosis.errors[0].to_dict()
    with torch.no_grad():
        found, expected = quantized.eval()(images).argmax(1), quantized.network(images).argmax(1)
    assert diagnosis.integer is not None
    assert diagnosis.integer.agreement_percent == 100 * int((found == expected).sum()) / 16
    assert diagnosis.paired is not None
    assert diagnosis.paired["right_to_wrong"] == int(((expected == LABELS) & (found != LABELS)).sum())
    assert sum(diagnosis.paired[key] for key in ("both_right", "both_wrong", "right_to_wrong", "wrong_to_right")) == 16
    shown = [(h.kind, h.name) for h in diagnosis.histograms]
    assert shown == [(c.kind, c.name) for c in diagnosis.costs[:6]]
    fc2 = next(h for h in diagnosis.histograms if h.kind == "weight")
    assert (fc2.clip_low, fc2.clip_high) == (-7, 7)
    assert sum(fc2.counts) == diagnosis.layers[fc2.name][1]
    assert fc2.low >= -7.001


def test_tables_print(whole: tuple[QuantizedNetwork, Tensor, Diagnosis]) -> None:
    text = str(whole[2])
    lines = text.splitlines()
    assert lines[0].startswith("| quantizer ")
    assert lines[0].count("top-1") == 2
    assert len({len(line) for line in cost_table(whole[2].costs).splitlines()}) == 1
    assert "| clip / p99.99 |" in text
    assert " 15 / 15 |" in error_table(whole[2].errors)
    assert cost_table([]) == error_table([]) == ""
    unlabelled = dataclasses.replace(whole[2].costs[0].alone, top1_percent=None)
    row = dataclasses.replace(whole[2].costs[0], alone=unlabelled, others=unlabelled)
    assert "top-1" not in cost_table([row])


@pytest.mark.parametrize("method", ["affine", "searched"])
def test_other_methods_are_diagnosed(method: str) -> None:
    quantized, images = quantized_and_images("swin", method=method)
    diagnosis = diagnose(quantized, images, costs=False, histograms=2)
    assert (diagnosis.integer is None) == (method == "affine")
    assert diagnosis.costs == ()
    assert diagnosis.paired is None
    assert len(diagnosis.histograms) == 2
    for error in diagnosis.errors:
        assert error.own_snr_db > 20
        assert (error.clip_to_max is None) == (method == "affine" and error.bits <= 8)


def test_learned_scales_are_those_that_are_judged() -> None:
    quantized, images = quantized_and_images()
    before = by_key(quantization_errors(quantized, images))
    quantized.learn_scales()
    with torch.no_grad():
        quantized.scales.adjustment.fill_(-0.5)  # every scale to 0.62 of what it was
    after = by_key(quantization_errors(quantized, images))
    key = ("activation", "blocks.0.norm1")
    assert after[key].clip_to_max == pytest.approx(before[key].clip_to_max * (math.sqrt(1.25) - 0.5), rel=1e-3)


def test_a_dead_layer_has_no_figures_where_there_is_nothing_to_compare() -> None:
    network, images = network_and_images(count=16)
    with torch.no_grad():
        network.blocks[0].norm1.weight.zero_()
        network.blocks[0].norm1.bias.zero_()
        network.blocks[1].mlp.fc2.weight.zero_()
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    data = json.dumps(diagnose(quantized, images).to_dict(), allow_nan=False)
    assert data
    errors = by_key(quantization_errors(quantized, images))
    for key in (("activation", "blocks.0.norm1"), ("weight", "blocks.1.mlp.fc2")):
        assert (errors[key].snr_db, errors[key].clip_to_max, errors[key].clip_to_p9999) == (None, None, None)
        assert errors[key].used_codes == 1


def test_nothing_changes_by_looking() -> None:
    quantized, images = quantized_and_images()
    quantized.train()
    quantized.network.blocks[0].eval()
    state = {name: value.clone() for name, value in quantized.state_dict().items()}
    diagnose(quantized, images)
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())
    assert quantized.training
    assert not quantized.network.blocks[0].training
    assert all(parameter.requires_grad for parameter in quantized.network.parameters())


def test_standing_still_ends_with_an_error_too() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), standing_still(layer):
        raise KeyError
    assert layer.training
    assert layer.weight.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    quantized, images = quantized_and_images()
    with pytest.raises(TypeError, match="VisionTransformer is not quantized; pass what"):
        quantizer_costs(quantized.network, images)
    for bad in (images[:0], images[0], images.mul(2).byte(), [images]):
        with pytest.raises(ValueError, match="at least one normalized float image"):
            diagnose(quantized, bad)
    with pytest.raises(ValueError, match="pass images normalized"):
        quantization_errors(quantized, images * 100)
    for labels in (LABELS[:3], LABELS.float()):
        with pytest.raises(ValueError, match="one class number for each image"):
            quantizer_costs(quantized, images, labels)


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) is decibels(0.0, 1.0) is None


def test_a_diagnosis_is_read_again() -> None:
    quantized, images = quantized_and_images()
    found = diagnose(quantized, images[:2])
    assert Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match=r"version 1 is expected, not 0; pass what quant\.diagnose"):
        Diagnosis.from_dict({**found.to_dict(), "version": 0})


@pytest.mark.parametrize("measure", [diagnose, quantizer_costs, quantization_errors])
@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", None])
def test_a_batch_size_that_is_none_is_refused_by_name(measure: Any, batch_size: Any) -> None:
    quantized, images = quantized_and_images()
    with pytest.raises(ValueError, match=r"^batch_size=.*1 or more, an integer"):
        measure(quantized, images, batch_size=batch_size)


@pytest.mark.parametrize("histograms", [-1, 0.5, "all", None])
def test_a_number_of_histograms_that_is_none_is_refused_by_name(histograms: Any) -> None:
    quantized, images = quantized_and_images()
    with pytest.raises(ValueError, match=r"^histograms=.*0 or more, an integer"):
        diagnose(quantized, images, costs=False, histograms=histograms)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 3, 40, 32), (1, 1, 32, 32)])
@pytest.mark.parametrize("mode", [True, False])
def test_images_of_another_shape_are_refused_by_their_shape_in_both_modes(shape: tuple[int, ...], mode: bool) -> None:
    quantized, _ = quantized_and_images()
    with pytest.raises(ValueError, match=r"images have shape \(1, .*this network takes \(N, 3, "):
        quantized.train(mode)(torch.zeros(shape))
    for refuse in (quantized.pixels, quantized.check_pixels, lambda images: diagnose(quantized, images)):
        with pytest.raises(ValueError, match="images have shape"):
            refuse(torch.zeros(shape))
