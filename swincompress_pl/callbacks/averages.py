"""Refuses averages of the network that cannot follow a change of it, by name and before anything is changed.

Such averages are the user's own: timm's ModelEmaV3, torch's AveragedModel, a copy that a callback updates. A copy is a
network of the same type whose parameters have the same names and are other tensors. A copy is an average, and not a
teacher, in one of three cases. Its name or that of its class says so (ema, swa, average, shadow, momentum, ...). An
object that holds it has a method `update` or `update_parameters`. Or its owner has a method for it (`update_teacher`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torchmetrics import Metric

from swincompress_pl.callbacks.training_pass import TrainingPass

_AVERAGING = frozenset({"ema", "swa", "avg", "average", "averaged", "averaging", "polyak", "shadow", "momentum"})
_UPDATES = ("update", "update_parameters")
# Their `update` is that of a mapping, or takes images; that of a copied LightningModule may mean anything.
_OTHER_UPDATES = (nn.ModuleDict, nn.ParameterDict, Mapping, Metric, LightningModule)
# Words that do not connect a method with an attribute, though the names of both have them.
_COMMON = frozenset({"net", "network", "model", "module", "backbone", "update", "student"})


@dataclass(frozen=True)
class _Copy:
    """A copy of the network: its owner, the path of attributes to it, the objects on that path, and the copy itself."""

    owner: Any
    path: str
    holders: Sequence[Any]
    network: nn.Module

    @property
    def place(self) -> str:
        return f"{type(self.owner).__name__}.{self.path}"

    def is_average(self) -> bool:
        """Whether the rule at the top of this file makes it an average."""
        named = [holder for holder in self.holders if not isinstance(holder, (LightningModule, type(self.network)))]
        named += [self.owner] if isinstance(self.owner, Callback) else []
        words = _words(self.path).union(*(_words(type(holder).__name__) for holder in named))
        if words & _AVERAGING or any(map(_updates_itself, self.holders)):
            return True
        updated = [_words(name) for name in dir(type(self.owner)) if "update" in _words(name)]
        own = (_words(self.path.split(".")[0]) - _COMMON) | _AVERAGING
        return any(words & own for words in updated)


def refuse_averages(trainer: Trainer, module: LightningModule, network: nn.Module, callback_name: str) -> None:
    """Raises a ValueError for a copy of `network` that a callback or the module averages."""
    for copy in _copies(trainer, module, network):
        if copy.is_average():
            raise ValueError(
                f"{copy.place} holds a copy of {type(network).__name__} that is an average of it; it cannot follow "
                f"when {callback_name} changes the shapes or the names of the parameters. Beside pruning, average in a "
                "later fit, of the pruned checkpoint; beside quantization, use Lightning's WeightAveraging or "
                "EMAWeightAveraging and put it after the callback"
            )


def note_old_shapes(
    trainer: Trainer, module: LightningModule, network: nn.Module, callback_name: str, exception: BaseException
) -> None:
    """Adds a note to an error in a fit whose network was cut: which copies still have the old shapes."""
    if isinstance(exception, RuntimeError):
        shapes = [parameter.shape for parameter in network.parameters()]
        for copy in _copies(trainer, module, network):
            if [parameter.shape for parameter in copy.network.parameters()] != shapes:
                exception.add_note(
                    f"{callback_name} has cut the network in this fit, and {copy.place} is a copy with the old shapes. "
                    "If it is updated from the network, do that in a later fit, of the pruned checkpoint"
                )


def _copies(trainer: Trainer, module: LightningModule, network: nn.Module) -> Iterator[_Copy]:
    owners: list[Any] = [module]
    for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        if not isinstance(other, WeightAveraging | TrainingPass):  # those have rules of their own
            owners.append(other)
    for owner in owners:
        for path, holders in _held_by(owner):
            if holders[-1] is not module:  # which our own hooks hold, for one
                yield from _copies_in(owner, path, holders, network)


def _held_by(owner: Any) -> Iterator[tuple[str, list[Any]]]:
    """The path to each module in an owner's attributes, and the objects on the path.

    Objects and containers in the attributes are searched one level deep.
    """
    for name, value in _attributes(owner):
        if isinstance(value, nn.Module):
            yield name, [value]
            continue
        for inner, within in _attributes(value):
            if isinstance(within, nn.Module):
                yield f"{name}.{inner}", [value, within]


def _copies_in(owner: Any, path: str, holders: list[Any], network: nn.Module) -> Iterator[_Copy]:
    """The copy in the last of the holders. If that holds the network too, the copies are looked for in its children."""
    holder: nn.Module = holders[-1]
    if any(inner is network for inner in holder.modules()):
        for name, child in holder.named_children() if holder is not network else ():
            yield from _copies_in(owner, f"{path}.{name}", [*holders, child], network)
        return
    copied = _copy_in(holder, network)
    if copied is not None:
        yield _Copy(owner, path, holders, copied)


def _attributes(holder: Any) -> list[tuple[str, Any]]:
    if isinstance(holder, list | tuple):
        return [(str(number), value) for number, value in enumerate(holder)]
    if isinstance(holder, Mapping):
        return [(str(key), value) for key, value in holder.items()]
    if isinstance(holder, Trainer | type):
        return []
    own = dict(getattr(holder, "__dict__", {}))
    children = own.pop("_modules", {}) if isinstance(holder, nn.Module) else {}
    return [*own.items(), *children.items()]


def _copy_in(holder: nn.Module, network: nn.Module) -> nn.Module | None:
    """The copy of `network` in a module: the same type and names of parameters, with other tensors."""
    live = dict(network.named_parameters())
    for inner in holder.modules():
        if type(inner) is type(network):
            own = dict(inner.named_parameters())
            if list(own) == list(live) and not any(own[name] is live[name] for name in own):
                return inner
    return None


def _updates_itself(holder: Any) -> bool:
    return not isinstance(holder, _OTHER_UPDATES) and any(callable(getattr(holder, name, None)) for name in _UPDATES)


def _words(name: str) -> set[str]:
    """The words of a name: both "ModelEmaV3" and "model_ema.module" have "ema"."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
