"""Puts learned scales into the optimizers of a fit, as a parameter group of their own."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from swincompress_pl.callbacks.compatibility import UNFIT_OPTIMIZERS
from swincompress_pl.callbacks.finetuning import keeps_last_group
from swincompress_pl.callbacks.random_state import isolated
from swincompress_pl.quant import QuantizedNetwork

_NAME, _OLD_NAME = "scales.adjustment", "scales.drift"
# What schedulers of torch and timm keep for every parameter group, in the order of the groups.
_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
    "base_values",
)


class ScaleGroup:
    """Puts a network's learned scales into the optimizer that trains its weights, as one group of their own.

    The group has the options of a host group, without weight decay. The host is the group that trains the network's
    first parameter, or another one if that takes matrices only (Muon beside AdamW). At every step the learning rate is
    `lr_factor` times that of the host, whatever sets it: a scheduler, or a warm-up by hand. The group is the last one,
    or the last but one if a callback takes the last one for its own. In a resumed fit it keeps its number.

    Args:
        lr_factor: Learning rate of the scales, as a multiple of that of the host group; above 0.

    Attributes:
        place: Number of the group; None before there is one.
    """

    def __init__(self, lr_factor: float) -> None:
        self.lr_factor = lr_factor
        self.place: int | None = None
        self._handle: RemovableHandle | None = None

    def join(self, trainer: Trainer, network: QuantizedNetwork) -> None:
        """Adds the group, after taking the scales out of the groups that `configure_optimizers` may have put them in.

        Call it before the states of optimizers are restored, as a checkpoint's optimizer has the group. Raises a
        ValueError if no optimizer trains the network, or none takes the scales.
        """
        adjustment = network.scales.adjustment
        assert adjustment is not None
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.optimizers:
            _take_out(adjustment, optimizer, schedulers)
        optimizer, host = _host(trainer.optimizers, network.network)
        groups = optimizer.param_groups
        if self.place is None:
            self.place = len(groups) - 1 if keeps_last_group(trainer) else len(groups)
        place = min(self.place, len(groups))
        model = groups[host]
        own = {key: value for key, value in model.items() if key not in ("params", "param_names")}
        own |= {key: own[key] * self.lr_factor for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in own}
        if "weight_decay" in own:
            own["weight_decay"] = 0.0
        named = "param_names" in model
        optimizer.add_param_group({"params": [(_NAME, adjustment) if named else adjustment], **own})
        groups.insert(place, groups.pop())
        for scheduler, name, entries in _per_group(schedulers, optimizer, len(groups) - 1):
            rate = isinstance(entries[host], int | float) and "momentum" not in name
            entry = entries[host] * self.lr_factor if rate else entries[host]
            setattr(scheduler, name, [*entries[:place], entry, *entries[place:]])
        self._follow(optimizer, host + (place <= host), place)

    def check(self, trainer: Trainer, network: nn.Module) -> None:
        """Raises the ValueError that `join` would raise later, for optimizers that do not take scales."""
        if _places(trainer.optimizers, network):  # else a callback may still add them, when it unfreezes the network
            _host(trainer.optimizers, network)

    def _follow(self, optimizer: Optimizer, host: int, own: int) -> None:
        self.leave()

        def follow(stepped: Optimizer, *_: Any) -> None:
            # By number, because restoring an optimizer's state replaces its groups.
            stepped.param_groups[own]["lr"] = stepped.param_groups[host]["lr"] * self.lr_factor

        self._handle = optimizer.register_step_pre_hook(follow)

    def leave(self) -> None:
        """Lets go of the optimizer, which keeps the group."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def read_old_names(optimizer_states: Iterable[dict[str, Any]]) -> None:
    """Renames the learned scales in the states of optimizers, where version 0.1 gave them another name."""
    for state in optimizer_states:
        for group in state.get("param_groups", ()):
            if "param_names" in group:
                group["param_names"] = [_NAME if name == _OLD_NAME else name for name in group["param_names"]]


def _host(optimizers: Sequence[Optimizer], network: nn.Module) -> tuple[Optimizer, int]:
    """The optimizer, and the number of its group, that take the scales.

    These are the ones that train the first trained parameter of `network`, or the next ones that take vectors.
    """
    own = _places(optimizers, network)
    if not own:
        raise ValueError(
            "no optimizer trains a parameter of the network, so its scales have no learning rate; return an optimizer "
            "of the network's parameters from configure_optimizers, or pass learn_scales=False"
        )
    rest = [(optimizer, number) for optimizer in optimizers for number in range(len(optimizer.param_groups))]
    for optimizer, number in [*own, *rest]:
        if _takes_scales(optimizer, number):
            return optimizer, number
    name = type(own[0][0]).__name__
    fault = "takes no new group in the middle of a fit" if name in UNFIT_OPTIMIZERS else "steps no vectors"
    raise ValueError(
        f"{name} {fault}, so it cannot train the learned scales, which are a vector; use AdamW or SGD, instead or "
        "beside it for some parameters, or pass learn_scales=False"
    )


def _places(optimizers: Iterable[Optimizer], network: nn.Module) -> list[tuple[Optimizer, int]]:
    """The optimizers and numbers of groups that train parameters of `network`, in the order of the parameters."""
    place = {
        id(parameter): (optimizer, number)
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    found = [place[id(parameter)] for parameter in network.parameters() if id(parameter) in place]
    return list({(id(optimizer), number): (optimizer, number) for optimizer, number in found}.values())


def _takes_scales(optimizer: Optimizer, number: int) -> bool:
    """Whether a group of the optimizer steps a vector as it steps a matrix; Muon's groups do not.

    A wrapper (Lookahead, SAM) does what the optimizer inside it does. An optimizer that cannot be tried out counts as
    one that does.
    """
    if type(optimizer).__name__ in UNFIT_OPTIMIZERS:
        return False
    inner = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
    if inner is not None and number < len(inner.param_groups):
        return _takes_scales(inner, number)
    parameters = optimizer.param_groups[number]["params"]
    like = parameters[0] if parameters else torch.zeros(())
    return _steps(optimizer, number, like.new_zeros(4)) or not _steps(optimizer, number, like.new_zeros(4, 4))


def _steps(optimizer: Optimizer, number: int, value: Tensor) -> bool:
    """Whether a copy of the optimizer makes a step, with one parameter of this value and no state."""
    parameter = nn.Parameter(value)
    parameter.grad = torch.ones_like(value)
    options = {key: v for key, v in optimizer.param_groups[number].items() if key not in ("params", "param_names")}
    # What the memo holds is not copied: neither the network's parameters nor their state.
    memo: dict[int, Any] = {
        id(optimizer.param_groups): [{**options, "params": [parameter]}],
        id(optimizer.state): defaultdict(dict),
    }
    try:
        with isolated():
            copy.deepcopy(optimizer, memo).step()
    except Exception:
        return False
    return True


def nested_schedulers(scheduler: Any) -> Iterator[Any]:
    """Yields the schedulers inside a scheduler, and then itself."""
    for inner in (*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "after_scheduler", None)):
        if inner is not None:
            yield from nested_schedulers(inner)
    yield scheduler


def _take_out(adjustment: nn.Parameter, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
    """Takes the scales out of the optimizer's groups, and removes groups that had nothing else."""
    for group in [group for group in optimizer.param_groups if any(each is adjustment for each in group["params"])]:
        group["params"] = [parameter for parameter in group["params"] if parameter is not adjustment]
        if not group["params"]:
            place = next(i for i, each in enumerate(optimizer.param_groups) if each is group)
            for scheduler, name, entries in _per_group(schedulers, optimizer, len(optimizer.param_groups)):
                setattr(scheduler, name, [*entries[:place], *entries[place + 1 :]])
            del optimizer.param_groups[place]


def _per_group(schedulers: Iterable[Any], optimizer: Optimizer, groups: int) -> Iterator[tuple[Any, str, list[Any]]]:
    """Yields (scheduler, attribute, entries) for what schedulers of the optimizer keep per group.

    To change the entries, set a new list, because SequentialLR shares its list with the scheduler inside it.
    """
    for scheduler in (each for outer in schedulers for each in nested_schedulers(outer)):
        if getattr(scheduler, "optimizer", None) is optimizer:
            for name in _PER_GROUP:
                entries = vars(scheduler).get(name)
                if isinstance(entries, list) and len(entries) == groups:
                    yield scheduler, name, entries
