"""What networks of counts cost in binary time steps, against counts of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based.op_counter import estimate_simple_energy
from support.spiking_cases import COUNTING, FAMILIES, SIZE_PX, lively, most_spikes, spikes_of
from torch import Tensor, nn

from swincompress_pl.models.e_spikeformer.network import Attention, DownSampling
from swincompress_pl.models.spiking.multi_spike import MultiSpike
from swincompress_pl.pruning import count_macs
from swincompress_pl.report import spiking_cost
from swincompress_pl.report.binary_steps import energy_profiler

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
FIRST = "downsample1_1.encode_conv"


@contextmanager
def passing(network: nn.Module, *kinds: type[nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """{module: what it reads, what it gives}."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: found.__setitem__(name, (inputs[0], output))
        )
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def counts_read(path: str, x: Tensor, most: int) -> Tensor:
    """Counts as whole numbers, which the head reads as they are, and other layers over D."""
    counts = x if path == "head" else most * x
    assert torch.equal(counts, counts.round())
    return counts


def weights_reached(layer: Any, counts: Tensor) -> float:
    """How many weights the spikes meet: a layer of ones."""
    ones = torch.ones_like(layer.weight)
    if isinstance(layer, nn.Linear):
        return float(F.linear(counts, ones).sum())
    conv = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return float(conv(counts, ones, None, layer.stride, layer.padding, layer.dilation, layer.groups).sum())


def attended(network: nn.Module, spikes: dict[str, Tensor]) -> float:
    """Each pair of spikes of v and k at a token, then each spike of q for every dimension of its head's v."""
    total = 0.0
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            q, k, v = (module._heads(spikes[f"{name}.{letter}_spike"][0]) for letter in "qkv")
            total += float(torch.einsum("nhct,nhdt->", v, k)) + float(q.sum()) * v.shape[2]
    return total


@pytest.mark.parametrize("name", COUNTING)
def test_operations_are_those_of_the_spikes(name: str) -> None:
    network, images = lively(COUNTING[name], 0, trained_statistics=True)
    most = most_spikes(network, "spike")
    with torch.no_grad(), passing(network, *LAYERS) as layers, spikes_of(network) as spikes:
        network(images)
    reached = {
        path: weights_reached(network.get_submodule(path), counts_read(path, x, most))
        for path, (x, _) in layers.items()
        if path != FIRST
    }
    assert sum(reached.values()) > 1e5
    cost, two = spiking_cost(network, images), len(images)
    assert cost.sops * two == sum(reached.values()) + attended(network, spikes)

    first = network.get_submodule(FIRST)
    dense_first = layers[FIRST][1].numel() * first.weight[0].numel()  # type: ignore[union-attr, index]
    with torch.no_grad(), passing(network, nn.modules.batchnorm._BatchNorm) as norms:
        network(images)
    normed = sum(x.numel() for x, _ in norms.values())
    assert cost.macs * two == dense_first + normed, "the layer that reads pixels, and BatchNorms' factors"

    element = images.element_size()
    biases = sum(out.numel() for path, (_, out) in layers.items() if network.get_submodule(path).bias is not None)
    states = 2 * sum(most * found.numel() for found in spikes.values())  # read and written at each step
    accesses = element * (sum(reached.values()) + dense_first + biases + states)
    assert cost.energy_memory_pj * two == pytest.approx(24.96 * accesses)
    assert cost.energy_compute_pj == pytest.approx(4.6 * cost.macs + 0.9 * cost.acs)
    neurons = 3 * sum(most * found.numel() for found in spikes.values())  # charge, threshold and reset at each step
    assert cost.sops * two + neurons < cost.acs * two < cost.sops * two + neurons + 3 * normed


@pytest.mark.parametrize("name", COUNTING)
def test_dense_multiplications_are_of_one_step(name: str) -> None:
    network, images = lively(COUNTING[name], 0, trained_statistics=True)
    with torch.no_grad(), passing(network, *LAYERS) as layers, passing(network, Attention) as attentions:
        network(images[:1])
    dense = sum(out.numel() * network.get_submodule(path).weight[0].numel() for path, (_, out) in layers.items())  # type: ignore[union-attr, index, misc, operator]
    for path, (x, _) in attentions.items():
        heads = network.get_submodule(path).num_heads
        dense += 2 * (x.shape[1] // heads) * (4 * x.shape[1] // heads) * x.shape[2] * x.shape[3] * heads  # type: ignore[operator]
    assert spiking_cost(network, images).dense_macs == dense == count_macs(network, (1, 3, SIZE_PX, SIZE_PX))


def test_silent_neurons_cost_no_accumulation_behind_them() -> None:
    network, images = lively(COUNTING["e-spikeformer"], 0, trained_statistics=True)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.zero_()
                module.bias.zero_()
    cost = spiking_cost(network, images)
    assert cost.sops == 0
    assert set(cost.spike_rates.values()) == {0.0}


def test_counts_of_one_spike_are_spikes() -> None:
    """Where D is 1, spikingjelly's counters need no help but with neurons."""
    network, images = lively(lambda: COUNTING["e-spikeformer"](D=1), 0, trained_statistics=True)  # type: ignore[call-arg]
    with torch.no_grad():
        plain = estimate_simple_energy(network, images).counts
    cost = spiking_cost(network, images)
    assert (cost.sops * 2, cost.macs * 2) == (plain["synop"], plain["mac"])
    assert cost.sops > 0


def test_stages_without_neurons_are_counted_as_they_are() -> None:
    stage = DownSampling(3, 4, kernel_size=3, stride=2, D=None).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad(), energy_profiler(stage) as profiler:
        stage(images)
    assert profiler.get_report().counts == estimate_simple_energy(stage, images).counts


@pytest.mark.parametrize("name", ["spikformer", "qkformer", "meta-spikeformer"])
def test_networks_with_time_steps_are_counted_as_by_spikingjelly(name: str) -> None:
    network, images = lively(FAMILIES[name], 0, trained_statistics=True)
    with torch.no_grad(), energy_profiler(network) as profiler:
        network(images)
    with torch.no_grad():
        assert profiler.get_report().counts == estimate_simple_energy(network, images).counts


def test_neurons_that_stand_in_give_the_counts() -> None:
    """spikingjelly's IFNode without leak, charged once from half of its threshold on, in D steps."""
    from spikingjelly.activation_based.neuron import IFNode

    x = torch.linspace(-2, 6, 401, dtype=torch.float64) + 1e-4
    node = IFNode(v_threshold=1.0, v_reset=None, step_mode="m")
    node.v = 0.5
    spikes = node(torch.stack([x, *[torch.zeros_like(x)] * 3]))
    assert torch.equal(spikes.sum(0), MultiSpike(4, norm=1)(x))
