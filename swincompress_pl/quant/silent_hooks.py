"""Finds hooks of the user that a quantized network does not call, since it computes with the weights itself."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from swincompress_pl.quant.graph import Graph, Node
from swincompress_pl.quant.graph.nodes import ActivationNode, AttentionNode, LayerNormNode

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Modules with hooks that are not the user's: those that compute weights, which the graph deals with, and our own.
_NOT_THE_USERS = ("torch.nn.utils", "swincompress_pl")


def warn_of_silent_hooks(network: nn.Module, graph: Graph, *, stacklevel: int = 2) -> None:
    """Warns of hooks that do not fire once `network` is quantized, and names their modules."""
    hooked = hooked_modules(network)
    called = {path for node in graph.nodes for path in _called(node)}
    never, in_training = [p for p in hooked if p not in called], [p for p in hooked if p in called]
    silent = [_listed(never, "at all")] if never else []
    silent += [_listed(in_training, "in evaluation, which is integers")] if in_training else []
    if silent:
        warnings.warn(
            f"hooks of {type(network).__name__} do not fire once it is quantized: {'; '.join(silent)}. A quantized "
            "network computes with the weights of its layers and calls only norms, activations and dropout, in "
            "training. Take such features from a float copy, or hook the quantized network itself",
            stacklevel=stacklevel + 1,
        )


def hooked_modules(network: nn.Module) -> list[str]:
    """The modules of `network` with forward or backward hooks of the user; the network itself is "(itself)"."""
    return [path or "(itself)" for path, module in network.named_modules() if any(map(_is_users, _hooks_of(module)))]


def _hooks_of(module: nn.Module) -> list[Any]:
    return [hook for kind in _KINDS for hook in getattr(module, kind).values()]


def _is_users(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return not any(name == other or name.startswith(f"{other}.") for other in _NOT_THE_USERS)


def _called(node: Node) -> Collection[str]:
    """The modules that a node calls in the fake quantization of training."""
    called = [*node.regularizers]
    if isinstance(node, LayerNormNode | ActivationNode):
        called.append(node.module)
    if isinstance(node, AttentionNode) and node.dropout is not None:
        called.append(node.dropout)
    return called


def _listed(paths: list[str], when: str) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "") + f" ({when})"
