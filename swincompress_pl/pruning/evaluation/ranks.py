"""What the processes of a distributed run tell each other during a search; in a single process, nothing.

All ranks have to make the same calls in the same order. Python objects are sent, so counts stay integers, and sums are
taken in the order of the ranks, so every rank gets the same bits.

A rank that fails tells the others. Inside `failing_together`, its failure replaces what it would have brought to the
next exchange, so that all ranks end there and none waits for the time limit of a collective. For that, every collective
in there is an exchange of this file, or comes after one (`agree`).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """Another rank failed; this one did not."""


class _Section:
    """The outermost `failing_together` under way; `over` says that the others know of a failure, or cannot be told."""

    def __init__(self) -> None:
        self.depth, self.over, self.failed_while = 0, False, ""


_section = _Section()


def world_size() -> int:
    """The number of processes; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 if it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def failing_together(doing: str) -> Iterator[None]:
    """If one rank raises inside the context, every other rank raises a `RankFailedError` that names the reason.

    The others hear of it at their next exchange, or at the end of the context, where all wait for each other. `doing`
    says in the message what was being done; a context inside another one does nothing else. An interrupt is told too,
    unless it comes in the middle of an exchange. A rank that waits there ends when the interrupted process closes the
    connection.
    """
    if world_size() == 1:
        yield
        return
    if not _section.depth:
        _section.over, _section.failed_while = False, ""
    _section.depth += 1
    try:
        yield
    except BaseException as error:
        _section.failed_while = _section.failed_while or doing
        if _section.depth == 1 and not _section.over:
            _tell(f"{_section.failed_while}: {type(error).__name__}: {error}")
        raise
    else:
        if _section.depth == 1:
            agree()
    finally:
        _section.depth -= 1


def _tell(problem: str) -> None:
    """Tells the other ranks of a failure; an error while telling it is ignored."""
    try:
        _exchange(None, problem)
    except Exception:  # the others have ended or failed too, and the error of this rank is raised anyway
        return


def agree() -> None:
    """Waits until all ranks are here and well; call it before a collective that is not of this file."""
    if world_size() > 1:
        _exchange(None)


def _exchange(value: Any, problem: str | None = None) -> list[Any]:
    """The values of all ranks; a RankFailedError if one brings a problem instead."""
    if _section.depth and _section.over:
        raise RankFailedError("the ranks have failed before, and no longer wait for each other")
    content = pickle.dumps((value, problem))  # what cannot be pickled fails here, where the others can still be told
    heard: list[Any] = [None] * world_size()
    with _under_way():
        dist.all_gather_object(heard, content)
    said = [pickle.loads(each) for each in heard]
    for number, (_, other) in enumerate(said):
        if other is not None and number != rank():
            _section.over = True
            raise RankFailedError(f"rank {number} failed while {other}")
    return [value for value, _ in said]


@contextmanager
def _under_way() -> Iterator[None]:
    """A collective under way; if it is interrupted, the ranks are no longer at the same place."""
    before, _section.over = _section.over, True
    yield
    _section.over = before


def from_all_ranks(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    return [value] if world_size() == 1 else _exchange(value)


def gather_results(compute: Callable[[], T]) -> list[T]:
    """The results of `compute()` on all ranks, in their order. If it fails on one, every rank raises."""
    with failing_together("scoring"):
        return from_all_ranks(compute())


def sum_over_ranks(numbers: Sequence[float]) -> list[float]:
    """The element-wise sums of the numbers of all ranks; integers stay integers."""
    columns = list(zip(*from_all_ranks(list(numbers)), strict=True))
    return [sum(c) if all(isinstance(n, int) for n in c) else math.fsum(c) for c in columns]


def from_rank_zero(value: T) -> T:
    """The value of rank 0."""
    if world_size() == 1:
        return value
    box = [pickle.dumps(value) if rank() == 0 else None]
    agree()
    with _under_way():
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None  # rank 0 filled it
    received: T = pickle.loads(box[0])
    return received


def share_buffers(network: nn.Module) -> None:
    """Gives rank 0's buffers to all ranks.

    A BatchNorm's running statistics come from each rank's own batches, but a candidate has to be the same network on
    every rank.
    """
    if world_size() > 1:
        agree()
        with _under_way():
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
