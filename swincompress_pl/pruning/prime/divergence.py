"""How far the answers of a pruned network are from those before pruning, on unlabelled images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.pruning.evaluation.prefix_cache import PrefixCache
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks

_CACHE_SIZE_BYTES = 1 << 28


class Divergence:
    """Compares a network that is changed with what it was when this was made.

    Args:
        network: The network.
        calibration: Batches (images, ...) or tensors of images, on each rank of a distributed run its own.
        max_images: Number of images that are used on each rank, the first ones.

    Raises:
        ValueError: If there are no images.
    """

    def __init__(self, network: nn.Module, calibration: Iterable[Any], *, max_images: int) -> None:
        self._batches = _first_images(calibration, max_images)
        self._images = sum(from_all_ranks(sum(map(len, self._batches))))
        if not self._images:
            raise ValueError("curves='divergence': calibration has no images; give at least a hundred")
        self._network, self._cache = network, PrefixCache(network, size_bytes=_CACHE_SIZE_BYTES)
        self._expected = [answer.log_softmax(1) for answer in self._answers(0)]

    def now(self, tensors: Sequence[str]) -> float:
        """The mean Kullback-Leibler divergence per image from the answers that the network gave, in nats.

        `tensors` are the names of those in which it differs now; none for anywhere.
        """
        summed = 0.0
        for expected, answer in zip(self._expected, self._answers(self._cache.depth(tensors)), strict=True):
            summed += float(functional.kl_div(answer.log_softmax(1), expected, log_target=True, reduction="sum"))
        return math.fsum(from_all_ranks(summed)) / self._images

    def _answers(self, depth: int) -> list[Tensor]:
        with evaluation_mode(self._network), torch.no_grad():
            runs = (self._cache.run(n, depth, partial(self._answer, images)) for n, images in enumerate(self._batches))
            return [answer for answer, _ in runs]

    def _answer(self, images: Tensor) -> Tensor:
        answer: Tensor = self._network(images.to(next(self._network.parameters()).device))
        return answer.double()


def _first_images(calibration: Iterable[Any], count: int) -> Sequence[Tensor]:
    found = list[Tensor]()
    for batch in calibration:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        found.append(images[: count - sum(map(len, found))])
        if sum(map(len, found)) == count:
            break
    return [images for images in found if len(images)]
