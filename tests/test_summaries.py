"""Results show themselves in a few lines, in a terminal and in a notebook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.prime_cases import holdout_of, network_of, prime_config
from support.quant_cases import PREPROCESSING, network_and_images
from torch import nn

from swincompress_pl import accel
from swincompress_pl.pruning import AdaptivePruningConfig, PruningPlan, apply_plan, primesvt, prune
from swincompress_pl.quant import diagnose, measure_sensitivity, quantize
from swincompress_pl.registry import adapter_for
from swincompress_pl.report import SpikingCost
from swincompress_pl.summaries import Summarized, removed

LONG = 1000  # characters: less than a screen


class Named(Summarized):
    def __init__(self, **facts: str) -> None:
        self.known = facts

    def facts(self) -> list[tuple[str, str]]:
        return list(self.known.items())


def test_a_summary_is_lines_of_facts() -> None:
    assert str(Named(score="3", layers="4 of 5")) == "score   3\nlayers  4 of 5"


def test_a_notebook_gets_a_table_in_which_nothing_is_markup() -> None:
    shown = Named(score="<script>alert(1)</script>")._repr_html_()
    assert "<th>score</th>" in shown
    assert "<script>" not in shown


def test_what_controls_a_terminal_is_escaped() -> None:
    assert "\x1b" not in str(Named(name="\x1b[2J"))


def test_counts_before_and_after() -> None:
    assert removed(4000, 1000) == "4,000 -> 1,000 (75.0 % removed)"
    assert removed(0, 0) == "0"


def short(result: Any) -> None:
    """`repr`, `str` and what a notebook shows."""
    for text in (repr(result), str(result), result._repr_html_()):
        assert 0 < len(text) < LONG, text[:LONG]


@pytest.fixture(scope="module")
def vit() -> tuple[nn.Module, Any, torch.Tensor]:
    return network_and_images("vit")


def test_a_pruned_network(vit: tuple[nn.Module, Any, torch.Tensor]) -> None:
    network, _, images = vit
    result = prune(network, lambda _: 50.0, AdaptivePruningConfig(max_rounds=2), input_shape=(1, *images.shape[1:]))
    short(result)
    short(result.state)
    lines = dict(line.split("  ", 1) for line in result.summary().splitlines())
    assert lines["score on the hold-out"] == "50.00 points, unpruned 50.00"
    assert lines["parameters"].strip().startswith(f"{result.state.baseline_parameters:,} -> ")
    assert lines["its end"].strip() == result.stopped
    assert len(repr(result.plan)) < 100


def test_what_a_plan_did(vit: tuple[nn.Module, Any, torch.Tensor]) -> None:
    network = vit[0]
    groups = adapter_for(network).groups(network)
    channels = next(group for group in groups if "mlp" in group.name)
    applied = apply_plan(network, PruningPlan.removing(groups, {channels.name: [0, 1]}))
    assert repr(applied.plan) == f"PruningPlan(1 groups, {channels.units - 2:,} of {channels.units:,} units stay)"
    assert repr(PruningPlan({"a": (0, 2)})) == "PruningPlan(1 groups, 2 units stay)"
    assert len(repr(applied)) < LONG
    assert len(repr(applied.tensors[0])) < LONG


def test_a_quantized_network_and_its_engine(tmp_path: Any) -> None:
    network, pixels, images = network_and_images("vit")
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING).eval()
    found = diagnose(quantized, images, costs=True)
    for text in (repr(found), found.summary(), found._repr_html_()):
        assert len(text) < LONG
    assert "same predictions as in float" in found.summary()
    assert str(found).startswith("| ")  # the tables
    table = measure_sensitivity(network, [images], widths=(4, 8), preprocessing=PREPROCESSING)
    assert len(repr(table)) < LONG
    assert table._repr_html_() == f"<pre>{table}</pre>"
    engine = accel.load(accel.export(quantized, tmp_path / "vit.safetensors"), threads=1)
    profile = engine.profile(np.asarray(pixels)[:1])
    assert len(repr(profile)) < LONG
    assert profile._repr_html_() == f"<pre>{profile}</pre>"
    assert repr(engine.program).startswith(f"Program({len(engine.program.operations)} operations, input uint8 (16, 16")
    assert len(repr(engine.program)) < 200


def test_a_spiking_network() -> None:
    rates = {f"layer{number}.lif": 0.25 for number in range(90)}
    counts = {"parameters": 2_000_000, "nonzero": 1_500_000, "size_bytes": 8_000_000, "dense_macs": 3_000_000}
    operations = {"macs": 1e5, "acs": 2e6, "sops": 1.5e6, "energy_compute_pj": 2.5e6, "energy_memory_pj": 5e6}
    cost = SpikingCost(spike_rates=rates, **counts, **operations)
    short(cost)
    assert "spike rate         25.0%, the mean of 90 neuron layers" in str(cost)
    assert "energy, estimated  2.50 uJ compute, 5.00 uJ memory" in str(cost)


def test_a_result_of_primesvt() -> None:
    network = network_of()
    result = primesvt(network, holdout_of(network, 20), prime_config())
    short(result)
    assert str(result) == result.summary()
