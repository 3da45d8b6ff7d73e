"""A spiking network as an ordinary classifier: one call gives one answer, and nothing is kept.

A spiking network keeps membrane potentials from one call to the next and answers once per time step. `without_memory`
makes every call a fresh start with one answer, so that code that evaluates, copies, trains or prunes a network need not
know about time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def without_memory(network: nn.Module) -> nn.Module:
    """Makes a spiking network forget between calls, in place.

    From then on a call takes images (N, C, H, W), each shown at every time step, or events (N, T, C, H, W). It returns
    the mean over time, (N, classes). The neurons are reset before and after each call, in training and in evaluation,
    so that a copy, a checkpoint or another batch never sees their membrane potentials. A second call changes nothing.
    A network of `MultiSpike` stays as it is, because its neurons keep nothing.

    Events need as many time steps as the network's `T`, if it has one; otherwise a call raises a ValueError. No weight
    depends on `T`, so set `network.T` for another number.

    Args:
        network: A network of spikingjelly in multi-step mode.

    Returns:
        The same network.

    Raises:
        ValueError: If the network has no neurons, is in single-step mode, or its `T` is not an integer of 1 or more.
    """
    if _check_neurons(network) and _begin not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_begin)
        network.register_forward_hook(_end)
    return network


def _check_neurons(network: nn.Module) -> bool:
    """Raises ValueError unless `network` has neurons in multi-step mode; tells whether they have a memory."""
    from spikingjelly.activation_based.base import MemoryModule

    from swincompress_pl.models.spiking.multi_spike import MultiSpike

    neurons = {name: module for name, module in network.named_modules() if isinstance(module, MemoryModule)}
    if not neurons:
        if any(isinstance(module, MultiSpike) for module in network.modules()):
            return False
        raise ValueError(f"{type(network).__name__}: has no neuron of spikingjelly, so it is not a spiking network")
    steps = getattr(network, "T", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{type(network).__name__}: T is {steps!r}; a network needs 1 time step or more")
    single = [name for name, module in neurons.items() if module.step_mode != "m"]
    if single:
        raise ValueError(
            f"{type(network).__name__}: {single[0]} is in single-step mode; use functional.set_step_mode(network, 'm')"
        )
    return True


def check_spiking(network: nn.Module) -> None:
    """Raises ValueError, naming the remedy, unless `network` spikes, in multi-step mode, and forgets between calls."""
    if _check_neurons(network) and _begin not in network._forward_pre_hooks.values():
        raise ValueError(
            f"{type(network).__name__}: keeps its membrane potentials from one call to the next; make it with "
            "models.create_model, or use models.without_memory(network)"
        )


@contextmanager
def watching_spikes(network: nn.Module) -> Iterator[dict[str, float]]:
    """{neuron layer: spikes per time step and place, 0 to 1}, in the order of a pass, complete when the context ends.

    It counts all calls inside the context, and takes a neuron's output for its spikes. A neuron of counts up to D has D
    time steps.
    """
    from spikingjelly.activation_based.neuron import BaseNode

    from swincompress_pl.models.spiking.multi_spike import MultiSpike

    counts: dict[str, tuple[Tensor, int]] = {}
    rates: dict[str, float] = {}

    def count(name: str, output: Tensor, module: nn.Module) -> None:
        norm, steps = (module.norm, module.D) if isinstance(module, MultiSpike) else (1, 1)
        spikes, places = counts.get(name, (output.new_zeros((), dtype=torch.float64), 0))
        counts[name] = spikes + output.detach().double().sum() * norm, places + output.numel() * steps

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if isinstance(module, BaseNode | MultiSpike):
                handle = module.register_forward_hook(
                    lambda module, _inputs, output, name=name: count(name, output, module)
                )
                hooks.callback(handle.remove)
        yield rates
    rates.update({name: float(spikes) / places for name, (spikes, places) in counts.items()})


def _begin(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Resets the neurons, and puts the time of events (N, T, ...) first, as spikingjelly expects."""
    _reset(network)
    images, *rest = inputs
    if not isinstance(images, Tensor) or images.ndim not in (4, 5):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{type(network).__name__}: takes images (N, C, H, W) or events (N, T, C, H, W), not {found}")
    if images.ndim == 4:
        return inputs
    _check_time_steps(network, images)
    return (images.transpose(0, 1), *rest)


def _check_time_steps(network: nn.Module, events: Tensor) -> None:
    """Raises a ValueError if events are not (N, T, ...) with the T of the network, as in spikingjelly's own order."""
    steps, found = getattr(network, "T", None), events.shape[1]
    if isinstance(steps, int) and found != steps:
        raise ValueError(
            f"{type(network).__name__}: images have shape {tuple(events.shape)}; this network takes "
            f"(N, {steps}, C, H, W), the time steps second. If they are in spikingjelly's order (T, N, C, H, W), pass "
            f"images.transpose(0, 1); if they have {found} time steps, set network.T = {found}"
        )


def _end(network: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    _reset(network)
    return output.mean(0) if output.ndim == 3 else output


def _reset(network: nn.Module) -> None:
    from spikingjelly.activation_based import functional

    # reset_net keeps a list of all networks that it has seen. torch.compile would guard on that list, and the guard
    # would fail when another network is deleted.
    functional.reset_collected_modules(functional.collect_reset_modules(network))
