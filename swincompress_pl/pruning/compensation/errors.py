"""What the removal of units costs a layer, in closed form, if its other weights make up for it.

After Optimal Brain Surgeon (Hassibi & Stork, 1993), with all columns of a unit as one block: removing the block U from
weights W with the Hessian H costs tr(W_U (H^-1_UU)^-1 W_U^T). That is the rise of E |y - W x|^2 per row of the
calibration images. H^-1 of the remaining columns follows by elimination.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 64  # of elimination; the units removed in one are chosen one by one, but of the cheapest only
_CANDIDATES = 2  # for each unit that is removed in a round
LARGER = 1 + 1e-9  # so that the order can be read from the scores


def removal_errors(systems: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The errors of units in the order in which they are best removed, one after the other.

    Args:
        systems: For each layer that reads the units: the inverse Hessian (inputs, inputs), the weights (outputs,
            inputs), and the columns (units, columns per unit) of the units. float64; units of one index go together.

    Returns:
        For each unit (units,), how much the error rises when it goes as the next one; never less than for those before,
        so the units with the lowest values are the best set of any size that this order finds.
    """
    units = len(systems[0][2])
    states = [(inverse.clone(), weight.clone(), columns) for inverse, weight, columns in systems]
    scores = torch.zeros(units, dtype=torch.float64)
    left, highest = torch.arange(units), 0.0
    at_once = -(-units // _ROUNDS)
    while len(left):
        costs = _costs(states, left)
        candidates = left[costs.argsort(stable=True)[: _CANDIDATES * at_once]]
        chosen, increments = _one_by_one(states, candidates, at_once)
        for unit, cost in zip(chosen, increments, strict=True):
            highest = max(highest * LARGER, cost)
            scores[unit] = highest
        for inverse, weight, columns in states:
            _eliminate(inverse, weight, columns[chosen].flatten())
        left = left[~torch.isin(left, torch.tensor(chosen))]
    return scores


State = tuple[Tensor, Tensor, Tensor]
"""The inverse Hessian, the weights, and the columns of the units, of one layer."""


def _costs(states: Sequence[State], units: Tensor) -> Tensor:
    """What the removal of each of `units` alone costs, on the CPU."""
    total = torch.zeros(len(units), dtype=torch.float64)
    for inverse, weight, columns in states:
        total += _block_errors(inverse, weight, columns[units.to(columns.device)]).cpu()
    return total


def _one_by_one(states: Sequence[State], candidates: Tensor, count: int) -> tuple[list[int], list[float]]:
    """The best of some units to remove, one after the other, and what each costs; of twins only one is cheap."""
    small = []
    for inverse, weight, columns in states:
        wanted = columns[candidates.to(columns.device)]
        flat = wanted.flatten()
        places = torch.arange(len(flat), device=flat.device).reshape(wanted.shape)
        small.append((inverse[flat][:, flat], weight[:, flat], places))
    chosen, increments, left = list[int](), list[float](), torch.arange(len(candidates))
    for _ in range(min(count, len(candidates))):
        costs = _costs(small, left)
        best = int(costs.argmin())
        chosen.append(int(candidates[left[best]]))
        increments.append(float(costs[best]))
        for inverse, weight, places in small:
            _eliminate(inverse, weight, places[left[best]])
        left = left[torch.arange(len(left)) != best]
    return chosen, increments


def _block_errors(inverse: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """tr(W_U (H^-1_UU)^-1 W_U^T) of each block of `columns` (units, columns per unit)."""
    if columns.shape[1] == 1:
        column = columns[:, 0]
        alone: Tensor = weight[:, column].square().sum(0) / inverse.diagonal()[column]
        return alone
    blocks = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
    given = weight[:, columns].movedim(1, 0).transpose(1, 2)  # (units, columns, outputs)
    solved: Tensor = torch.linalg.solve(blocks, given)
    return (given * solved).sum((1, 2))


def _eliminate(inverse: Tensor, weight: Tensor, columns: Tensor) -> None:
    """Removes columns: updates the weights that stay, and the inverse Hessian of what stays, in place."""
    block = inverse[columns][:, columns]
    solved = torch.linalg.solve(block, inverse[columns])  # (columns, inputs)
    weight -= weight[:, columns] @ solved
    inverse -= inverse[:, columns] @ solved
    weight[:, columns] = 0.0
