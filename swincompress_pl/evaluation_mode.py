"""A network in another mode for a while: in evaluation, or with its parameters frozen; then all is as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """`network.eval()` for a while; after it every module is in the mode that it was in."""
    with _modes_restored(network):
        network.eval()
        yield


@contextmanager
def standing_still(network: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters for a while; after it every module and parameter is as it was.

    No module is told: one that overrides `train` keeps what it has made for its mode, as `quant.QuantizedNetwork` its
    integers.
    """
    with _modes_restored(network), gradients(network.parameters(), wanted=False):
        for module in network.modules():
            module.training = False
        yield


@contextmanager
def gradients(parameters: Iterable[nn.Parameter], *, wanted: bool) -> Iterator[None]:
    """All these parameters want gradients, or none does, for a while; after it those do that did before."""
    changed = [parameter for parameter in parameters if parameter.requires_grad is not wanted]
    try:
        for parameter in changed:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not wanted)


@contextmanager
def _modes_restored(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
