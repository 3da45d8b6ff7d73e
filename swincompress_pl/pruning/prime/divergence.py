"""How far a network's answers are from those of the unpruned one, on unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swincompress_pl.evaluation_mode import evaluation_mode


class Divergence:
    """Compares networks with the one that it was made of.

    Args:
        network: The network before pruning.
        calibration: Batches (images, ...) or tensors of images.
        max_images: Number of images that are used, the first ones.
    """

    def __init__(self, network: nn.Module, calibration: Iterable[Any], *, max_images: int) -> None:
        self._batches = _first_images(calibration, max_images)
        if not self._batches:
            raise ValueError("curves='divergence': calibration has no images; give at least a hundred")
        self._expected = [answer.log_softmax(1) for answer in self._answers(network)]

    def of(self, network: nn.Module) -> float:
        """The mean Kullback-Leibler divergence per image from the unpruned network's answers, in nats."""
        summed = 0.0
        for expected, answer in zip(self._expected, self._answers(network), strict=True):
            summed += float(functional.kl_div(answer.log_softmax(1), expected, log_target=True, reduction="sum"))
        return summed / sum(map(len, self._batches))

    def _answers(self, network: nn.Module) -> list[Tensor]:
        device = next(network.parameters()).device
        with evaluation_mode(network), torch.no_grad():
            return [network(images.to(device)).double() for images in self._batches]


def _first_images(calibration: Iterable[Any], count: int) -> Sequence[Tensor]:
    found = list[Tensor]()
    for batch in calibration:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        found.append(images[: count - sum(map(len, found))])
        if sum(map(len, found)) == count:
            break
    return [images for images in found if len(images)]
