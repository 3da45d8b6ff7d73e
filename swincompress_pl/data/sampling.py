"""Which images come in which order: functions of (seed, epoch, index) and of nothing else.

A resumed run, another number of workers or persistent workers must not change what is trained on. So a dataset does not
hold the epoch. The sampler hands out (epoch, item) pairs, which reach every worker with each request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

Indices = NDArray[np.int64]


class EpochIndex(NamedTuple):
    """A sampler's request to a dataset: image `item` with the augmentation of `epoch`."""

    epoch: int
    item: int


class Purpose(IntEnum):
    """What random numbers are drawn for; it keeps the streams of one seed apart."""

    ORDER = 1
    AUGMENTATION = 2
    HOLDOUT = 3
    CALIBRATION = 4
    TEST = 5


def derive_seed(seed: int, purpose: Purpose, *path: int) -> int:
    """A 63-bit seed, e.g. `derive_seed(seed, Purpose.AUGMENTATION, epoch, index)`; adjacent ones are independent.

    `path` must have the same length for all draws of a purpose, as NumPy's SeedSequence ignores zeros at the end.
    """
    return int(np.random.SeedSequence([seed, int(purpose), *path]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator inside the context and restores its state afterwards.

    torchvision's transforms draw from the global generator only, so this makes them functions of a seed.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class EpochSampler(DistributedSampler[EpochIndex]):
    """A permutation of the dataset that depends on (seed, epoch) only, divided evenly among the ranks.

    It is a DistributedSampler so that Lightning calls `set_epoch` on it and leaves it in place under DDP. Lightning
    would wrap any other sampler. Without a process group there is one rank. If the ranks do not divide the number of
    images, the first images of the permutation come twice, so that all ranks take the same number of steps.
    """

    def __init__(self, dataset: Dataset[object], seed: int) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,
            num_replicas=torch.distributed.get_world_size() if grouped else 1,
            rank=torch.distributed.get_rank() if grouped else 0,
            seed=seed,
        )

    def __iter__(self) -> Iterator[EpochIndex]:
        count: int = len(self.dataset)  # type: ignore[arg-type]  # Dataset promises no __len__, ours have it
        order = np.random.default_rng(derive_seed(self.seed, Purpose.ORDER, self.epoch)).permutation(count)
        # np.resize repeats from the start, which is the padding described above.
        for index in np.resize(order, self.total_size)[self.rank :: self.num_replicas]:
            yield EpochIndex(self.epoch, int(index))


def stratified_sample(labels: Indices, count: int, seed: int) -> Indices:
    """Draws `count` of the positions 0 to N - 1, sorted, with the classes in proportion.

    Every class gets the floor of its share. What is left goes to the largest remainders, and chance decides ties.
    A ValueError is raised unless 0 <= count <= N.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot take {count} of {len(labels)} images.")
    generator = np.random.default_rng(seed)
    classes, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = sizes * (count / max(len(labels), 1))
    quota = np.floor(share + 1e-9).astype(np.int64)  # 1e-9: a share of 2.999... counts as 3
    by_remainder = np.lexsort((generator.random(len(classes)), -(share - quota).round(9)))
    quota[by_remainder[: count - int(quota.sum())]] += 1
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(class_of[shuffled], kind="stable")]
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    chosen = [by_class[start : start + number] for start, number in zip(starts, quota, strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen])).astype(np.int64)
