"""spikingjelly's counts of operations for networks whose neurons give counts, as if these ran in binary time steps.

A count of c stands for c spikes in D binary time steps, in which a layer accumulates its weights once per spike. The
counters know spikes by their values, 0 and 1, and take counts for numbers. So they are given the spikes of one step
after the other. A product of two counts, as in attention, is that of every pair of their steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode, IFNode
from spikingjelly.activation_based.op_counter import SimpleEnergyProfiler
from torch import Tensor, nn

from swincompress_pl.models.spiking.multi_spike import MultiSpike

Rule = Callable[..., int]
_ATEN = torch.ops.aten
# Operations -> the place of the first of their two factors.
_PRODUCTS: dict[Any, int] = {
    _ATEN.mm.default: 0,
    _ATEN.bmm.default: 0,
    _ATEN.addmm.default: 1,
    _ATEN.baddbmm.default: 1,
    _ATEN.convolution.default: 0,
}


def energy_profiler(network: nn.Module) -> SimpleEnergyProfiler:
    """A profiler of spikingjelly for one pass of a network, which counts every neuron of counts as binary spikes."""
    profiler, steps = SimpleEnergyProfiler(), _BinarySteps()
    for counter in (profiler.mac_counter, profiler.ac_counter, profiler.synop_counter):
        for operation, place in _PRODUCTS.items():
            counter.rules[operation] = steps.product(operation, counter.rules[operation], place)
        for operation in (_ATEN.clone.default, _ATEN._unsafe_view.default):
            counter.rules[operation] = steps.copied
    rules = profiler.memory_counter.rules
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        rules["forward", kind] = steps.layer(rules["forward", kind])
    rules["forward", MultiSpike] = steps.neuron(rules["forward", BaseNode])
    profiler.bind_model(network)
    return profiler


class _BinarySteps:
    """Knows which tensors of a pass hold counts, and what their spikes are; makes rules of counters that see these."""

    def __init__(self) -> None:
        # By the address of their memory, which views share; kept, so that no other tensor gets it.
        self._found: dict[int, tuple[Tensor, int]] = {}

    def of(self, x: Tensor) -> list[Tensor]:
        """The spikes of each time step until the last one that has some, or at least one; [x] if it holds no counts."""
        if x.untyped_storage().data_ptr() not in self._found:
            return [x]
        _, norm = self._found[x.untyped_storage().data_ptr()]
        counts = (x * norm).round()
        return [(counts > step).to(x.dtype) for step in range(max(1, int(counts.max())))]

    def product(self, operation: Any, rule: Rule, place: int) -> Rule:
        """A rule for a product: the sum over the time steps of its factors."""

        def counted(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> int:
            total, factors = 0, args[place : place + 2]
            for x in self.of(factors[0]):
                for y in self.of(factors[1]):
                    step = (*args[:place], x, y, *args[place + 2 :])
                    same = x is factors[0] and y is factors[1]
                    again = not same and operation is not _ATEN.convolution.default  # whose rules look at shapes alone
                    total += rule(step, kwargs, operation(*step, **kwargs) if again else out)
            return total

        return counted

    def copied(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> int:
        """The rule for copies, which cost nothing: counts stay counts."""
        found = self._found.get(args[0].untyped_storage().data_ptr())
        if found is not None:
            self._found[out.untyped_storage().data_ptr()] = (out, found[1])
        return 0

    def layer(self, rule: Rule) -> Rule:
        """A rule for a layer that reads the spikes of all time steps, and its bias once."""

        def counted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> int:
            return rule(module, (torch.cat(self.of(args[0])), *args[1:]) if args else args, kwargs, output)

        return counted

    def neuron(self, rule: Rule) -> Rule:
        """A rule for neurons of counts: integrate-and-fire neurons, charged once, run through their time steps."""

        def counted(module: MultiSpike, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> int:
            self._found[output.untyped_storage().data_ptr()] = (output, module.norm)
            charges = torch.stack([args[0], *[torch.zeros_like(args[0])] * (module.D - 1)])
            stand_in = IFNode(v_threshold=1.0, v_reset=None, step_mode="m").to(output.device)
            stand_in.v = 0.5
            return rule(stand_in, (charges,), {}, stand_in(charges))

        return counted
