"""Names of weights with and without the prefix that `torch.compile` puts into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from swincompress_pl.structure import uncompiled_name

_STATES = ("state_dict", "current_model_state")  # the second one beside the first, if Lightning averages


def follow_compilation(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Renames the weights of `checkpoint` as `module` names them, if only wrappers of `torch.compile` differ.

    So a checkpoint of a compiled network loads into a plain one and vice versa, wherever in the module the wrappers
    are. The state dict itself does not change; `checkpoint` gets another one.
    """
    expected = module.state_dict().keys()
    names = {uncompiled_name(key): key for key in expected}
    for place in _STATES:
        state = checkpoint.get(place) or {}
        renamed = {key if key in expected else names.get(uncompiled_name(key), key): state[key] for key in state}
        if len(renamed) == len(state) and renamed.keys() != state.keys():  # else two became one: loading says so
            checkpoint[place] = renamed


def masks_as_named_in(network: nn.Module, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`history` with masked weights as `network` names them, whose parts may be compiled or not."""
    names = {uncompiled_name(name): name for name, _ in network.named_parameters()}

    def renamed(kind: str, data: Any) -> Any:
        if kind not in ("mask", "unmask") or not all(isinstance(name, str) for name in data):
            return data
        return [names.get(uncompiled_name(name), name) for name in data]

    return [{kind: renamed(kind, data) for kind, data in entry.items()} for entry in history]
