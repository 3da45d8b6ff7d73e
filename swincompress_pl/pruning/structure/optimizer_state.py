"""Optimizers that keep their momentum when parameters shrink."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.structure.apply import AppliedPlan, SlicedTensor


def slice_optimizer(optimizer: Optimizer, applied: AppliedPlan) -> None:
    """Replaces an optimizer's parameters by the sliced ones of `apply_plan`, and slices its state.

    State of the parameter's old shape (exp_avg, exp_avg_sq, max_exp_avg_sq, momentum_buffer) is sliced with the plan's
    indices. Step counts, learning rates and parameter groups stay. This is right for optimizers that work element by
    element, such as SGD, Adam, AdamW, RMSprop, Adagrad and Lion.

    Args:
        optimizer: The optimizer, made before the slicing.
        applied: What `apply_plan` returned, or the `applied` of a round.

    Raises:
        ValueError: If a state has another shape (Adafactor's factors, LBFGS's history); nothing is changed then.
    """
    slice_optimizers([optimizer], applied)


def slice_optimizers(optimizers: Iterable[Optimizer], applied: AppliedPlan) -> None:
    """`slice_optimizer` for several optimizers; on any exception none of them is changed."""
    changes = {id(t.old): t for t in applied.tensors}
    sliced = [(optimizer, _sliced_state(optimizer, changes)) for optimizer in optimizers]
    with all_or_nothing(*(optimizer for optimizer, _ in sliced)):
        for optimizer, states in sliced:
            for group in optimizer.param_groups:
                group["params"] = [changes[id(p)].new if id(p) in changes else p for p in group["params"]]
            for change, state in states:
                del optimizer.state[change.old]
                optimizer.state[change.new] = state


def _sliced_state(optimizer: Optimizer, changes: dict[int, SlicedTensor]) -> list[tuple[SlicedTensor, dict[str, Any]]]:
    found = []
    for parameter, state in optimizer.state.items():
        change = changes.get(id(parameter))
        if change is not None:
            found.append((change, {key: _slice_value(optimizer, change, key, value) for key, value in state.items()}))
    return found


def _slice_value(optimizer: Optimizer, change: SlicedTensor, key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.shape == change.old.shape:
        return change.slice(value)
    if (
        (isinstance(value, Tensor) and value.numel() <= 1)
        or value is None
        or isinstance(value, int | float | bool | str)
    ):
        return value
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{type(optimizer).__name__}: its state {key!r} of {change.name} ({shape}) does not have the parameter's shape "
        f"{tuple(change.old.shape)} and cannot be cut with it; use an element-wise optimizer (AdamW, SGD), or prune "
        "before fit"
    )
