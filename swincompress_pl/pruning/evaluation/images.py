"""Reads the images of a hold-out from batches, and checks them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swincompress_pl.arguments import flag, integer, optional
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, rank, world_size

_GOLDEN = (math.sqrt(5) - 1) / 2
_IMAGES_CHECKED = 64  # at once


class TooLargeError(ValueError):
    """The images take more than `max_size_bytes`.

    Attributes:
        image_size_bytes: Bytes of one image.
        max_images: Number of images over all ranks that do not; 0 if not even one does.
    """

    def __init__(self, max_size_bytes: int, image_size_bytes: int, ranks: int) -> None:
        self.image_size_bytes, self.max_images = image_size_bytes, ranks * (max_size_bytes // image_size_bytes)
        fewer = f"keep max_images={self.max_images}, " if self.max_images else ""
        super().__init__(
            f"the hold-out takes more than max_size_bytes={max_size_bytes}, {image_size_bytes} per image; {fewer}allow "
            "more bytes, or use FunctionScorer(evaluate) with a function that reads the images again each time"
        )


def read_images(
    batches: Iterable[Any],
    *,
    max_images: int | None,
    max_size_bytes: int,
    sharded: bool,
    seed: int = 0,
    needs_labels: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(images, labels) of this rank, as `HoldOut.from_batches` keeps them; empty if no batch has any.

    Unless labels are needed, batches may have images only; the labels are None then.
    """
    most = optional(integer, "max_images", max_images, least=1, wanted="None (all) or 1 or more")
    max_size_bytes = integer("max_size_bytes", max_size_bytes, least=1)
    seed, sharded = integer("seed", seed, least=0), flag("sharded", sharded)
    if sharded and most is not None:
        most = most // world_size() + (rank() < most % world_size())
    return _collect(_rows(batches, needs_labels), most, max_size_bytes, seed, ranks=world_size() if sharded else 1)


def over_ranks(images: Tensor) -> tuple[int, Tensor]:
    """The number of images of all ranks, and the images of this one; without any, an empty tensor of the right shape.

    Raises ValueError on all ranks if none has an image, or two have images of different shapes.
    """
    found = from_all_ranks((len(images), tuple(images.shape[1:])))
    shapes = {shape: number for number, (count, shape) in reversed(list(enumerate(found))) if count}
    if not shapes:
        raise ValueError("the hold-out is empty; give it images to score on")
    if len(shapes) > 1:
        told = " and ".join(f"{shape} (rank {number})" for shape, number in sorted(shapes.items(), key=lambda s: s[1]))
        raise ValueError(f"the ranks' hold-outs have images of different shapes, {told}; bring them to one")
    (shape,) = shapes
    return sum(count for count, _ in found), images if len(images) else images.new_zeros((0, *shape))


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raises ValueError if these are no images with one class for each."""
    if images.ndim < 1 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}: one label for each "
            "image is expected"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of type {labels.dtype}: integers are expected, the class of each image")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} of the hold-out is negative; classes count from 0")
    check_finite("the hold-out", images)


def check_finite(name: str, images: Tensor) -> None:
    """Raises ValueError, naming the first image, where pixels are NaN or infinite.

    Spiking neurons would not show them: a membrane of NaN does not spike.
    """
    if not images.is_floating_point():
        return
    for first in range(0, len(images), _IMAGES_CHECKED):
        few = images[first : first + _IMAGES_CHECKED]
        here = few.isfinite().reshape(len(few), -1).all(1)
        if not bool(here.all()):
            broken = first + int((~here).nonzero()[0])
            raise ValueError(f"image {broken} of {name} holds NaN or infinite pixels; leave it out, or read it again")


def _collect(
    rows: Iterable[tuple[Tensor, int | None]], most: int | None, max_size_bytes: int, seed: int, *, ranks: int
) -> tuple[Tensor, Tensor | None]:
    """The images and labels of `rows`, or `most` of them with the classes in proportion, in their own order.

    `ranks` is the number of ranks that have as many images of their own, for the error.
    """
    # a heap of (-key, place, image, label): the largest key on top
    kept: list[tuple[float, int, Tensor, int | None]] = []
    keys: dict[int | None, float] = {}
    size_bytes = 0
    rng = np.random.default_rng(seed)
    for place, (image, label) in enumerate(rows):
        # Steps of the golden ratio spread evenly: the smallest keys are the same part of each class.
        keys[label] = (keys[label] + _GOLDEN) % 1.0 if label in keys else float(rng.random())
        if most is None or len(kept) < most:
            heapq.heappush(kept, (-keys[label], place, image.clone(), label))
            size_bytes += image.nbytes
        elif most and -kept[0][0] > keys[label]:
            heapq.heapreplace(kept, (-keys[label], place, image.clone(), label))
        if size_bytes > max_size_bytes:
            raise TooLargeError(max_size_bytes, image.nbytes, ranks)
    if not kept:
        return torch.zeros(0), torch.zeros(0, dtype=torch.long)
    kept.sort(key=lambda entry: entry[1])
    images, labels = torch.stack([image for _, _, image, _ in kept]), [label for *_, label in kept]
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise ValueError("some batches of the hold-out have labels and others have none; give all of them or none")
    return images, torch.tensor(known) if known else None


def _rows(batches: Iterable[Any], needs_labels: bool) -> Iterator[tuple[Tensor, int | None]]:
    for batch in batches:
        parts = batch if isinstance(batch, list | tuple) else [batch]
        enough = len(parts) >= 2 if needs_labels else len(parts) >= 1
        if not enough or not all(isinstance(part, Tensor) for part in parts[:2]):
            wanted = "tensors (images, labels, ...)" + ("" if needs_labels else ", or images,")
            raise TypeError(f"the hold-out has a batch of type {type(batch).__name__}; {wanted} are expected")
        images = parts[0]
        if len(parts) == 1:
            yield from ((image, None) for image in images)
            continue
        check_images(images, parts[1])
        yield from zip(images, parts[1].tolist(), strict=True)
