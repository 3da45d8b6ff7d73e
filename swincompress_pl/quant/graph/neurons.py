"""spikingjelly's neurons in the terms of the integer specification: one recurrence, with the numbers of each kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.layer_types import alteration, full_name
from swincompress_pl.registry import UnsupportedNetworkError


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """The recurrence of a neuron's membrane potential v, in the units of its current.

    At each time step v becomes v + (reset - v + current) * decay, or v + (reset - v) * decay + current if the input
    does not decay. The neuron spikes if v >= threshold; then v becomes v - threshold (`soft_reset`) or reset. The decay
    is 1 / tau, or 0 for a neuron without leak; it is a tensor if it is learned.
    """

    threshold: float
    reset: float
    decay: float | Tensor
    input_decay: bool
    soft_reset: bool

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Neuron:
        """The recurrence of the neuron `module`, which messages call `name`.

        An UnsupportedNetworkError is raised for a neuron that is not an IFNode, LIFNode or ParametricLIFNode, for
        spikes that are not 0 or 1, and for a threshold, reset value or tau that is out of range.
        """
        from spikingjelly.activation_based import neuron

        node: Any = module
        decay: float | Tensor
        if type(node) is neuron.IFNode:
            decay, input_decay = 0.0, False
        elif type(node) is neuron.LIFNode:
            if not float(node.tau) >= 1:
                raise UnsupportedNetworkError(f"{name} has tau={node.tau}; it has to be 1 time step or more")
            decay, input_decay = 1.0 / float(node.tau), bool(node.decay_input)
        elif type(node) is neuron.ParametricLIFNode:
            decay, input_decay = node.w.sigmoid(), bool(node.decay_input)
        else:
            raise UnsupportedNetworkError(
                f"{name} is {type(node).__name__}; neurons with an integer form are IFNode, LIFNode and "
                "ParametricLIFNode"
            )
        if not 0 < float(node.v_threshold) < math.inf:
            raise UnsupportedNetworkError(f"{name} has v_threshold={node.v_threshold}; it has to be above 0 and finite")
        if node.v_reset is not None and not math.isfinite(node.v_reset):
            raise UnsupportedNetworkError(f"{name} has v_reset={node.v_reset}; it has to be finite, or None")
        if not getattr(node.surrogate_function, "spiking", True):
            raise UnsupportedNetworkError(
                f"{name}: {type(node.surrogate_function).__name__}(spiking=False) gives real numbers instead of "
                "spikes; only 0 and 1 have an integer form: set spiking=True"
            )
        return cls(
            threshold=float(node.v_threshold),
            reset=0.0 if node.v_reset is None else float(node.v_reset),
            decay=decay,
            input_decay=input_decay,
            soft_reset=node.v_reset is None,
        )


# Charges above the threshold for which the spikes are checked: they have to be 0 below it, and 1 from it on.
_PROBES = (-10.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 10.0)


def require_plain_neuron(name: str, module: nn.Module) -> None:
    """Raises an UnsupportedNetworkError for a neuron with other spikes than 0 and 1, or with a replaced method."""
    node: Any = module
    reason = alteration(module)
    if reason is not None:
        raise UnsupportedNetworkError(f"{name} is {full_name(type(node))}, but {reason}")
    own = next(node.surrogate_function.parameters(), torch.empty(0))
    with torch.no_grad():
        given = node.surrogate_function(torch.tensor(_PROBES, dtype=own.dtype, device=own.device))
    if given.tolist() != [float(charge >= 0) for charge in _PROBES]:
        raise UnsupportedNetworkError(
            f"{name}: {full_name(type(node.surrogate_function))} gives {[round(x, 3) for x in given.tolist()]} for "
            f"charges of {list(_PROBES)} above threshold; spikes with an integer form are 0 below it and 1 from it on"
        )


def require_plain_counts(name: str, module: nn.Module) -> None:
    """Raises an UnsupportedNetworkError for a neuron with other counts than round(clamp(x, 0, D)) / norm."""
    neuron: Any = module
    reason = alteration(module)
    if reason is not None:
        raise UnsupportedNetworkError(f"{name} is {full_name(type(neuron))}, but {reason}")
    probes = torch.tensor([-1e6, -0.4, 0.0, 0.4, 0.6, *(n + 0.4 for n in range(1, neuron.D)), neuron.D + 1.0, 1e6])
    with torch.no_grad():
        given = neuron(probes) * neuron.norm
    wanted = probes.clamp(0, neuron.D).round()
    if not torch.allclose(given, wanted):
        found, tried = ([round(x, 1) for x in tensor.tolist()] for tensor in (given, probes))
        raise UnsupportedNetworkError(
            f"{name} gives {found} spikes for {tried}; counts with an integer form are the input, rounded and clamped "
            f"to 0 to {neuron.D}"
        )


def spikes(module: nn.Module, neuron: Neuron, currents: Tensor, steps: int, *, repeated: bool) -> Tensor:
    """The spikes (N, T, ...) for currents (N, T, ...), or for currents (N, ...) that are `repeated` at every step.

    They have the surrogate gradient of `module`, in training and in evaluation. Membrane potentials begin at the reset
    value and are not kept. On an accelerator the module itself runs, for which spikingjelly may have a fused kernel.
    """
    if currents.device.type != "cpu":
        return spikes_of_module(module, currents, steps, repeated=repeated)
    node: Any = module
    membrane = torch.full_like(currents if repeated else currents[:, 0], neuron.reset)
    found = []
    for step in range(steps):
        current = currents if repeated else currents[:, step]
        charged = _charged(neuron, membrane, current)
        spike = node.surrogate_function(charged - neuron.threshold)
        found.append(spike)
        fired = spike.detach() if node.detach_reset else spike
        membrane = _after(neuron, charged, fired)
    return _stacked(found)


def spikes_of_module(module: nn.Module, currents: Tensor, steps: int, *, repeated: bool) -> Tensor:
    """The same by a call of the module, in multi-step mode, which is reset before and after it."""
    node: Any = module
    sequence = currents.expand(steps, *currents.shape) if repeated else currents.transpose(0, 1)
    node.reset()
    found: Tensor = node(sequence)
    node.reset()
    return found.transpose(0, 1)


def _charged(neuron: Neuron, membrane: Tensor, current: Tensor) -> Tensor:
    """The potentials after a current."""
    above = membrane if neuron.reset == 0 else membrane - neuron.reset
    if neuron.input_decay:
        return membrane + (current - above) * neuron.decay
    return membrane - above * neuron.decay + current


def _after(neuron: Neuron, charged: Tensor, fired: Tensor) -> Tensor:
    """The potentials after the spikes."""
    if neuron.soft_reset:
        return charged - fired * neuron.threshold
    kept = charged * (1 - fired)
    return kept if neuron.reset == 0 else kept + fired * neuron.reset


def _stacked(steps: list[Tensor]) -> Tensor:
    """Values (N, ..., C) of every step as (N, T, ..., C)."""
    # In memory, channels come before tokens, as convolutions make them. Another order would cost copies, and slow
    # gradients, in the next one.
    return torch.stack([step.movedim(-1, 1) for step in steps], dim=1).movedim(2, -1)
