"""On an accelerator, neurons run as spikingjelly's modules: the same spikes and gradients as step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from swincompress_pl.quant.graph.neurons import Neuron, spikes, spikes_of_module

NEURONS: dict[str, Any] = {
    "if": lambda **options: neuron.IFNode(**options),
    "lif": lambda **options: neuron.LIFNode(tau=2.0, **options),
    "lif, input not decayed": lambda **options: neuron.LIFNode(tau=2.0, decay_input=False, **options),
    "parametric": lambda **options: neuron.ParametricLIFNode(init_tau=2.0, **options),
}


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
@pytest.mark.parametrize("kind", NEURONS)
def test_the_module_gives_the_spikes_and_gradients_of_the_loop(
    kind: str, v_reset: float | None, repeated: bool
) -> None:
    steps = 4
    node = NEURONS[kind](v_reset=v_reset, surrogate_function=surrogate.Sigmoid(), detach_reset=True, step_mode="m")
    node = node.double()
    shape = (3, 2, 2, 5) if repeated else (3, steps, 2, 2, 5)
    currents = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    found = {}
    for name in ("loop", "module", "module again"):
        given = currents.clone().requires_grad_()
        if name == "loop":
            result = spikes(node, Neuron.of("node", node), given, steps, repeated=repeated)
        else:
            result = spikes_of_module(node, given, steps, repeated=repeated)
        result.mul(torch.arange(result.numel()).reshape(result.shape)).sum().backward()
        found[name] = result.detach(), given.grad
    assert 0 < float(found["loop"][0].mean()) < 1
    for name in ("module", "module again"):
        assert torch.equal(found[name][0], found["loop"][0]), name
        torch.testing.assert_close(found[name][1], found["loop"][1])


def test_the_module_keeps_nothing() -> None:
    node = neuron.LIFNode(tau=2.0, step_mode="m")
    spikes_of_module(node, torch.ones(1, 3, 2), 3, repeated=False)
    assert node.v == node._memories_rv["v"]
