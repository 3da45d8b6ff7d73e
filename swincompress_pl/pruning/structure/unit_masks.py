"""Masks units inside a context: they are removed without a change of shapes.

The consumers' weights are zero, and the LayerNorms that the units go through normalize over the other channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swincompress_pl.interrupts import put_back_after, unwritten
from swincompress_pl.pruning.structure.apply import stored_tensor
from swincompress_pl.pruning.structure.groups import Group, NormSlice, Slice, validate_units
from swincompress_pl.pruning.structure.plan import PruningPlan, find_group
from swincompress_pl.registry import adapter_for


class MaskedLayerNorm(nn.LayerNorm):
    """A LayerNorm over the last axis that computes as if sliced to `kept_channels`, and gives 0 in the others.

    A LayerNorm has this class, and its own state, while some of its channels are masked.
    """

    kept_channels: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the kept channels of x (..., channels); returns a tensor of the same shape."""
        kept = self.kept_channels.to(x.device)
        weight, bias = (None if t is None else t.index_select(0, kept) for t in (self.weight, self.bias))
        normed = F.layer_norm(x.index_select(-1, kept), (len(kept),), weight, bias, self.eps)
        return normed.new_zeros(x.shape).index_copy(-1, kept, normed)


@contextmanager
def mask_units(network: nn.Module, group: Group, units: Iterable[int]) -> Iterator[None]:
    """Inside the context, a network computes as if `units` of `group` were removed.

    Afterwards the weights are restored bit by bit. Contexts nest: leave them in reverse order. Do not train the weights
    inside, or the change is lost. Raises ValueError if the group does not have the units, a parametrization computes a
    weight, or a LayerNorm would have no channel left.
    """
    gone = validate_units(group, units, "the masked units")
    with ExitStack() as stack:
        for consumer in group.consumers() if gone else ():
            stack.enter_context(_zeroed(network, consumer, gone))
        for norm in group.norms if gone else ():
            if len(gone) == group.units:
                raise ValueError(f"{group.name}: all {group.units} units are masked; {norm.module} needs at least one")
            stack.enter_context(_narrowed(network, norm, gone))
        yield


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


@contextmanager
def _zeroed(network: nn.Module, part: Slice, units: Sequence[int]) -> Iterator[None]:
    tensor = stored_tensor(network, part.tensor)
    index = torch.tensor(part.indices(units), device=tensor.device)
    values = tensor.detach().index_select(part.axis, index)

    def put_back() -> None:
        tensor.detach().index_copy_(part.axis, index, values)

    with put_back_after(put_back, unwritten(tensor, writes=1)):
        tensor.detach().index_fill_(part.axis, index, 0.0)
        yield


@contextmanager
def _narrowed(network: nn.Module, part: NormSlice, units: Sequence[int]) -> Iterator[None]:
    norm = network.get_submodule(part.module)
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"{part.module} is a {type(norm).__name__}; only a LayerNorm can be masked")
    own_type, before = type(norm), vars(norm).get("kept_channels")  # the latter where masks nest
    channels = range(norm.normalized_shape[0]) if before is None else before.tolist()
    gone = set(part.channels(units))
    device = None if norm.weight is None else norm.weight.device
    kept = torch.tensor([c for c in channels if c not in gone], device=device)

    def put_back() -> None:
        norm.__class__ = own_type
        if before is None:
            vars(norm).pop("kept_channels", None)
        else:
            norm.kept_channels = before

    with put_back_after(put_back):
        norm.kept_channels = kept
        norm.__class__ = MaskedLayerNorm
        yield
