"""Back to the shapes before a plan: what a checkpoint that is less pruned than the network in memory needs."""

from __future__ import annotations

import torch
from torch import nn

from ..registry import adapter_for
from .apply import history_of
from .groups import Group, Slice
from .plan import PruningPlan, find_group


def regrow_latest_plan(network: nn.Module) -> None:
    """Undo, in shapes, the latest entry of the network's history; the removed units come back with all weights zero.

    The network computes the same as before, so it is ready for the weights of a less pruned checkpoint. Unlike
    `revert_plan` it needs nothing but the history. Raises ValueError when the entry is no pruning plan with its units
    recorded.
    """
    history = history_of(network)
    if not history or "prune" not in history[-1]:
        raise ValueError(
            f"{type(network).__name__}: the latest entry of its history is no pruning plan; build a fresh network"
        )
    plan = PruningPlan.from_dict(history[-1]["prune"])
    groups = {g.name: g for g in adapter_for(network).groups(network)}
    for name, kept in plan.kept.items():
        group, units = find_group(groups, name), (plan.units or {}).get(name)
        if units is None or group.units != len(kept):
            raise ValueError(f"{name}: the plan does not record the width before it; build a fresh network")
    for name, kept in plan.kept.items():
        # Asked for anew each time: an earlier group may have moved the offsets.
        group = find_group({g.name: g for g in adapter_for(network).groups(network)}, name)
        _regrow(network, group, kept, (plan.units or {})[name])
    network.compression_history = history[:-1]  # type: ignore[assignment]  # a plain list


def _regrow(network: nn.Module, group: Group, kept: tuple[int, ...], units: int) -> None:
    for part in group.slices:
        path, _, leaf = part.tensor.rpartition(".")
        module = network.get_submodule(path)
        old = getattr(module, leaf)
        sources = _source_indices(part, old.shape[part.axis], kept, units)
        at = [i for i, source in enumerate(sources) if source is not None]
        shape = list(old.shape)
        shape[part.axis] = len(sources)
        new = old.detach().new_zeros(shape)
        new.index_copy_(part.axis, torch.tensor(at, device=old.device), old.detach())
        setattr(
            module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    for a in group.attributes:
        value = units if a.size_of is None else _length(network, a.size_of, a.axis)
        setattr(network.get_submodule(a.module), a.name, value)


def _source_indices(part: Slice, length: int, kept: tuple[int, ...], units: int) -> list[int | None]:
    """For each index of the grown axis the present one that goes there, or None for a unit that comes back."""
    position = {unit: i for i, unit in enumerate(kept)}
    sources: list[int | None] = []
    done = 0
    for offset in sorted(part.offsets):
        sources += range(done, offset)
        for unit in range(units):
            start = offset + position[unit] * part.width if unit in position else None
            sources += [None] * part.width if start is None else range(start, start + part.width)
        done = offset + len(kept) * part.width
    return [*sources, *range(done, length)]


def _length(network: nn.Module, tensor: str, axis: int) -> int:
    path, _, leaf = tensor.rpartition(".")
    return int(getattr(network.get_submodule(path), leaf).shape[axis])
