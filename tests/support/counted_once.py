"""Multiply-accumulates of each structure counted once: a pass over a tiny network is quick, its count is not."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

_REGISTERED = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, str, bytes, type, torch.dtype, torch.device, torch.Size, type(None))
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def once_per_structure(count: Callable[[nn.Module, Tensor], int]) -> Callable[[nn.Module, Tensor], int]:
    """`count` of a network without memory and images without memory, whose answer only their structure decides."""
    known: dict[Hashable, int] = {}

    def counted(bare: nn.Module, images: Tensor) -> int:
        key = (structure_of(bare), images.shape, images.dtype)
        if key not in known:
            known[key] = count(bare, images)
        return known[key]

    return counted


def structure_of(network: nn.Module) -> Hashable:
    """Classes, attributes, hooks and shapes of all modules: what a pass can hang on but for the tensors' values."""
    return tuple((name, type(module), *_attributes(module)) for name, module in network.named_modules())


def _attributes(module: nn.Module) -> tuple[Hashable, Hashable]:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        tuple((name, _described(tensor)) for name, tensor in tensors),
        # A hook's key is a running number.
        tuple(
            (name, _described(tuple(value.values()) if "_hooks" in name and isinstance(value, dict) else value))
            for name, value in vars(module).items()
            if name not in _REGISTERED
        ),
    )


def _described(x: Any) -> Hashable:
    if isinstance(x, _PLAIN):
        return x if type(x) in _PLAIN else (type(x), x)
    if isinstance(x, Tensor):
        return (type(x), x.shape, x.dtype)
    if isinstance(x, nn.Module):
        return type(x)  # a registered one is described at its own place
    if isinstance(x, dict):
        return (type(x), tuple((_described(key), _described(value)) for key, value in x.items()))
    if isinstance(x, list | tuple | set | frozenset):
        return (type(x), tuple(map(_described, x)))
    if isinstance(x, functools.partial):
        return (_described(x.func), _described(x.args), _described(x.keywords))
    if isinstance(x, _FUNCTIONS):
        return (x.__module__, x.__qualname__)
    return (type(x), tuple((name, _described(value)) for name, value in getattr(x, "__dict__", {}).items()))
