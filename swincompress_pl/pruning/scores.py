"""How much a unit matters: one number a unit, comparable inside its group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .groups import Group

Criterion = Callable[[nn.Module, Group], Tensor]
"""A user's own score: (network, group) -> (units,) finite numbers; the lowest are removed first."""


def magnitude(network: nn.Module, group: Group) -> Tensor:
    """The L2 norm over everything that a unit owns: (units,) float32 on the CPU."""
    squares = torch.zeros(group.units, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for part in group.slices:
            tensor = parameters.get(part.tensor)
            if tensor is None:  # a buffer carries no weight of its own
                continue
            along = tensor.detach().double().movedim(part.axis, 0).reshape(tensor.shape[part.axis], -1).square().sum(1)
            for offset in part.offsets:
                owned = along[offset : offset + group.units * part.width]
                squares += owned.reshape(group.units, part.width).sum(1).cpu()
    return squares.sqrt().float()


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}


def unit_scores(network: nn.Module, group: Group, criterion: str | Criterion = "magnitude") -> Tensor:
    """The scores of a group's units, divided by their mean so that groups can be compared: (units,) float32.

    criterion: a name in `CRITERIA` or a function (network, group) -> (units,).
    Raises ValueError for an unknown name, a wrong shape or a score that is not finite, naming the group.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"criterion {criterion!r} is unknown; there are {', '.join(CRITERIA)}, or pass a function")
        criterion = CRITERIA[criterion]
    scores = torch.as_tensor(criterion(network, group)).detach().float().cpu()
    if scores.shape != (group.units,):
        raise ValueError(f"{group.name}: the criterion gave shape {tuple(scores.shape)}, ({group.units},) is expected")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{group.name}: a score is not finite; are there NaN weights?")
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def lowest_units(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` units with the lowest score, sorted by index; of equal scores the lower index goes first."""
    order = torch.argsort(scores, stable=True)
    return tuple(sorted(order[:count].tolist()))
