"""Keeps batches of any form, so that other batches can be made of their images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swincompress_pl.callbacks.loaders import fields_of, is_record, leaves


class Rows:
    """Images of kept batches, numbered in the order in which they came.

    A tensor, list or tuple in a batch is taken apart if it has one entry per image. Everything else has to be the same
    in all batches.

    Args:
        max_size_bytes: Largest size of all kept batches.

    Attributes:
        shape: Shape of one image as the network gets it, set by the caller; () until then.
    """

    def __init__(self, max_size_bytes: int) -> None:
        self.shape: tuple[int, ...] = ()
        self._max_size_bytes, self._size_bytes = max_size_bytes, 0
        self._batches: list[tuple[Any, int]] = []  # with the number of images
        self._places: list[tuple[int, int]] = []  # of each image: its batch, its row in there

    def add(self, batch: Any, count: int) -> Tensor:
        """Keeps a batch of `count` images, and returns their numbers (count,).

        Raises a ValueError if the kept batches take too much memory.
        """
        first = len(self._places)
        self._size_bytes += sum(leaf.nbytes for leaf in leaves(batch) if isinstance(leaf, Tensor))
        if self._size_bytes > self._max_size_bytes:
            raise ValueError(
                f"the hold-out takes more than holdout_size_bytes={self._max_size_bytes}: whole batches are kept, "
                "because the validation step makes more of them than the network's answer; allow more bytes, or limit "
                "the validation data (limit_val_batches, a holdout_dataloader() of the datamodule)"
            )
        self._places += [(len(self._batches), row) for row in range(count)]
        self._batches.append((batch, count))
        return torch.arange(first, first + count)

    def batch(self, numbers: Sequence[int]) -> Any:
        """A batch of these images, in the form of the kept batches; a ValueError if they cannot be joined."""
        places = [self._places[number] for number in numbers]
        return self._joined(lambda batch: batch, places, "batch")

    def _joined(self, part: Callable[[Any], Any], places: Sequence[tuple[int, int]], name: str) -> Any:
        """What `part` takes out of a batch, joined for the images at these places."""
        first_batch, count = self._batches[places[0][0]]
        value = part(first_batch)
        if isinstance(value, Tensor):
            if value.ndim and len(value) == count:
                return torch.stack([part(self._batches[batch][0])[row] for batch, row in places])
        elif is_record(value):
            entries = {key: self._joined(_attribute(part, key), places, f"{name}.{key}") for key in fields_of(value)}
            return dataclasses.replace(value, **entries)
        elif isinstance(value, Mapping):
            entries = {key: self._joined(_entry(part, key), places, f"{name}[{key!r}]") for key in value}
            return entries if type(value) is dict else type(value)(entries)  # type: ignore[call-arg]  # as it was made
        elif isinstance(value, list | tuple):
            if len(value) == count and not any(isinstance(each, Tensor) for each in value):
                return type(value)(part(self._batches[batch][0])[row] for batch, row in places)
            parts = [self._joined(_entry(part, place), places, f"{name}[{place}]") for place in range(len(value))]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        self._check_constant(part, places, value, name)
        return value

    def _check_constant(
        self, part: Callable[[Any], Any], places: Sequence[tuple[int, int]], value: Any, name: str
    ) -> None:
        for batch in {batch for batch, _ in places}:
            other = part(self._batches[batch][0])
            if not (torch.equal(value, other) if isinstance(value, Tensor) else value is other or value == other):
                raise ValueError(
                    f"{name} of the validation batches is {type(value).__name__} without one entry per image, and it "
                    "differs from batch to batch, so batches cannot be taken apart for scoring; pass monitor= with a "
                    "metric that your validation_step logs"
                )

    def digest(self) -> str:
        """A digest of the first and the last batch, which tells these images from others."""
        result = hashlib.sha256(repr(self.shape).encode())
        for batch, _ in self._batches[:1] + self._batches[-1:]:
            for leaf in leaves(batch):
                if isinstance(leaf, Tensor):
                    result.update(leaf.detach().cpu().double().numpy().tobytes())
        return result.hexdigest()


def cloned(batch: Any) -> Any:
    """A copy of `batch` with its own tensors, as a step may change what it gets."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if is_record(batch):
        return dataclasses.replace(batch, **{key: cloned(value) for key, value in fields_of(batch).items()})
    if isinstance(batch, Mapping):
        entries = {key: cloned(value) for key, value in batch.items()}
        return entries if type(batch) is dict else type(batch)(entries)  # type: ignore[call-arg]  # as it was made
    if isinstance(batch, list | tuple):
        parts = [cloned(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _attribute(part: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    return lambda batch: getattr(part(batch), name)


def _entry(part: Callable[[Any], Any], key: Any) -> Callable[[Any], Any]:
    return lambda batch: part(batch)[key]
