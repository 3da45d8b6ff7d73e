"""What a search changed in a network, slices or masks, and how to undo it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.structure.apply import AppliedPlan, revert_plan, stored_tensor
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.weight_masks import (
    masked_parameters,
    register_masks,
    set_mask,
    undo_latest_masks,
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a round changed in the network, with what is needed to undo it.

    Attributes:
        applied: The slices, for the optimizers; empty if nothing was sliced.
        before: Maps a masked parameter to its weight and mask before.
        registered: Names of the parameters that had no mask before.
        rewritten: Maps a parameter or buffer that was written to before anything was cut to its values before.
    """

    applied: AppliedPlan
    before: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    registered: tuple[str, ...] = field(default=(), repr=False)
    rewritten: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


def nothing_applied() -> AppliedPlan:
    """What `apply_plan` gives for a plan that removes nothing."""
    return AppliedPlan(plan=PruningPlan.identity(), tensors=(), attributes=())


def commit_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> Change:
    """Sets `masks`, {parameter: True where a weight stays}, for good; what was masked before stays masked."""
    known = masked_parameters(network)
    new = tuple(name for name in masks if name not in known)
    with all_or_nothing(network, written=owners(network, masks)):
        if new:
            register_masks(network, new)
        known = masked_parameters(network)
        before = {name: (known[name][0].detach().clone(), known[name][1].clone()) for name in masks}
        for name, mask in masks.items():
            set_mask(network, name, mask.to(known[name][1].device) & known[name][1])
        return Change(applied=nothing_applied(), before=before, registered=new)


def revert(network: nn.Module, change: Change) -> None:
    """Undoes the latest change."""
    with all_or_nothing(network, written=owners(network, [*change.before, *change.rewritten])), torch.no_grad():
        revert_plan(network, change.applied)
        for name, (weight, mask) in change.before.items():
            parameter, now = masked_parameters(network)[name]
            parameter.copy_(weight)
            now.copy_(mask)
        if change.registered:
            undo_latest_masks(network)
        for name, values in change.rewritten.items():
            stored_tensor(network, name).copy_(values)


def owners(network: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that hold these parameters or buffers."""
    return [network.get_submodule(name.rpartition(".")[0]) for name in names]


def gone_units(network: nn.Module, group: Group) -> tuple[int, ...]:
    """The units of `group` that are masked already (`shrink="end"`)."""
    masks = masked_parameters(network)
    gone: set[int] | None = None
    for part in group.consumers():
        if part.tensor not in masks:
            return ()
        mask = masks[part.tensor][1].movedim(part.axis, 0)
        empty = ~mask.reshape(len(mask), -1).any(1)
        here = {u for u in range(group.units) if bool(empty[part.indices([u])].all())}
        gone = here if gone is None else gone & here
    return tuple(sorted(gone or ()))


def plan_of_masks(network: nn.Module, groups: Sequence[Group]) -> PruningPlan:
    """The plan that slices away every masked unit."""
    removed = {g.name: gone_units(network, g) for g in groups}
    return PruningPlan.removing(groups, {name: units for name, units in removed.items() if units})


def consumer_masks(
    network: nn.Module, groups: Mapping[str, Group], removal: Mapping[str, Iterable[int]]
) -> dict[str, Tensor]:
    """The masks, {parameter: True where a weight stays}, of what reads the units of `removal`."""
    masks: dict[str, Tensor] = {}
    for name, units in removal.items():
        for part in groups[name].consumers():
            parameter = network.get_parameter(part.tensor)
            mask = masks.setdefault(part.tensor, torch.ones_like(parameter, dtype=torch.bool))
            mask.index_fill_(part.axis, torch.tensor(part.indices(units), device=mask.device), False)
    return masks
