"""The search for the symmetric scales that cost the network's output least.

Source: the searched scale of the Swin compression paper (methods.md, 1b), in the manner of PTQ4ViT (arXiv 2111.12293).
The candidates lie between 1 % and 120 % of the maximum. The search alternates between a layer's weights and its input,
and minimizes a diagonal Gauss-Newton error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPACING = 1.19 / 100
CANDIDATES = torch.tensor([0.01 + i * SPACING for i in range(101)], dtype=torch.float32)
# Every fourth candidate is tried, then the neighbors of the best one, because the error hardly jumps between them.
_STRIDE = 4
_NEIGHBOURS = [offset * SPACING for offset in range(1 - _STRIDE, _STRIDE) if offset]
ROUNDS = 3
# Exponents tried for equalization: channel ratio = (channel maximum / largest maximum) ** exponent.
EQUALIZATION_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COARSE = (1.0, 0.8, 0.6, 0.45, 0.3)


def fake_quantize(x: Tensor, scale: Tensor, q_max: int, *, signed: bool = True) -> Tensor:
    """The nearest multiples of `scale` within the range of codes, in one fused pass, as the search needs hundreds."""
    zero = torch.zeros((), dtype=torch.int32, device=x.device)
    return torch.fake_quantize_per_tensor_affine(x, scale.to(x), zero, -q_max if signed else 0, q_max)


def max_step(weight: Tensor, q_max: int = 127) -> Tensor:
    """The steps (M,) that put the largest weight of each row at the code `q_max`; 0 for a row of zeros."""
    return weight.flatten(1).abs().amax(1) / q_max


def best_factor(error: Callable[[float], Tensor]) -> float:
    """The candidate of least error among every fourth, and then among the neighbors of the best of these."""
    coarse = [float(factor) for factor in CANDIDATES[::_STRIDE]]
    centre = _widest_of_least(error, coarse)
    fine = [centre, *(factor for offset in _NEIGHBOURS if (factor := centre + offset) >= float(CANDIDATES[0]))]
    return _widest_of_least(error, fine)


def _widest_of_least(error: Callable[[float], Tensor], factors: Sequence[float]) -> float:
    """The factor of least error; among equal errors, the widest range, which clips least."""
    errors = torch.stack([error(factor) for factor in factors]).nan_to_num(nan=torch.inf)
    least = (errors == errors.min()).tolist()
    return max(factor for factor, is_least in zip(factors, least, strict=True) if is_least)


@dataclass(kw_only=True)
class LayerProblem:
    """The search for the scales of one layer: inputs `x` (R, K), `weight` (M, K), `sensitivity` (R, M) of its output.

    `q_max`, `signed` and `magnitude` describe the input's quantizer; without a magnitude the input is exact (pixels).
    `centering`, (K,) or (1,), is the constant in its codes, and `magnitude` is that of the sum. `weight_q_max` is the
    largest code of the weights. `step` (M,) has the steps at which weights are exact; with None they are searched.
    """

    x: Tensor
    weight: Tensor
    sensitivity: Tensor
    magnitude: float | None
    centering: Tensor | None = None
    q_max: int = 127
    signed: bool = True
    weight_q_max: int = 127
    step: Tensor | None = None

    def __post_init__(self) -> None:
        self.target = self.x @ self.weight.T

    def error(self, x: Tensor, weight: Tensor) -> Tensor:
        """The mean squared error of every output channel, weighted by sensitivity, (M,)."""
        return ((x @ weight.T - self.target) * self.sensitivity).square_().mean(0)

    def quantized_weight(self, step: Tensor) -> Tensor:
        """The weight, rounded at these steps."""
        safe = torch.where(step > 0, step, 1.0)
        zero = torch.zeros_like(safe, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(self.weight, safe, zero, 0, -self.weight_q_max, self.weight_q_max)

    def quantized_input(self, scale: float) -> Tensor:
        """The input, rounded at this scale."""
        if self.centering is None:
            return fake_quantize(self.x, torch.tensor(scale), self.q_max, signed=self.signed)
        return (
            fake_quantize(self.x + self.centering, torch.tensor(scale), self.q_max, signed=self.signed) - self.centering
        )

    def best_step(self, x: Tensor) -> Tensor:
        """The steps (M,) of least error for the inputs `x`."""
        if self.step is not None:
            return self.step
        largest = self.weight.abs().amax(1) / (self.weight_q_max + 0.5)
        best, factor = torch.full_like(largest, torch.inf), torch.ones_like(largest)

        def attempt(tried: Tensor) -> None:
            nonlocal best, factor
            error = self.error(x, self.quantized_weight(largest * tried))
            better = (error < best) | ((error == best) & (tried > factor))  # among equal errors, the widest
            best, factor = torch.where(better, error, best), torch.where(better, tried, factor)

        for candidate in CANDIDATES[::_STRIDE]:
            attempt(candidate.to(largest).expand_as(largest))
        centre = factor
        for offset in _NEIGHBOURS:
            attempt((centre + offset).clamp(min=float(CANDIDATES[0])))
        return largest * factor

    def best_scale(self, weight: Tensor) -> float:
        """The input scale of least error for the rounded `weight`."""
        assert self.magnitude is not None
        largest = self.magnitude / (self.q_max + 0.5)
        return largest * best_factor(lambda factor: self.error(self.quantized_input(largest * factor), weight).sum())

    def solve(self) -> tuple[float | None, Tensor]:
        """(input scale, steps (M,)), each chosen in three rounds with the other fixed; no scale for an exact input."""
        step = max_step(self.weight, self.weight_q_max)
        if self.magnitude is None:
            return None, self.best_step(self.x)
        scale = self.magnitude / self.q_max
        for _ in range(ROUNDS):
            step = self.best_step(self.quantized_input(scale))
            scale = self.best_scale(self.quantized_weight(step))
        return scale, step

    def coarse_error(self) -> float:
        """The least error of a few clips, with weight steps by the maximum: a cheap way to compare equalizations."""
        assert self.magnitude is not None
        weight = self.quantized_weight(max_step(self.weight, self.weight_q_max))
        scales = [self.magnitude / self.q_max * factor for factor in _COARSE]
        return min(float(self.error(self.quantized_input(scale), weight).sum()) for scale in scales)


def best_equalization(
    x: Tensor,
    weight: Tensor,
    sensitivity: Tensor,
    bounds: tuple[Tensor, Tensor],
    *,
    center: bool,
    q_max: int = 127,
    weight_q_max: int = 127,
) -> tuple[Tensor, Tensor]:
    """The ratios (K,) of the input channels to the quantizer's scale, and what is added to each before rounding, (K,).

    `bounds` are the least and the largest values, (K,) each. A channel with the ratio r, at most 1, is divided by r
    before rounding, and its column of the weight is multiplied by r. So outlier channels of a LayerNorm output no
    longer set the step of all channels. With `center`, channels may also be centered. Ratios are chosen among powers of
    the channels' reach. Source: RepQ-ViT (arXiv 2212.08254), which puts both into LayerNorm's affine.
    """
    low, high = bounds
    found: list[tuple[float, Tensor, Tensor]] = []
    largest = torch.maximum(high, -low).max()
    for middle in [torch.zeros_like(low), *([(low + high) / 2] if center else [])]:
        reach = torch.maximum(high - middle, middle - low)
        if reach.max() <= largest / 16:  # the channels are constant, so they need no tiny steps
            continue
        relative = (reach / reach.max()).clamp(min=2.0**-10)
        for exponent in EQUALIZATION_EXPONENTS:
            equalization = relative**exponent
            problem = LayerProblem(
                x=x / equalization,
                weight=weight * equalization,
                sensitivity=sensitivity,
                magnitude=float((reach / equalization).max()),
                centering=-middle / equalization,
                q_max=q_max,
                weight_q_max=weight_q_max,
            )
            found.append((problem.coarse_error(), equalization, -middle))
    if not found:
        return torch.ones_like(low), torch.zeros_like(low)
    _, equalization, chosen = min(found, key=lambda entry: entry[0])
    return equalization, chosen


def best_value_scale(values: Tensor, sensitivity: Tensor, *, q_max: int, signed: bool, magnitude: float) -> float:
    """The scale of least weighted error of values that no linear layer reads (q, k, v, the input of GELU)."""
    largest = magnitude / (q_max + 0.5)

    def error(factor: float) -> Tensor:
        rounded = fake_quantize(values, torch.tensor(largest * factor), q_max, signed=signed)
        return ((rounded - values) * sensitivity).square_().mean()

    return largest * best_factor(error)


def best_centered_scale(
    values: Tensor, sensitivity: Tensor, *, q_max: int, bounds: tuple[float, float]
) -> tuple[float, float]:
    """(scale, centering) of values whose codes from -q_max to q_max may stand for the value plus a constant.

    `bounds` are the least and the largest value. Both ends of the range are searched in turn, twice, for the least
    weighted error.
    """
    low, high = bounds

    largest = max(-low, high, torch.finfo(values.dtype).tiny)
    least_width = largest / 4  # constant values need no tiny steps
    unit = 2.0 ** math.frexp(largest)[1]  # squares of errors far below 1 would vanish

    def fit(low: float, high: float) -> tuple[float, float]:
        return max(high - low, least_width) / (2 * q_max), -(low + high) / 2

    def error(low: float, high: float) -> float:
        scale, centering = fit(low, high)
        rounded = fake_quantize(values + centering, torch.tensor(scale), q_max) - centering
        return float(((rounded - values) / unit * sensitivity).square_().mean())

    factors = [float(factor) for factor in CANDIDATES[10::3].flip(0)]  # among equal errors, the widest comes first
    top, bottom = high, low
    for _ in range(2):
        top = min((high * factor for factor in factors), key=lambda end: error(bottom, end)) if high > 0 else high
        bottom = min((low * factor for factor in factors), key=lambda end: error(end, top)) if low < 0 else low
    return fit(bottom, top)
