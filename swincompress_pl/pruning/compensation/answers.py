"""How far a changed network's answers are from those that it gave before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from swincompress_pl.pruning.compensation.readers import Predict
from swincompress_pl.pruning.evaluation.ranks import world_size

_MOST_IMAGES = 64


class Answers:
    """The answers of a network to some of the calibration images, to compare later ones with.

    Args:
        batches: Images (N, ...).
        predict: Runs the network on a batch.
    """

    def __init__(self, batches: Sequence[Tensor], predict: Predict) -> None:
        self._predict, self._before = predict, list[Tensor]()
        most = max(1, _MOST_IMAGES // len(batches))  # of each batch, in case they are sorted
        self._batches = [batch[:most] for batch in batches[:_MOST_IMAGES]]

    @torch.no_grad()
    def remember(self, network: nn.Module) -> None:
        """Takes the network's present answers as those to compare with."""
        found = [self._predict(network, batch) for batch in self._batches]
        self._before = [each for each in found if isinstance(each, Tensor)]
        if len(self._before) < len(found):
            self._before = []

    @torch.no_grad()
    def moved(self, network: nn.Module) -> float | None:
        """The mean `distance` of the network's present answers; None if it does not give one tensor."""
        if not self._before:
            return None
        total = sum(
            float(distance(before, after)) if isinstance(after := self._predict(network, batch), Tensor) else 0.0
            for batch, before in zip(self._batches, self._before, strict=True)
        )
        counts = torch.tensor([total, sum(map(len, self._before))], dtype=torch.float64, device=self._before[0].device)
        if world_size() > 1:
            distributed.all_reduce(counts)
        return float(counts[0] / counts[1])


def distance(before: Tensor, after: Tensor) -> Tensor:
    """The sum over the images of how far answers (N, ...) moved.

    Of logits (N, classes), the Kullback-Leibler divergence of the classes' probabilities, in nats; of anything else,
    half of the squared change in parts of the variance over the images.
    """
    if before.ndim == 2 and before.shape[1] > 1:
        was, now = before.double().log_softmax(1), after.double().log_softmax(1)
        return (was.exp() * (was - now)).sum()
    was, now = before.double().flatten(1), after.double().flatten(1)
    variance = (was - was.mean(0)).square().sum().clamp_min(torch.finfo(torch.float64).tiny) / len(was)
    return (was - now).square().sum() / variance / 2
