"""Finds the batches that a search scores on and that calibration uses, and reads them without disturbing the fit.

A second iterator of a training loader would move what the trainer's own iterator depends on: persistent workers, the
generator or position of a sampler, the state of a dataset. So a copy is read, in which these are copied and the data
are not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_DEPTH = 6  # of datasets, transforms and lists inside each other


def holdout_loaders(trainer: Trainer, callback_name: str) -> list[Iterable[Any]]:
    """The datamodule's `holdout_dataloader()`, or else the trainer's validation data up to its `limit_val_batches`.

    Loaders in a `CombinedLoader` of another mode than "sequential" count as one loader, whose batches hold one of each.
    Raises a ValueError if there is nothing to score on.
    """
    source = getattr(trainer.datamodule, "holdout_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
    if callable(source):
        return [undisturbed(each) for each in as_list(source())]
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # Lightning makes them for the first epoch that validates, or for the sanity check (none after a resume).
        loop.setup_data()
    combined = loop._combined_loader
    if combined is None:
        raise ValueError(
            f"{callback_name} has nothing to score on: give the datamodule a holdout_dataloader(), or the fit "
            "validation data (val_dataloader, and limit_val_batches above 0)"
        )
    limits = [float(limit) for limit in loop._max_batches]
    if combined._mode != "sequential":
        return [limited(undisturbed(combined), max(limits, default=math.inf))]
    return [limited(undisturbed(each), limit) for each, limit in zip(combined.flattened, limits, strict=True)]


def has_validation_data(trainer: Trainer) -> bool:
    """Whether `holdout_loaders` would find any."""
    source = getattr(trainer.datamodule, "holdout_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
    return callable(source) or (trainer.enable_validation and _has_validation_batches(trainer))


def _has_validation_batches(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        loop.setup_data()
    return loop._combined_loader is not None and any(limit > 0 for limit in loop._max_batches)


def calibration_loaders(trainer: Trainer, given: Any, images: int) -> list[Iterable[Any]]:
    """The loaders of the images for calibration and gradients.

    These are `given` (a loader, or a function of the number of images), or else the datamodule's
    `calibration_dataloader(images)`, or else the training data up to its `limit_train_batches`. Raises a ValueError if
    there are none.
    """
    module_of_data = trainer.datamodule  # type: ignore[attr-defined]  # set by the trainer
    source = getattr(module_of_data, "calibration_dataloader", None) if given is None else given
    if callable(source) and not isinstance(source, DataLoader):
        source = source(images)
    if source is not None:
        return [undisturbed(each) for each in as_list(source)]
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        raise ValueError("there are no images to calibrate on; give the fit training data")
    loader = combined.flattened[0] if isinstance(combined.iterables, DataLoader) else combined
    limit = trainer.num_training_batches
    return [limited(undisturbed(loader), float(limit) if limit else math.inf)]


def as_list(loaders: Any) -> list[Iterable[Any]]:
    """One loader, or a list or dictionary of loaders, as a list."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


class Limited:
    """The first `count` batches of `loader`."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.count)


def limited(loader: Iterable[Any], limit: float) -> Iterable[Any]:
    """The first `limit` batches of `loader`, or `loader` itself if it has no more."""
    return Limited(loader, int(limit)) if limit < _length(loader) else loader


def _length(loader: Iterable[Any]) -> float:
    try:
        return len(loader)  # type: ignore[arg-type]  # that is the question
    except (TypeError, RuntimeError, NotImplementedError):  # CombinedLoader has none before it is iterated over
        return math.inf


def sampler_over_ranks(loader: Iterable[Any]) -> DistributedSampler[Any] | None:
    """The sampler, if any, that gives each rank its own images, as Lightning adds it to validation data under DDP."""
    loader = loader.loader if isinstance(loader, Limited | Undisturbed) else loader
    loader = loader.loader if isinstance(loader, Undisturbed) else loader
    if not isinstance(loader, DataLoader):
        return None
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def without_padding(loader: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Yields each batch with the number of images, from its first one on, that count; infinite if all do.

    A `DistributedSampler` repeats images at the end, to give every rank the same number. These do not count.
    """
    sampler = sampler_over_ranks(loader)
    if sampler is None or sampler.drop_last:
        yield from ((batch, math.inf) for batch in loader)
        return
    left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]  # it has one
    for batch in loader:
        yield batch, left
        left = max(0, left - images_in(batch))


def images_in(batch: Any) -> int:
    """The number of images in a batch: the length of its first tensor; 0 if it has none."""
    return next((len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def leaves(batch: Any) -> Iterator[Any]:
    """Yields what a batch holds in its tuples, lists, dictionaries and dataclasses, in order."""
    if is_record(batch):
        batch = fields_of(batch)
    if isinstance(batch, Mapping):
        for part in batch.values():
            yield from leaves(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from leaves(part)
    else:
        yield batch


def is_record(batch: Any) -> bool:
    """Whether `batch` is an instance of a dataclass."""
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def fields_of(record: Any) -> dict[str, Any]:
    """The entries of a dataclass, not copied."""
    return {entry.name: getattr(record, entry.name) for entry in dataclasses.fields(record)}


def described(batch: Any) -> str:
    """The form of a batch, for messages."""
    shapes = [f"{str(leaf.dtype)[6:]} {tuple(leaf.shape)}" for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    named = fields_of(batch) if is_record(batch) else batch
    keys = f" with {', '.join(map(str, named))}" if isinstance(named, Mapping) else ""
    return f"{type(batch).__name__}{keys} of {', '.join(shapes) or 'no tensors'}"


class Undisturbed:
    """A loader, each pass over which reads a fresh copy."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        copied = _copied(self.loader)
        if isinstance(copied, CombinedLoader):  # which numbers its batches
            return (batch for batch, _, _ in copied)
        return iter(copied)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # TypeError as for the loader


def undisturbed(loader: Iterable[Any]) -> Iterable[Any]:
    """Makes `loader` readable beside the fit: a DataLoader or CombinedLoader is copied at each pass.

    Raises a ValueError for a stream that can be read only once.
    """
    if isinstance(loader, DataLoader):
        _refuse_one_pass(loader)
    if isinstance(loader, CombinedLoader):
        for each in loader.flattened:
            undisturbed(each)
    return Undisturbed(loader) if isinstance(loader, DataLoader | CombinedLoader) else loader


def _refuse_one_pass(loader: DataLoader[Any]) -> None:
    if not isinstance(loader.dataset, IterableDataset) or loader.num_workers:  # workers have copies of their own
        return
    for name, value in vars(loader.dataset).items():
        if isinstance(value, Iterator):
            raise ValueError(
                f"{type(loader.dataset).__name__}.{name} is of type {type(value).__name__}, which can be read only "
                "once: images for calibration would be missing in training. Pass calibration_dataloader= with other "
                "images (for scoring, give the datamodule a holdout_dataloader()), or make the iterator in __iter__"
            )


def _copied(loader: Any) -> Iterable[Any]:
    if isinstance(loader, CombinedLoader):
        combined = CombinedLoader(loader.iterables, loader._mode)
        combined.flattened = [_copied(each) for each in loader.flattened]
        return combined
    if not isinstance(loader, DataLoader):
        other: Iterable[Any] = loader
        return other
    result = copy.copy(loader)
    dataset = loader.dataset if loader.num_workers else _with_own_state(loader.dataset)  # workers have their own
    names = ("sampler", "batch_sampler", "generator")
    state = _deep(tuple(vars(loader).get(name) for name in names), {id(loader.dataset): dataset})
    # A DataLoader forbids changing these, for the sake of a running iterator; this one has none.
    vars(result).update(zip(names, state, strict=True), dataset=dataset, _iterator=None, persistent_workers=False)
    return result


def _deep(values: tuple[Any, ...], known: dict[int, Any]) -> tuple[Any, ...]:
    """Deep copies, with `known` as the memo; shallow ones if a deep copy fails."""
    try:
        return copy.deepcopy(values, known)
    except Exception:  # a sampler may hold anything
        return tuple(copy.copy(value) for value in values)


def _with_own_state(value: Any, depth: int = _DEPTH) -> Any:
    """A copy of a dataset or transform, with its own random generators and counters but the same data."""
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    if depth == 0 or isinstance(value, Tensor | np.ndarray | torch.nn.Module | type) or value is None:
        return value
    if type(value) in (list, tuple) and len(value) <= 64:
        return type(value)(_with_own_state(each, depth - 1) for each in value)
    if not isinstance(value, Dataset) and not (callable(value) and hasattr(value, "__dict__")):
        return value
    if not hasattr(value, "__dict__") or hasattr(value, "__code__"):
        return value
    try:
        result = copy.copy(value)
        for name, part in vars(value).items():
            mine = _with_own_state(part, depth - 1)
            if mine is not part:
                vars(result)[name] = mine
    except Exception:  # handles and foreign objects that cannot be copied are shared
        return value
    return result


def given_loaders(loaders: Sequence[Iterable[Any]]) -> list[Any]:
    """The loaders as the user made them, those in a `CombinedLoader` one by one."""
    found: list[Any] = []
    for loader in loaders:
        while isinstance(loader, Limited | Undisturbed):
            loader = loader.loader
        found += loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    return found
