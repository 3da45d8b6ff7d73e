"""Back to the shapes before a plan, for a checkpoint that is less pruned than the network in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from swincompress_pl.history import drop_latest_entry, history_of
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.structure.apply import (
    attribute_value,
    mask_name,
    put_tensor,
    stored_tensor,
    write_attribute,
)
from swincompress_pl.pruning.structure.groups import Group, Slice
from swincompress_pl.pruning.structure.plan import PruningPlan, find_group
from swincompress_pl.registry import adapter_for


def regrow_latest_plan(network: nn.Module) -> None:
    """Undoes the shapes of the latest plan in the network's history; the removed units come back as zeros.

    The network is then ready for the weights of a less pruned checkpoint. Until then it computes the same as before,
    unless the plan narrowed a residual stream ("embed"), whose LayerNorms then include the zeros. Masks of single
    weights keep what comes back. Constants that the plan set (`fused_attn`) and classes that it swapped stay, because
    they are right at every width. Unlike `revert_plan`, it needs nothing but the history.

    Raises ValueError, and changes nothing, if the latest entry is not a pruning plan with its units recorded.
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
    with all_or_nothing(network):
        for name, kept in plan.kept.items():
            # The groups are made again each time, because an earlier group may have moved the offsets.
            group = find_group({g.name: g for g in adapter_for(network).groups(network)}, name)
            _regrow(network, group, kept, (plan.units or {})[name])
        drop_latest_entry(network)


def _regrow(network: nn.Module, group: Group, kept: tuple[int, ...], units: int) -> None:
    parts: dict[tuple[str, int], list[Slice]] = {}
    for part in group.slices:
        parts.setdefault((part.tensor, part.axis), []).append(part)
    for (name, axis), slices in parts.items():
        old = stored_tensor(network, name)
        sources = _source_indices(slices, old.shape[axis], kept, units)
        mask = mask_name(network, name)
        if mask is not None:
            put_tensor(network, mask, _spread(stored_tensor(network, mask), axis, sources, fill=True))
        new = _spread(old.detach(), axis, sources, fill=0)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)  # attributes that users and libraries set on parameters
        put_tensor(network, name, new)
    for a in group.attributes:
        if a.value is None:
            width = units if a.size_of is None else stored_tensor(network, a.size_of).shape[a.axis]
            write_attribute(network, a.module, a.name, attribute_value(network, a, width))


def _spread(old: Tensor, axis: int, sources: list[int | None], fill: float) -> Tensor:
    at = [i for i, source in enumerate(sources) if source is not None]
    shape = list(old.shape)
    shape[axis] = len(sources)
    return old.new_full(shape, fill).index_copy_(axis, torch.tensor(at, device=old.device), old)


def _source_indices(parts: Iterable[Slice], length: int, kept: tuple[int, ...], units: int) -> list[int | None]:
    """For each index of the grown axis, the present index that moves there; None for a unit that comes back."""
    position = {unit: i for i, unit in enumerate(kept)}
    sources: list[int | None] = []
    done = 0
    for offset, width in sorted({(offset, part.width) for part in parts for offset in part.offsets}):
        sources += range(done, offset)
        for unit in range(units):
            start = offset + position[unit] * width if unit in position else None
            sources += [None] * width if start is None else range(start, start + width)
        done = offset + len(kept) * width
    return [*sources, *range(done, length)]
