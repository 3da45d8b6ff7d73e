"""What the removal of units costs a layer, in closed form, if its other weights make up for it.

After Optimal Brain Surgeon (Hassibi & Stork, 1993), with all columns of a unit as one block: removing the block U from
weights W with the Hessian H costs tr(W_U (H^-1_UU)^-1 W_U^T). That is the rise of E |y - W x|^2 per row of the
calibration images. H^-1 of the remaining columns follows by elimination.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 64  # of elimination, where units are many; those removed in one round are chosen together
_ONE_BY_ONE = 1024  # units; of two that say the same, both cost nothing until one is gone


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
    at_once = 1 if units <= _ONE_BY_ONE else -(-units // _ROUNDS)
    while len(left):
        costs = torch.zeros(len(left), dtype=torch.float64)
        for inverse, weight, columns in states:
            costs += _block_errors(inverse, weight, columns[left]).cpu()
        order = costs.argsort(stable=True)[:at_once]
        for cost, unit in zip(costs[order].tolist(), left[order].tolist(), strict=True):
            highest = max(highest, cost)
            scores[unit] = highest
        for inverse, weight, columns in states:
            _eliminate(inverse, weight, columns[left[order]].flatten())
        left = left[[i for i in range(len(left)) if i not in set(order.tolist())]]
    return scores


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
