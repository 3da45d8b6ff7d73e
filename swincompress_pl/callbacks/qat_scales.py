"""Learned scales in the optimizers of a fit: a parameter group of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from swincompress_pl.callbacks.compatibility import UNFIT_OPTIMIZERS
from swincompress_pl.quant import QuantizedNetwork

_NAME, _OLD_NAME = "scales.adjustment", "scales.drift"
# What schedulers (torch's, timm's) keep for every parameter group, in their order.
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
    """Puts a network's learned scales into the optimizer that trains its weights, as one group at the end.

    The group has the options of the group that trains the network's first parameter, without weight decay; its learning
    rate is `lr_factor` times that group's at every step, whatever sets that: a scheduler, a warm-up by hand.
    """

    def __init__(self, lr_factor: float) -> None:
        self.lr_factor = lr_factor
        self._handle: RemovableHandle | None = None

    def join(self, trainer: Trainer, network: QuantizedNetwork) -> None:
        """Do it; what `configure_optimizers` may have done with the scales is undone first.

        Before optimizer states are restored: a checkpoint's optimizer has the group. Raises ValueError where no
        optimizer trains the network, or one that takes no second group.
        """
        adjustment = network.scales.adjustment
        assert adjustment is not None
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not adjustment]
        optimizer, host = _host(trainer.optimizers, network.network)
        groups = len(optimizer.param_groups)
        model = optimizer.param_groups[host]
        own = {key: value for key, value in model.items() if key not in ("params", "param_names")}
        own |= {key: own[key] * self.lr_factor for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in own}
        if "weight_decay" in own:
            own["weight_decay"] = 0.0
        named = "param_names" in model
        optimizer.add_param_group({"params": [(_NAME, adjustment) if named else adjustment], **own})
        for config in trainer.lr_scheduler_configs:
            _extend(config.scheduler, optimizer, groups, host, self.lr_factor)
        self._follow(optimizer, host, groups)

    def _follow(self, optimizer: Optimizer, host: int, own: int) -> None:
        self.leave()

        def follow(stepped: Optimizer, *_: Any) -> None:
            # By number: restoring an optimizer's state replaces its groups.
            stepped.param_groups[own]["lr"] = stepped.param_groups[host]["lr"] * self.lr_factor

        self._handle = optimizer.register_step_pre_hook(follow)

    def leave(self) -> None:
        """Let go of the optimizer, which keeps the group."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def read_old_names(optimizer_states: Iterable[dict[str, Any]]) -> None:
    """Give the learned scales the name of now, where version 0.1 named them in the states of optimizers."""
    for state in optimizer_states:
        for group in state.get("param_groups", ()):
            if "param_names" in group:
                group["param_names"] = [_NAME if name == _OLD_NAME else name for name in group["param_names"]]


def _host(optimizers: Iterable[Optimizer], network: nn.Module) -> tuple[Optimizer, int]:
    """The optimizer and the number of its group that train the first parameter of `network` that any trains."""
    place = {
        id(parameter): (optimizer, number)
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    found = [place[id(parameter)] for parameter in network.parameters() if id(parameter) in place]
    if not found:
        raise ValueError(
            "no optimizer trains a parameter of the network, so its scales have no learning rate; return an optimizer "
            "of the network's parameters from configure_optimizers, or pass learn_scales=False"
        )
    optimizer, number = found[0]
    if type(optimizer).__name__ in UNFIT_OPTIMIZERS:
        raise ValueError(
            f"{type(optimizer).__name__} takes no group of parameters in the middle of a fit; use AdamW or SGD, or "
            "pass learn_scales=False"
        )
    return optimizer, number


def _extend(scheduler: Any, optimizer: Optimizer, groups: int, host: int, factor: float) -> None:
    """One more entry in what the scheduler keeps for each group, as for the host."""
    for inner in (*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "after_scheduler", None)):
        if inner is not None:
            _extend(inner, optimizer, groups, host, factor)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in _PER_GROUP:
        entries = vars(scheduler).get(name)
        if isinstance(entries, list) and len(entries) == groups:
            entry = entries[host]
            # A new list: SequentialLR's is that of the scheduler inside it.
            rate = isinstance(entry, int | float) and "momentum" not in name
            setattr(scheduler, name, [*entries, entry * factor if rate else entry])
