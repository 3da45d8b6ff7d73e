"""What a spiking network costs: parameters, operations and energy by spikingjelly's `op_counter`, and spike rates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.models.spiking.memory import check_spiking, watching_spikes
from swincompress_pl.pruning import count_macs
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.report.plain import Plain
from swincompress_pl.summaries import Summarized

_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class SpikingCost(Summarized, Plain):
    """What one image costs with all its time steps: the mean over the images that were counted.

    The operations are those that spikingjelly's `op_counter` counts. The energies are those of its simple model (45 nm,
    float32; Horowitz, ISSCC 2014): estimates for comparisons, not measurements. Zeros in weights save nothing there.
    Where neurons give counts of spikes, a count of c is c spikes in the binary time steps of
    `models.spiking.multi_spike.MultiSpike`, and a product of two counts is that of every pair of their steps.

    Attributes:
        parameters: Parameters of the network.
        nonzero: Parameters that are not zero.
        size_bytes: Bytes of the parameters in float32.
        dense_macs: Multiply-accumulates if every input were a number, as `pruning.count_macs` counts; a count is one
            number.
        macs: Multiply-accumulates with numbers that are not spikes.
        acs: Accumulations.
        sops: Accumulations that a spike causes at a weight (synaptic operations).
        energy_compute_pj: Energy of the arithmetic, in picojoules.
        energy_memory_pj: Energy of the memory accesses, in picojoules.
        spike_rates: Spikes per time step and place, 0 to 1, by the name of the neuron layer.
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
    spike_rates: dict[str, float] = field(repr=False)

    def facts(self) -> list[tuple[str, str]]:
        """Returns the cost of an image in the units that people compare."""
        compute, memory = self.energy_compute_pj / 1e6, self.energy_memory_pj / 1e6
        operations = {"SOPs": self.sops, "ACs": self.acs, "MACs": self.macs}
        return [
            ("parameters", f"{self.parameters:,}, of which {self.nonzero:,} are not zero"),
            ("dense MACs", f"{self.dense_macs / 1e6:,.3f} M"),
            ("operations", ", ".join(f"{number / 1e6:,.3f} M {name}" for name, number in operations.items())),
            ("energy, estimated", f"{compute:,.2f} uJ compute, {memory:,.2f} uJ memory"),
            ("spike rate", f"{self.spike_rate:.1%}, the mean of {len(self.spike_rates)} neuron layers"),
        ]

    @property
    def spike_rate(self) -> float:
        """The mean over the neuron layers."""
        return sum(self.spike_rates.values()) / len(self.spike_rates)


def spiking_cost(network: nn.Module, images: Tensor) -> SpikingCost:
    """Counts what a spiking network does with some images, in eval mode.

    Args:
        network: A spiking network in multi-step mode that forgets between calls; see `models.without_memory`.
        images: (N, C, H, W), or events (N, T, C, H, W), with N of 1 or more.

    Returns:
        The cost per image.

    Raises:
        ValueError: If the network does not spike, keeps its state between calls or is a `QuantizedNetwork`, or if
            `images` has another shape.
    """
    from swincompress_pl.report.binary_steps import energy_profiler  # it imports spikingjelly

    if isinstance(network, QuantizedNetwork):
        raise ValueError(
            "spiking_cost counts the operations of a float network, and this is a QuantizedNetwork; pass the float "
            "network (quantized.network), or use engine.profile of the exported artifact"
        )
    check_spiking(network)
    if images.ndim not in (4, 5) or not len(images):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: (N, C, H, W) or (N, T, C, H, W) with one image or more is expected"
        )
    parameters = list(network.parameters())
    with evaluation_mode(network), torch.no_grad():
        with watching_spikes(network) as rates:
            network(images)
        with energy_profiler(network) as profiler:
            network(images)
    energy = profiler.get_report()
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
