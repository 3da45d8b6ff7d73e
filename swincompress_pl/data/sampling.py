"""Which images, in which order: functions of (seed, epoch, index) and of nothing else.

A resumed run, another number of workers or persistent workers must not change what is trained on. So a dataset holds
no epoch: the sampler hands out (epoch, item) pairs, which reach every worker with each request.
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
    """What the sampler asks a dataset for: image `item` with the augmentation of `epoch`."""

    epoch: int
    item: int


class Purpose(IntEnum):
    """What random numbers are drawn for; keeps the streams of one seed apart."""

    ORDER = 1
    AUGMENTATION = 2
    HOLDOUT = 3
    CALIBRATION = 4
    TEST = 5


def derive_seed(seed: int, purpose: Purpose, *path: int) -> int:
    """A 63-bit seed, e.g. `derive_seed(seed, Purpose.AUGMENTATION, epoch, index)`; neighbours are independent.

    `path` has the same length for all draws of a purpose: NumPy's SeedSequence ignores zeros at the end.
    """
    return int(np.random.SeedSequence([seed, int(purpose), *path]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Torch's CPU generator starts from `seed` inside and goes on afterwards as if nothing had happened.

    torchvision's transforms draw from the global generator only; this makes them functions of a seed.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class EpochSampler(DistributedSampler[EpochIndex]):
    """A permutation of the dataset that depends on (seed, epoch) only, dealt out evenly to the ranks.

    It is a DistributedSampler so that Lightning calls `set_epoch` on it and leaves it in place under DDP, where it
    would wrap any other sampler in one of its own. Without a process group there is one rank. Where the ranks do not
    divide the number of images, the first images of the permutation are seen twice, so that all ranks make equally
    many steps.
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
        # resize repeats from the start: the padding described above
        for index in np.resize(order, self.total_size)[self.rank :: self.num_replicas]:
            yield EpochIndex(self.epoch, int(index))


def stratified_sample(labels: Indices, count: int, seed: int) -> Indices:
    """`count` of the positions 0..len(labels)-1, sorted, with the classes in proportion as far as whole numbers allow.

    labels: (N,). Every class gets the floor of its share; what is left goes to the largest remainders, ties by chance.
    Raises ValueError unless 0 <= count <= N.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot take {count} of {len(labels)} images.")
    generator = np.random.default_rng(seed)
    classes, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = sizes * (count / max(len(labels), 1))
    quota = np.floor(share + 1e-9).astype(np.int64)  # 1e-9: 0.3 * 10 is 3, not 2.999...
    by_remainder = np.lexsort((generator.random(len(classes)), -(share - quota).round(9)))
    quota[by_remainder[: count - int(quota.sum())]] += 1
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(class_of[shuffled], kind="stable")]
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    chosen = [by_class[start : start + number] for start, number in zip(starts, quota, strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen])).astype(np.int64)
