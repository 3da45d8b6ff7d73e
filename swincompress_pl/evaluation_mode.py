"""Context managers for eval mode, frozen parameters, float64 and inference mode, which restore everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.interrupts import put_back_after


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode inside the context, and restores the mode of every module afterwards."""
    with _modes_restored(network):
        network.eval()
        yield


@contextmanager
def standing_still(network: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode with frozen parameters inside the context, and restores both afterwards.

    The method `train` of the modules is not called. So a module that overrides it keeps what it has made for its mode,
    as `quant.QuantizedNetwork` keeps its integers.
    """
    with _modes_restored(network), gradients(network.parameters(), wanted=False):
        for module in network.modules():
            module.training = False
        yield


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Inside the context, modules that were compiled in place run as they are, so that hooks on them fire."""
    tables = [module.__dict__ for module in network.modules() if module.__dict__.get("_compiled_call_impl") is not None]
    saved = [(table, table["_compiled_call_impl"]) for table in tables]

    def put_back() -> None:
        for table, compiled in saved:
            table["_compiled_call_impl"] = compiled

    with put_back_after(put_back):
        for table, _ in saved:
            table["_compiled_call_impl"] = None
        yield


@contextmanager
def on_trial(network: nn.Module, dtype: torch.dtype | None = torch.float64) -> Iterator[None]:
    """Puts a network in eval mode with copies of all its tensors, for a pass that leaves no trace.

    The copies have the type `dtype`, or their own for None. Parameters, buffers and other tensors of the modules, the
    modes, and torch's random numbers are restored afterwards. Inside the context the network is not compiled, inference
    mode is off, and the copies of the parameters require gradients.
    """
    tables = [table for module in network.modules() for table in _tables_of(module)]
    saved = [(table, dict(table)) for table in tables]
    copies: dict[int, Tensor] = {}

    def put_back() -> None:
        for table, before in saved:
            table.update(before)

    with torch.inference_mode(False), _random_numbers_kept(network), evaluation_mode(network), put_back_after(put_back):
        for table in tables:
            for name, value in table.items():
                if isinstance(value, Tensor):
                    table[name] = copies.setdefault(id(value), _copy(value, dtype))
                elif name == "_compiled_call_impl":
                    table[name] = None
        yield


def _tables_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries in which a module keeps tensors; the last one has the membranes of spikingjelly's neurons."""
    return module._parameters, module._buffers, module.__dict__, module.__dict__.get("_memories", {})


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    copy = tensor.detach().clone() if dtype is None or not tensor.is_floating_point() else tensor.detach().to(dtype)
    copy = copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy
    return nn.Parameter(copy, requires_grad=copy.is_floating_point()) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _random_numbers_kept(network: nn.Module) -> Iterator[None]:
    devices = {tensor.device for tensor in network.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        yield


@contextmanager
def gradients(parameters: Iterable[nn.Parameter], *, wanted: bool) -> Iterator[None]:
    """Sets whether parameters require gradients inside the context, and restores it afterwards."""
    changed = [parameter for parameter in parameters if parameter.requires_grad is not wanted]

    def turn(to: bool) -> None:
        for parameter in changed:
            parameter.requires_grad_(to)

    with put_back_after(lambda: turn(not wanted)):
        turn(wanted)
        yield


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves `torch.inference_mode()` inside the context, because tensors made in it can never have gradients.

    Gradients are recorded only if they were recorded before.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def replace_inference_tensors(network: nn.Module) -> None:
    """Replaces parameters and buffers that were made in inference mode by copies; shared ones stay shared.

    Outside inference mode, the originals can be neither trained nor written to.
    """
    copies: dict[int, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    copy = copies.setdefault(id(tensor), _copied(tensor))
                    tensors[name] = copy  # type: ignore[assignment]


def _copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _modes_restored(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]

    def put_back() -> None:
        for module, training in modes:
            module.training = training

    with put_back_after(put_back):
        yield
