"""What the processes of a distributed run tell each other while a search runs; in a single process nothing.

All ranks have to make the same calls in the same order. Python objects are sent, so counts stay integers, and sums are
taken in the order of the ranks: every rank gets the same bits.

A rank that fails tells the others: inside `failing_together` its failure takes the place of what it would have brought
to the next exchange, so that all end there and none waits for a collective's time limit. For that every collective in
there is an exchange of this file, or stands behind one (`agree`).
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
    """The outermost `failing_together` at work. over: the others have been told of a failure, or cannot be any more."""

    def __init__(self) -> None:
        self.depth, self.over, self.failed_while = 0, False, ""


_section = _Section()


def world_size() -> int:
    """How many processes take part; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 when it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def failing_together(doing: str) -> Iterator[None]:
    """What one rank raises in here ends it on every rank: the others raise `RankFailedError`, which says what it was.

    They hear of it at their next exchange, or at the end, where all wait for each other. doing: of the message. Inside
    another one this one only says what is being done. An interrupt is told too, but not one between the halves of an
    exchange: whoever waits there ends with the connection, when the interrupted process does.
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
    """What this rank raises counts, whatever becomes of telling it."""
    try:
        _exchange(None, problem)
    except Exception:  # the others are gone, or failed too
        return


def agree() -> None:
    """All ranks have come so far and are well: to be called before a collective that is not of this file."""
    if world_size() > 1:
        _exchange(None)


def _exchange(value: Any, problem: str | None = None) -> list[Any]:
    """`value` of every rank; RankFailedError where one brings a problem instead."""
    if _section.depth and _section.over:
        raise RankFailedError("the ranks have failed before, and none waits for the others any more")
    content = pickle.dumps((value, problem))  # what cannot be sent fails here, where it can still be told
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
    """A collective: where it breaks off, the ranks are no longer at the same place."""
    before, _section.over = _section.over, True
    yield
    _section.over = before


def from_all_ranks(value: T) -> list[T]:
    """`value` of every rank, in their order."""
    return [value] if world_size() == 1 else _exchange(value)


def gather_results(compute: Callable[[], T]) -> list[T]:
    """What `compute()` gives on every rank, in their order. When it fails on one, every rank raises, so none waits."""
    with failing_together("scoring"):
        return from_all_ranks(compute())


def sum_over_ranks(numbers: Sequence[float]) -> list[float]:
    """The sums, place by place, of the numbers that the ranks bring; integers stay integers."""
    columns = list(zip(*from_all_ranks(list(numbers)), strict=True))
    return [sum(c) if all(isinstance(n, int) for n in c) else math.fsum(c) for c in columns]


def from_rank_zero(value: T) -> T:
    """`value` as rank 0 has it."""
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
    """Rank 0's buffers for all: the running statistics of a BatchNorm are those of each rank's own last batch, but a
    candidate has to be the same network wherever its images are."""
    if world_size() > 1:
        agree()
        with _under_way():
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
