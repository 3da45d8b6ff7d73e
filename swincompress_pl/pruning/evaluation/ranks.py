"""What the processes of a distributed run tell each other while a search runs; in a single process nothing.

All ranks have to make the same calls in the same order. Python objects are sent, so counts stay integers, and sums are
taken in the order of the ranks: every rank gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def world_size() -> int:
    """How many processes take part; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 when it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


def from_all_ranks(value: T) -> list[T]:
    """`value` of every rank, in their order."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]  # every place was filled


def gather_results(compute: Callable[[], T]) -> list[T]:
    """What `compute()` gives on every rank, in their order. When it fails on one, every rank raises, so none waits."""
    if world_size() == 1:
        return [compute()]
    result, failure = None, None
    try:
        result = compute()
    except Exception as error:  # whatever it is: the others have to hear of it before it is raised
        failure = error
    told = from_all_ranks((result, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for number, (_, problem) in enumerate(told):
        if problem is not None:
            raise RuntimeError(f"rank {number} failed while scoring: {problem}")
    return [value for value, _ in told]  # type: ignore[misc]  # no rank failed


def sum_over_ranks(numbers: Sequence[float]) -> list[float]:
    """The sums, place by place, of the numbers that the ranks bring; integers stay integers."""
    columns = list(zip(*from_all_ranks(list(numbers)), strict=True))
    return [sum(c) if all(isinstance(n, int) for n in c) else math.fsum(c) for c in columns]


def from_rank_zero(value: T) -> T:
    """`value` as rank 0 has it."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_buffers(network: nn.Module) -> None:
    """Rank 0's buffers for all: the running statistics of a BatchNorm are those of each rank's own last batch, but a
    candidate has to be the same network wherever its images are."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
