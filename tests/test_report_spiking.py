"""Costs of spiking networks and the plots of a PrimeSVT search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.prime_cases import ALLOCATED, QUICK, SHAPE, holdout_of, network_of, prime_config
from support.spiking_cases import ALL, FAMILIES, SIZE_PX, lively, most_spikes, spikes_of

from swincompress_pl.models import create_model
from swincompress_pl.pruning import PrimeSVTResult, count_macs, primesvt
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.report import SpikingCost, primesvt_figures, save_primesvt_figures, spiking_cost
from swincompress_pl.report.content.names import readable


@pytest.mark.parametrize("name", ["spikformer", "sdt", "qkformer", "maxformer", "meta-spikeformer", "e-spikeformer"])
def test_costs_are_of_one_image_and_leave_the_network_alone(name: str) -> None:
    network, images = lively(ALL[name], 0, trained_statistics=True)
    network.train()
    cost = spiking_cost(network, images)
    assert network.training
    halves = [spiking_cost(network, image[None]) for image in images]
    for field in ("macs", "acs", "sops", "energy_compute_pj"):
        mean = sum(getattr(half, field) for half in halves) / 2  # a pass has a few operations of its own
        assert getattr(cost, field) == pytest.approx(mean, rel=0.02)
    assert 0 < cost.sops <= cost.acs
    assert cost.dense_macs == count_macs(network, SHAPE)
    assert cost.parameters == sum(p.numel() for p in network.parameters()) == cost.size_bytes // 4
    with torch.no_grad(), spikes_of(network.eval()) as spikes:
        network(images)
    most = {neuron: most_spikes(network, neuron) for neuron in spikes}
    assert cost.sops < max(most.values()) * cost.dense_macs
    rates = {neuron: float(found.mean()) / most[neuron] for neuron, found in spikes.items()}
    assert cost.spike_rates == pytest.approx(rates)
    assert cost.spike_rate == pytest.approx(sum(cost.spike_rates.values()) / len(cost.spike_rates))
    assert SpikingCost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


def test_costs_of_what_cannot_be_counted_are_refused() -> None:
    network, images = lively(FAMILIES["sdt"], 0, trained_statistics=True)
    with pytest.raises(ValueError, match=r"images of shape \(0, 3, 32, 32\): .* with one image or more is expected"):
        spiking_cost(network, images[:0])
    with pytest.raises(ValueError, match=r"images of shape \(3, 32, 32\)"):
        spiking_cost(network, images[0])
    with pytest.raises(ValueError, match="so it is not a spiking network"):
        spiking_cost(create_model("vit_tiny_patch16_224", num_classes=3), torch.zeros(1, 3, 224, 224))
    size = {"mean": [0.5] * 3, "std": [0.5] * 3, "height": SIZE_PX, "width": SIZE_PX}
    quantized = QuantizedNetwork(network.float(), preprocessing=size)
    with pytest.raises(ValueError, match=r"pass the float network \(quantized.network\), or use engine.profile"):
        spiking_cost(quantized, images.float())
    assert spiking_cost(quantized.network, images.float()).sops > 0


@pytest.fixture(scope="module")
def result() -> PrimeSVTResult:
    network = network_of()
    return primesvt(network, holdout_of(network), prime_config(tolerance=30, min_memory_saving=0.02, **QUICK))


def test_a_search_is_drawn(result: PrimeSVTResult, tmp_path: Path) -> None:
    after = dict.fromkeys(result.spike_rates, 0.1)
    files = save_primesvt_figures(result, tmp_path / "new", rates_after=after)
    assert [file.name for file in files] == [
        f"primesvt-{name}.png" for name in ("robustness", "accuracy_memory", "spike_rates")
    ]
    for file in files:
        with Image.open(file) as image:
            assert image.width >= SIZE_PX
            assert len(image.convert("L").getcolors(256) or []) > 10
    figures = primesvt_figures(json.loads(json.dumps(result.to_dict())))
    blocks = [label.get_text() for label in figures["robustness"].axes[0].get_yticklabels()]
    assert blocks == [readable(block.name) for block in result.blocks]
    shown = sum(len(line.get_xdata()) for line in figures["accuracy_memory"].axes[0].lines)  # type: ignore[arg-type]
    assert shown == len(result.candidates) + 1 + 2 * 2 + 1  # the unpruned network, two constraints, what was applied
    neurons = [label.get_text() for label in figures["spike_rates"].axes[0].get_yticklabels()]
    assert neurons == list(map(readable, result.spike_rates))


def test_curves_are_drawn_where_rates_were_allocated() -> None:
    network = network_of()
    config = prime_config(tolerance=30, min_memory_saving=0.02, **ALLOCATED)
    found = primesvt(network, holdout_of(network), config)
    figures = primesvt_figures(json.loads(json.dumps(found.to_dict())))
    assert list(figures) == ["curves", "accuracy_memory", "spike_rates"]
    ax: Any = figures["curves"].axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [readable(block.name) for block in found.blocks]
    assert [bar.get_width() for bar in ax.patches] == [100 * block.rate for block in found.blocks]
    (dots,) = ax.collections
    assert dots.get_offsets().tolist() == [
        [100 * point.rate, row] for row, block in enumerate(found.blocks) for point in block.curve
    ]
    told = {round(text.xy[1]): text.get_text() for text in ax.texts}
    assert told.pop(-1) == "saves"
    assert set(told) == {row for row, block in enumerate(found.blocks) if block.rate}
    measured = [
        (told[row], point.saving)
        for row, block in enumerate(found.blocks)
        for point in block.curve
        if point.rate == block.rate
    ]
    assert measured
    assert all(text == f"{saving:.1f} %" for text, saving in measured)


def test_a_search_without_blocks_or_candidates_is_drawn_as_far_as_it_goes(result: PrimeSVTResult) -> None:
    empty = PrimeSVTResult.from_dict(
        {**result.to_dict(), "blocks": [], "candidates": [], "applied": None, "spike_rates": {}}
    )
    assert primesvt_figures(empty) == {}
    with pytest.raises(ValueError, match="a PrimeSVT result of version 2 is expected, not None"):
        primesvt_figures({})
