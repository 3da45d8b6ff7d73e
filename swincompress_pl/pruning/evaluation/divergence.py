"""How far the answers of a changed network are from those that it gave before, on unlabelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.pruning.evaluation.images import check_finite
from swincompress_pl.pruning.evaluation.prefix_cache import PrefixCache
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks

_CACHE_SIZE_BYTES = 1 << 28


class Divergence:
    """Compares a network that is changed on trial with what it was when this was made.

    Args:
        network: The network.
        batches: Images (N, ...), on each rank of a distributed run its own.
        predict: (network, images) -> answers; None calls the network with the images, moved to its device.

    Raises:
        ValueError: If there are no images.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[Tensor],
        *,
        predict: Callable[[nn.Module, Tensor], object] | None = None,
    ) -> None:
        self._batches, self._predict = batches, predict or run_network
        self._images = sum(from_all_ranks(sum(map(len, self._batches))))
        if not self._images:
            raise ValueError("calibration has no images to compare answers on; give at least a hundred")
        self._network, self._cache = network, PrefixCache(network, size_bytes=_CACHE_SIZE_BYTES)
        self._expected = self._answers(0)
        self._comparable = all(isinstance(answer, Tensor) for answer in self._expected)

    def now(self, tensors: Sequence[str]) -> float | None:
        """The mean `distance` per image from the answers that the network gave; None if it gives more than a tensor.

        `tensors` are the names of those in which it differs now; none for anywhere.
        """
        if not self._comparable:
            return None
        found = self._answers(self._cache.depth(tensors))
        summed = sum(float(distance(*pair)) for pair in zip(self._expected, found, strict=True))
        return math.fsum(from_all_ranks(summed)) / self._images

    def _answers(self, depth: int) -> list[Any]:
        with evaluation_mode(self._network), torch.no_grad():
            runs = (
                self._cache.run(number, depth, partial(self._predict, self._network, images))
                for number, images in enumerate(self._batches)
            )
            return [answer for answer, _ in runs]


def distance(before: Tensor, after: Tensor) -> Tensor:
    """The sum over the images of how far answers (N, ...) moved.

    Of logits (N, classes), the Kullback-Leibler divergence of the classes' probabilities, in nats. Of anything else,
    half of the squared change in parts of the variance over the images.
    """
    if before.ndim == 2 and before.shape[1] > 1:
        was, now = before.double().log_softmax(1), after.double().log_softmax(1)
        return (was.exp() * (was - now)).sum()
    was, now = before.double().flatten(1), after.double().flatten(1)
    variance = (was - was.mean(0)).square().sum().clamp_min(torch.finfo(torch.float64).tiny) / len(was)
    return (was - now).square().sum() / variance / 2


def first_images(calibration: Iterable[Any], count: int) -> list[Tensor]:
    """The first `count` images of batches (images, ...) or tensors."""
    found = list[Tensor]()
    for batch in calibration:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        found.append(images[: count - sum(map(len, found))])
        check_finite(f"batch {len(found) - 1} of calibration", found[-1])
        if sum(map(len, found)) == count:
            break
    return [images for images in found if len(images)]


def run_network(network: nn.Module, images: Tensor) -> object:
    """What a network gives of images, moved to its device."""
    device = next((parameter.device for parameter in network.parameters()), images.device)
    return network(images.to(device, non_blocking=True))
