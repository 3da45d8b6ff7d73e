"""Networks, hold-outs and accuracies for the tests of PrimeSVT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.spiking_cases import ALL, SIZE_PX, lively
from swincompress_pl.pruning import HoldOut, PrimeSVTConfig, PrioritizedPolicy
from swincompress_pl.registry import adapter_for

SHAPE = (1, 3, SIZE_PX, SIZE_PX)
PAPERS: dict[str, Any] = {"policy": "prioritized", "blocks": "block"}
ALLOCATED: dict[str, Any] = {"policy": "allocated", "rates": (0.1, 0.3), "round_to": 1}
QUICK: dict[str, Any] = {
    **PAPERS, "target_sets": (1.0, 0.5), "rates": (0.1, 0.3), "increments": (0.4, 0.2), "round_to": 1,
}  # fmt: skip


def with_policy(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` of the config with those of the paper's policy, which may stand among them, in their place."""
    of_policy = {name: settings[name] for name in PrioritizedPolicy.__dataclass_fields__ if name in settings}
    rest = {name: value for name, value in settings.items() if name not in of_policy}
    return {**rest, "policy": PrioritizedPolicy(**of_policy)} if of_policy else rest


def prime_config(**settings: Any) -> PrimeSVTConfig:
    """A config of `with_policy`."""
    return PrimeSVTConfig(**with_policy(settings))


def network_of(name: str = "spikformer", seed: int = 5) -> nn.Module:
    """Half of the units of every group matter little, so that there is something to prune."""
    network, _ = lively(ALL[name], seed, trained_statistics=True)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for group in adapter_for(network).groups(network):
            if group.kind in ("heads", "embed"):
                continue
            for part in group.slices:
                if part.tensor in parameters:
                    index = torch.tensor(part.indices(range(0, group.units, 2)))
                    faint = 1e-3 * parameters[part.tensor].index_select(part.axis, index)
                    parameters[part.tensor].index_copy_(part.axis, index, faint)
    return network.float()


def holdout_of(network: nn.Module, count: int = 60, **options: Any) -> HoldOut:
    """Images whose labels are what the network says, so that it is right on all."""
    images = torch.randn(count, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(images).argmax(1)
    return HoldOut(images, labels, batch_size=20, **options)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_zeros(costs: dict[str, float], images: Tensor) -> Callable[[nn.Module], float]:
    """An accuracy that falls with the zeros in the weights of each block, `costs` points for all of a block's."""

    def evaluate(network: nn.Module) -> float:
        network(images)  # so that its spikes are seen
        lost = 0.0
        for block, cost in costs.items():
            weights = [
                p.flatten() for name, p in network.named_parameters() if name.startswith(f"{block}.") and p.ndim > 1
            ]
            together = torch.cat(weights)
            lost += cost * float((together == 0).sum()) / together.numel()
        return max(0.0, 90 - lost)

    return evaluate
