"""The measure of a network's sensitivity: a random number whose gradient has the curvature of the loss."""

from __future__ import annotations

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

    Args:
        answers: The float network's answers (N, K) for all images.
        classes: Whether they are logits of classes.
        seed: Seed of the signs.

    Raises:
        ValueError: If an answer is not finite.
    """

    def __init__(self, answers: Tensor, *, classes: bool, seed: int) -> None:
        if not torch.isfinite(answers).all():
            raise ValueError("the network's answers (logits) hold NaN or infinite values; check its weights and images")
        self._signs = torch.Generator().manual_seed(seed)
        self._classes = classes and answers.shape[1] > 1
        self.temperature = 1.0
        if self._classes:
            first, second = answers.float().topk(2).values.unbind(1)
            self.temperature = max(1.0, float((first - second).median()) / _SURE_MARGIN)

    @classmethod
    def of(cls, graph: Graph, network: nn.Module, batches: Sequence[Tensor], *, seed: int) -> Probe:
        """The probe for a network and the images with which it will be used."""
        answers = torch.cat([float_logits(graph, network, images) for images in batches])
        return cls(answers, classes=not graph.embeds, seed=seed)

    def __call__(self, answers: Tensor) -> Tensor:
        """The sum of the function over all images, for differentiable answers (N, K)."""
        sign = torch.randint(0, 2, answers.shape, generator=self._signs).to(answers.device) * 2 - 1
        if not self._classes:
            return (answers.float() * sign).sum()
        log_p = (answers.float() / self.temperature).log_softmax(-1)
        return (log_p * (log_p.detach() / 2).exp() * sign).sum()
