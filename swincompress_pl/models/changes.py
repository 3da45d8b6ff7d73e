"""What was changed on a network since `create_model` made it, against what its arguments say."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from swincompress_pl.history import creation_of, follow_size, history_of, note_attributes, noted_attributes
from swincompress_pl.models.factory import rebuild
from swincompress_pl.registry import ChangedAttributes, register_comparison, size_of
from swincompress_pl.structure import Description, describe, differences, uncompiled_name

Shapes = dict[str, list[int]]


def changes_since_creation(network: nn.Module) -> ChangedAttributes:
    """{module: {attribute: value}} that `network` has otherwise than its arguments of creation and its history give.

    Empty for a network of which no arguments are known. Raises ValueError for what no attribute brings back: another
    activation, a head of another size, a block that is gone. What timm's `set_input_size` changes is an argument.
    """
    if creation_of(network) is None:
        return {}
    follow_size(network, size_of(network))
    creation = creation_of(network)
    assert creation is not None
    history = history_of(network)
    # What was pruned after it was changed follows the change.
    changed: ChangedAttributes = copy.deepcopy(noted_attributes(network)) if history else {}
    description, shapes = _expected(json.dumps([creation, changed, history]))
    for difference in differences(description, describe(network)):
        if difference.attribute is None:
            raise ValueError(_refusal(creation, difference.module, difference.stored, difference.found))
        changed.setdefault(difference.module, {})[difference.attribute] = difference.found
    present = _with_computed(network, _shapes(network), shapes)
    for name in [*shapes, *(name for name in present if name not in shapes)]:
        if shapes.get(name) != present.get(name):
            raise ValueError(_refusal(creation, name, shapes.get(name), present.get(name)))
    note_attributes(network, changed)
    return changed


register_comparison(changes_since_creation)


@lru_cache(maxsize=8)
def _expected(origin: str) -> tuple[Description, Shapes]:
    """Description and shapes of what creation, changed attributes and history (JSON) give; it takes no memory."""
    creation, attributes, history = json.loads(origin)
    built = {"network": creation, "attributes": attributes, "history": history}
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                network = rebuild(built)
        except (RuntimeError, NotImplementedError):  # a constructor that computes with values
            network = rebuild(built)
    return describe(network), _shapes(network)


def _shapes(network: nn.Module) -> Shapes:
    return {uncompiled_name(name): list(value.shape) for name, value in network.state_dict().items()}


def _with_computed(network: nn.Module, present: Shapes, expected: Shapes) -> Shapes:
    """The shapes `present`, but for tensors that torch computes (`torch.nn.utils.prune`, parametrizations).

    These have their own names, in the place of the tensors that they are computed from.
    """
    modules = {uncompiled_name(path): each for path, each in network.named_modules()}
    computed: Shapes = {}
    for name in expected.keys() - present.keys():
        owner, _, attribute = name.rpartition(".")
        value = getattr(modules.get(owner), attribute, None)
        if isinstance(value, torch.Tensor):
            computed[name] = list(value.shape)
    sources = tuple(f"{name}_" for name in computed) + tuple(
        f"{name.rpartition('.')[0]}.parametrizations.{name.rpartition('.')[2]}." for name in computed
    )
    return {name: shape for name, shape in present.items() if not name.startswith(sources)} | computed


def _refusal(creation: dict[str, Any], where: str, stored: Any, found: Any) -> str:
    return (
        f"{creation['name']}: {where or 'the network'} is {'not there' if found is None else found} and was "
        f"{'not there' if stored is None else stored} as create_model made it, so its arguments would build another "
        "network. Give the change as an argument (num_classes, global_pool, depth, ... in model_kwargs), or make it in "
        "the __init__ of a LightningModule of your own"
    )
