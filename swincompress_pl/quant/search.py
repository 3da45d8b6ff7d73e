"""The search for symmetric scales that cost the network's output least.

Source: the searched scale of the Swin compression paper (docs/methods.md 1b), decided after PTQ4ViT (arXiv
2111.12293): candidates between 1 % and 120 % of the maximum, alternating between a layer's weights and its input,
under a diagonal Gauss-Newton error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = torch.tensor([0.01 + i * 1.19 / 100 for i in range(101)])
ROUNDS = 3
# Exponents tried for balancing: channel ratio = (channel maximum / largest maximum) ** exponent.
BALANCE_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COARSE = (1.0, 0.8, 0.6, 0.45, 0.3)


def fake_quantize(x: Tensor, scale: Tensor, q_max: int, *, signed: bool = True) -> Tensor:
    """Nearest multiple of `scale` within the code range; one fused pass, since the search makes hundreds."""
    zero = torch.zeros((), dtype=torch.int32, device=x.device)
    return torch.fake_quantize_per_tensor_affine(x, scale.to(x), zero, -q_max if signed else 0, q_max)


def max_step(weight: Tensor, q_max: int = 127) -> Tensor:
    """(M,) the step that puts each row's largest weight at code `q_max`; 0 for a row of zeros."""
    return weight.flatten(1).abs().amax(1) / q_max


@dataclass(kw_only=True)
class LayerProblem:
    """One layer's scales to find: x (R, K) inputs, weight (M, K), sensitivity (R, M) of its output.

    `q_max`, `signed` and `magnitude` describe the input site; magnitude None: the input is exact (pixels).
    weight_q_max: largest code of the weights.
    """

    x: Tensor
    weight: Tensor
    sensitivity: Tensor
    magnitude: float | None
    q_max: int = 127
    signed: bool = True
    weight_q_max: int = 127

    def __post_init__(self) -> None:
        self.target = self.x @ self.weight.T

    def error(self, x: Tensor, weight: Tensor) -> Tensor:
        """(M,) mean squared output error of every channel, weighted by sensitivity."""
        return ((x @ weight.T - self.target) * self.sensitivity).square_().mean(0)

    def quantized_weight(self, step: Tensor) -> Tensor:
        safe = torch.where(step > 0, step, 1.0)
        zero = torch.zeros_like(safe, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(self.weight, safe, zero, 0, -self.weight_q_max, self.weight_q_max)

    def quantized_input(self, scale: float) -> Tensor:
        return fake_quantize(self.x, torch.tensor(scale), self.q_max, signed=self.signed)

    def best_step(self, x: Tensor) -> Tensor:
        largest = self.weight.abs().amax(1) / (self.weight_q_max + 0.5)
        best = torch.full_like(largest, torch.inf)
        step = largest.clone()
        for factor in CANDIDATES.to(largest):
            candidate = largest * factor
            error = self.error(x, self.quantized_weight(candidate))
            better = error < best
            best, step = torch.where(better, error, best), torch.where(better, candidate, step)
        return step

    def best_scale(self, weight: Tensor) -> float:
        assert self.magnitude is not None
        largest = self.magnitude / (self.q_max + 0.5)
        scales = [largest * float(factor) for factor in CANDIDATES]
        errors = torch.stack([self.error(self.quantized_input(scale), weight).sum() for scale in scales])
        return scales[int(errors.argmin())]

    def solve(self) -> tuple[float | None, Tensor]:
        """(input scale, step (M,)), each chosen with the other fixed, three rounds."""
        step = max_step(self.weight, self.weight_q_max)
        if self.magnitude is None:
            return None, self.best_step(self.x)
        scale = self.magnitude / self.q_max
        for _ in range(ROUNDS):
            step = self.best_step(self.quantized_input(scale))
            scale = self.best_scale(self.quantized_weight(step))
        return scale, step

    def coarse_error(self) -> float:
        """The error of the better of a few clips at maximal weight steps: to compare balancings cheaply."""
        assert self.magnitude is not None
        weight = self.quantized_weight(max_step(self.weight, self.weight_q_max))
        scales = [self.magnitude / self.q_max * factor for factor in _COARSE]
        return min(float(self.error(self.quantized_input(scale), weight).sum()) for scale in scales)


def best_balance(
    x: Tensor,
    weight: Tensor,
    sensitivity: Tensor,
    channel_magnitude: Tensor,
    *,
    q_max: int = 127,
    weight_q_max: int = 127,
) -> Tensor:
    """(K,) ratios of the input channels to the site's scale, at most 1, chosen among powers of the channel maxima.

    A channel with ratio r is divided by r before rounding and its weight column multiplied by it: outlier channels of a
    LayerNorm output then no longer set everyone's step (in the manner of RepQ-ViT, arXiv 2212.08254).
    """
    largest = channel_magnitude.max()
    if largest == 0:
        return torch.ones_like(channel_magnitude)
    relative = (channel_magnitude / largest).clamp(min=2.0**-10)
    balances = [relative**exponent for exponent in BALANCE_EXPONENTS]
    errors = []
    for balance in balances:
        problem = LayerProblem(
            x=x / balance,
            weight=weight * balance,
            sensitivity=sensitivity,
            magnitude=float((channel_magnitude / balance).max()),
            q_max=q_max,
            weight_q_max=weight_q_max,
        )
        errors.append(problem.coarse_error())
    return balances[errors.index(min(errors))]


def best_value_scale(values: Tensor, sensitivity: Tensor, *, q_max: int, signed: bool, magnitude: float) -> float:
    """The scale of values that feed no linear layer (q, k, v, the input of GELU): least weighted error of the
    values."""
    largest = magnitude / (q_max + 0.5)
    scales = [largest * float(factor) for factor in CANDIDATES]
    errors = [
        (((fake_quantize(values, torch.tensor(scale), q_max, signed=signed) - values) * sensitivity) ** 2).mean()
        for scale in scales
    ]
    return scales[int(torch.stack(errors).argmin())]
