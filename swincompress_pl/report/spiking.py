"""What a spiking network costs: parameters, operations and energy by spikingjelly's `op_counter`, spikes a neuron."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.models.spiking.memory import check_spiking, watching_spikes
from swincompress_pl.pruning import count_macs
from swincompress_pl.report.plain import Plain

_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class SpikingCost(Plain):
    """Of one image with all its time steps, the mean over those that were counted.

    parameters, nonzero: of the network, and without zeros. size_bytes: parameters in float32.
    dense_macs: of the same shapes were every input a number (`pruning.count_macs`).
    macs, acs, sops: as `op_counter` counts: multiply-accumulates with numbers that are no spikes, accumulations, and of
    those the ones that a spike causes at a weight. energy_compute_pj, energy_memory_pj: its simple energy model, 45 nm,
    float32 (Horowitz, ISSCC 2014); an estimate for comparisons, not a measurement. Zeros in weights save nothing there.
    spike_rates: {neuron: spikes a time step and a place, 0 to 1}.
    """

    parameters: int
    nonzero: int
    size_bytes: int
    dense_macs: int
    macs: float
    acs: float
    sops: float
    energy_compute_pj: float
    energy_memory_pj: float
    spike_rates: dict[str, float]

    @property
    def spike_rate(self) -> float:
        """The mean over the neurons."""
        return sum(self.spike_rates.values()) / len(self.spike_rates)


def spiking_cost(network: nn.Module, images: Tensor) -> SpikingCost:
    """Counts what `network` does with `images`, (N, C, H, W) or events (N, T, C, H, W), in evaluation.

    Raises ValueError for a network that does not spike (`models.spiking.check_spiking`) and for no images.
    """
    from spikingjelly.activation_based.op_counter import estimate_simple_energy

    check_spiking(network)
    if images.ndim not in (4, 5) or not len(images):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: (N, C, H, W) or (N, T, C, H, W) with one image or more is expected"
        )
    parameters = list(network.parameters())
    with evaluation_mode(network), torch.no_grad():
        with watching_spikes(network) as rates:
            network(images)
        energy = estimate_simple_energy(network, images)
    counts, total = energy.counts, sum(p.numel() for p in parameters)
    return SpikingCost(
        parameters=total,
        nonzero=sum(int(p.count_nonzero()) for p in parameters),
        size_bytes=total * _FLOAT_BYTES,
        dense_macs=count_macs(network, (1, *images.shape[1:])),
        macs=counts["mac"] / len(images),
        acs=counts["ac"] / len(images),
        sops=counts["synop"] / len(images),
        energy_compute_pj=energy.energy_compute_pj / len(images),
        energy_memory_pj=energy.energy_memory_pj / len(images),
        spike_rates=rates,
    )
