"""The measure of a network's sensitivity: a random number whose gradient has the curvature of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swincompress_pl.quant.graph import Graph, float_logits

# The largest difference between the two likeliest classes, in nats, for the median image. Surer answers are softened to
# it: they would leave the other classes no probability that float32 can differentiate, or let a single image dominate.
_SURE_MARGIN = 16.0


class Probe:
    """A random function of the network's answers whose squared gradient estimates a curvature.

    The expectation of the square is the diagonal of the Gauss-Newton matrix of a divergence from the float answers. The
    gradient of the divergence itself is zero there.

    For classes, the function is sum_k r_k sqrt(p_k) log p_k with random signs r, and the divergence is that of Kullback
    and Leibler. If the network is so sure of most images that probabilities would vanish, one temperature softens all
    of them. For embeddings, and for a single logit, it is sum_k r_k z_k, for the squared error.

    For named outputs, such as feature maps, it is sum_k r_k z_k w_k, for the mean squared error of each output relative
    to its mean square: every output counts the same, however many values it has and however large they are.

    Args:
        answers: The float network's answers (N, K) for all images; a few rows are enough where they are no classes.
        classes: Whether they are logits of classes.
        seed: Seed of the signs.
        weights: The weights (K,) of the answers; None for 1.

    Raises:
        ValueError: If an answer is not finite.
    """

    def __init__(self, answers: Tensor, *, classes: bool, seed: int, weights: Tensor | None = None) -> None:
        if not torch.isfinite(answers).all():
            raise ValueError("the network's answers (logits) hold NaN or infinite values; check its weights and images")
        self._signs = torch.Generator().manual_seed(seed)
        self._classes = classes and answers.shape[1] > 1
        self._weights = weights
        self.temperature = 1.0
        if self._classes:
            first, second = answers.float().topk(2).values.unbind(1)
            self.temperature = max(1.0, float((first - second).median()) / _SURE_MARGIN)

    @classmethod
    def of(cls, graph: Graph, network: nn.Module, batches: Sequence[Tensor], *, seed: int) -> Probe:
        """The probe for a network and the images with which it will be used."""
        if graph.outputs:
            return cls._of_outputs(graph, network, batches, seed=seed)
        answers = torch.cat([float_logits(graph, network, images) for images in batches])
        return cls(answers, classes=not graph.embeds, seed=seed)

    @classmethod
    def _of_outputs(cls, graph: Graph, network: nn.Module, batches: Sequence[Tensor], *, seed: int) -> Probe:
        """The probe for named outputs, without keeping the outputs of all images."""
        sizes = [math.prod(output.shape) for output in graph.outputs]
        squares = torch.zeros(len(sizes), dtype=torch.float64)
        for images in batches:
            answers = float_logits(graph, network, images)
            squares += torch.stack([part.double().square().sum().cpu() for part in answers.split(sizes, dim=1)])
        count = sum(len(images) for images in batches)
        # the sum of an output's squares is n images times its mean square; the weight is one over its root
        norms = (squares / count).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        weights = torch.cat([(1 / norm).float().expand(size) for norm, size in zip(norms, sizes, strict=True)])
        if not torch.isfinite(squares).all():
            answers = answers.new_full((1, 1), torch.nan)
        return cls(answers, classes=False, seed=seed, weights=weights)

    def __call__(self, answers: Tensor) -> Tensor:
        """The sum of the function over all images, for differentiable answers (N, K)."""
        sign = torch.randint(0, 2, answers.shape, generator=self._signs).to(answers.device) * 2 - 1
        if not self._classes:
            signed = answers.float() * sign
            return (signed if self._weights is None else signed * self._weights.to(signed.device)).sum()
        log_p = (answers.float() / self.temperature).log_softmax(-1)
        return (log_p * (log_p.detach() / 2).exp() * sign).sum()
