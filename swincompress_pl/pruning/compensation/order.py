"""The order of the units inside each head, so that the least of every head share a unit and go together.

Dimensions go from all heads at once, as the reshape to heads requires. Unit u is then dimension u of each head, though
nothing but the order of training made these belong together. In spiking attention any order inside a head will do,
while a change of basis, as for ViT (`axes.py`), would have to pass through the neurons.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from swincompress_pl.pruning.compensation.axes import units_alike
from swincompress_pl.pruning.structure.apply import stored_tensor
from swincompress_pl.pruning.structure.groups import Group


def heads_apart(group: Group) -> Group:
    """The same units with those of each head for themselves: unit h * units + u is unit u of head h."""
    slices = tuple(replace(part, offsets=part.offsets[:: group.heads]) for part in group.slices)
    return replace(
        group, name=f"{group.name}, heads apart", units=group.heads * group.units, heads=1, slices=slices, attributes=()
    )


def sort_heads(network: nn.Module, group: Group, scores: Tensor) -> Tensor:
    """Puts the units of each head in the order of falling scores, in place; masked ones stay where they are.

    Args:
        network: The network, which computes the same afterwards.
        group: The units.
        scores: The scores (heads * units,) of `heads_apart(group)`.

    Returns:
        For each place of `heads_apart(group)`, the unit (heads * units,) that is there now.
    """
    places = torch.arange(group.heads * group.units).reshape(group.heads, group.units)
    units = list(units_alike(network, group))
    order = scores.cpu().reshape(places.shape)[:, units].argsort(dim=1, descending=True, stable=True)
    now = places.clone()
    now[:, units] = places[:, units].gather(1, order)
    now = now.flatten()
    for part in heads_apart(group).slices:
        tensor = stored_tensor(network, part.tensor).detach()
        for offset in part.offsets:
            rows = (offset + places.flatten()).to(tensor.device)
            tensor.index_copy_(part.axis, rows, tensor.index_select(part.axis, (offset + now).to(tensor.device)))
    return now
