"""Removing units without changing a shape: the consumers' weights are zero for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..registry import adapter_for
from .groups import Group, validate_units
from .plan import PruningPlan, find_group


@contextmanager
def mask_units(network: nn.Module, group: Group, units: Iterable[int]) -> Iterator[None]:
    """Within the context `network` computes as if `units` of `group` were removed; after it, it is as it was.

    The weights come back to the bit. Contexts nest: leave them in the reverse order. The weights must not be trained
    inside, or the change is lost.
    """
    gone = validate_units(group, units, "the masked units")
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for consumer in group.consumers() if gone else ():
                tensor: Tensor = network.get_parameter(consumer.tensor)
                index = torch.tensor(consumer.indices(gone), device=tensor.device)
                saved.append((tensor, consumer.axis, index, tensor.index_select(consumer.axis, index)))
                tensor.index_fill_(consumer.axis, index, 0.0)
        yield
    finally:
        with torch.no_grad():
            for masked, axis, index, values in reversed(saved):
                masked.index_copy_(axis, index, values)


@contextmanager
def mask_plan(network: nn.Module, plan: PruningPlan, groups: Iterable[Group] | None = None) -> Iterator[None]:
    """`mask_units` for everything that `plan` removes."""
    known: Mapping[str, Group] = {
        g.name: g for g in (adapter_for(network).groups(network) if groups is None else groups)
    }
    with ExitStack() as stack:
        for name, kept in plan.kept.items():
            group = find_group(known, name)
            stay = set(validate_units(group, kept, "the kept units"))
            stack.enter_context(mask_units(network, group, [u for u in range(group.units) if u not in stay]))
        yield
