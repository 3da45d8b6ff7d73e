"""What the sensitivity of a network's output is measured with: a number whose gradient has the output's curvature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swincompress_pl.quant.graph import Graph, float_logits

# Between the two likeliest classes, in nats, for the median image. Surer answers leave the others no probability that
# float32 could differentiate, or one image all that counts; they are softened to this.
_SURE_MARGIN = 16.0


class Probe:
    """A random number of the network's answers; the square of its gradient has the diagonal of the Gauss-Newton matrix
    of a divergence from the float answers as its expectation (the gradient of that itself is zero there).

    Classes: sum_k r_k sqrt(p_k) log p_k with random signs r, for the KL divergence. The probabilities p are softened by
    one temperature for all images where the network is so sure of most that they would vanish. Embeddings, and a
    single logit, of which nobody knows whether it is a probability's: sum_k r_k z_k, for the squared error.

    answers: (N, K) of the float network, all images. Raises ValueError where they are not finite.
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
        """For a network and the images that it will be probed on."""
        answers = torch.cat([float_logits(graph, network, images) for images in batches])
        return cls(answers, classes=not graph.embeds, seed=seed)

    def __call__(self, answers: Tensor) -> Tensor:
        """answers: (N, K), differentiable. The sum over all images."""
        sign = torch.randint(0, 2, answers.shape, generator=self._signs).to(answers.device) * 2 - 1
        if not self._classes:
            return (answers.float() * sign).sum()
        log_p = (answers.float() / self.temperature).log_softmax(-1)
        return (log_p * (log_p.detach() / 2).exp() * sign).sum()
