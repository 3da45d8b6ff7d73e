"""Fake quantization of one value or one weight, with its scale.

Quantization is symmetric ("bias-free"): zero is code 0. The affine variant also has zero-points. It exists only as a
float simulation, for a comparison with the paper's table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swincompress_pl._deprecated import renamed_attributes
from swincompress_pl.quant.graph import QuantizerSpec


def quantize_weight(weight: Tensor, step: Tensor, q_max: int = 127) -> Tensor:
    """round(weight / step), clamped to [-q_max, q_max], as floats; one step per output channel (axis 0).

    -128 is excluded, because AVX2's 16-bit sums of pairs are exact only without it (spec.md). The division runs in
    float64, so that training, export and all devices round alike. A ValueError is raised for weights that are not
    finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weights hold NaN or infinite values; retrain or reload the layer")
    wide = weight.double() / step.double().reshape(-1, *[1] * (weight.ndim - 1))
    return torch.floor(wide + 0.5).clamp(-q_max, q_max).to(weight.dtype)


@renamed_attributes(site="spec", balance="equalization", shift="centering")
class ActivationQuantizer(nn.Module):
    """An activation quantizer with its scale.

    The scale starts as NaN, so that one which neither calibration nor a checkpoint has filled is noticed. If scales are
    learned, it is the calibrated one; `Scales.fixed` returns the present one.

    Args:
        spec: What the graph says about the quantizer.
        affine: Whether it has zero-points.

    Attributes:
        scale: Real value of one step, (segments,).
        equalization: Ratios (C,) of the channels to the scale, if the spec is equalized.
        centering: What is added to the values before rounding, if the spec can center: (C,) for an equalized one,
            otherwise (1,).
        signed: Whether the codes have a sign, (1,) uint8, so that a state dict tells it.
        zero_point: Code of zero, (segments,) int32, if affine.
    """

    scale: Tensor
    equalization: Tensor
    centering: Tensor
    signed: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantizerSpec, *, affine: bool) -> None:
        super().__init__()
        self.spec, self.affine = spec, affine
        known = math.nan if spec.fixed_scale is None else spec.fixed_scale
        self.register_buffer("scale", torch.full((len(spec.segments),), known, dtype=torch.float32))
        if spec.equalized:
            self.register_buffer("equalization", torch.ones(spec.channels, dtype=torch.float32))
        self.register_buffer("signed", torch.tensor([spec.signed], dtype=torch.uint8))
        if spec.can_center:
            channels = spec.channels if spec.equalized else 1
            self.register_buffer("centering", torch.zeros(channels, dtype=torch.float32))
        if affine:
            self.register_buffer("zero_point", torch.zeros(len(spec.segments), dtype=torch.int32))

    def checked_scale(self) -> Tensor:
        """The scale; a ValueError is raised if it is missing, not finite or not positive."""
        # Compiled code cannot raise an error about a value, but evaluation, which is not compiled, does.
        if not torch.compiler.is_compiling() and not (torch.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(
                f"activation quantizer {self.spec.name!r} has scale {self.scale.tolist()}; calibrate the network "
                "(quant.quantize) or load a checkpoint of a calibrated one"
            )
        return self.scale

    def _spread(self, per_segment: Tensor) -> Tensor:
        sizes = torch.tensor(self.spec.segments, device=per_segment.device)
        return per_segment.repeat_interleave(sizes, output_size=self.spec.channels)

    def channel_scales(self) -> Tensor:
        """The scale of every channel, with the ratios, (C,)."""
        scales = self._spread(self.checked_scale())
        return scales * self.equalization if self.spec.equalized else scales

    def learned(self, x: Tensor, scale: Tensor) -> Tensor:
        """Fake quantization with `scale` (segments,) in place of the calibrated one; it gets a gradient."""
        spec = self.spec
        # LSQ's n, the number of values of one image that share a scale.
        count = math.prod(x.shape[1:]) / len(spec.segments)
        if len(spec.segments) > 1:
            scale = self._spread(scale)
        if spec.equalized:
            scale = scale * self.equalization
        centered: Tensor = LearnedStep.apply(
            x.float() + self.centering if spec.can_center else x.float(), scale, -spec.q_max if spec.signed else 0,
            spec.q_max, 1 / math.sqrt(max(1.0, count) * spec.q_max),
        )  # fmt: skip
        return centered - self.centering if spec.can_center else centered

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization of (..., C), with a straight-through gradient inside the range."""
        if self.spec.can_center and not self.affine:
            return self._rounded(x.float() + self.centering) - self.centering
        return self._rounded(x.float())

    def _rounded(self, x: Tensor) -> Tensor:
        spec = self.spec
        low, high = (-spec.q_max, spec.q_max) if spec.signed else (0, spec.q_max)
        if self.affine and spec.searched:
            low, high = affine_range(spec.bits)
        elif torch.compiler.is_compiling():  # the operators below cannot be traced for batches of all sizes
            scale = self.channel_scales() if len(spec.segments) > 1 or spec.equalized else self.scale
            return _straight_through(x, scale, low, high)
        if len(spec.segments) == 1 and not spec.equalized:
            zero = self.zero_point[0] if self.affine else torch.zeros((), dtype=torch.int32, device=x.device)
            return torch.fake_quantize_per_tensor_affine(x, self.checked_scale()[0], zero, low, high)
        zeros = (
            self._spread(self.zero_point)
            if self.affine
            else torch.zeros(spec.channels, dtype=torch.int32, device=x.device)
        )
        return torch.fake_quantize_per_channel_affine(x, self.channel_scales(), zeros, x.ndim - 1, low, high)


class WeightQuantizer(nn.Module):
    """A weight quantizer with one step per output channel.

    If scales are learned, `step` is the calibrated one; `Scales.fixed` returns the present one.

    Args:
        rows: Number M of output channels.
        bits: Width of the weights.
        affine: Whether it has zero-points.

    Attributes:
        step: Real value of one step, (M,).
        zero_point: Code of zero, (M,) int32, if affine.
    """

    step: Tensor
    zero_point: Tensor

    def __init__(self, rows: int, *, bits: int, affine: bool) -> None:
        super().__init__()
        self.bits, self.affine = bits, affine
        self.register_buffer("step", torch.full((rows,), math.nan, dtype=torch.float32))
        if affine:
            self.register_buffer("zero_point", torch.zeros(rows, dtype=torch.int32))

    @property
    def q_max(self) -> int:
        """The largest symmetric code."""
        return int(2 ** (self.bits - 1) - 1)

    def learned(self, weight: Tensor, step: Tensor) -> Tensor:
        """Fake quantization with `step` (M,) in place of the calibrated one; it gets a gradient."""
        column = step.reshape(-1, *[1] * (weight.ndim - 1))
        gradient_scale = 1 / math.sqrt(max(1, weight[0].numel()) * self.q_max)
        result: Tensor = LearnedStep.apply(weight.float(), column, -self.q_max, self.q_max, gradient_scale)
        return result

    def forward(self, weight: Tensor) -> Tensor:
        """Fake quantization of (M, ...), with a straight-through gradient inside the range."""
        zero = self.zero_point if self.affine else torch.zeros_like(self.step, dtype=torch.int32)
        low, high = affine_range(self.bits) if self.affine else (-self.q_max, self.q_max)
        return torch.fake_quantize_per_channel_affine(weight.float(), self.step, zero, 0, low, high)


def affine_range(bits: int) -> tuple[int, int]:
    """The least and the largest of all 2**bits codes, for quantization with an offset."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class LearnedStep(torch.autograd.Function):
    """Fake quantization that gives its scale a gradient (LSQ, Esser et al., arXiv 1902.08153).

    The derivative with respect to x is 1 inside the range and 0 outside. With respect to the scale s it is
    round(x / s) - x / s inside and the clipped code outside, summed to the shape of s and multiplied by
    `gradient_scale`. Only one tensor is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        """Fake quantization of `x`, of any shape, with a scale that broadcasts."""
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.range, ctx.gradient_scale, ctx.shape = (low, high), gradient_scale, scale.shape
        return ratio.round().clamp_(low, high).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """The gradients of `x` and of the scale."""
        (ratio,) = ctx.saved_tensors
        rounded = ratio.round()
        codes = rounded.clamp(*ctx.range)
        inside = rounded == codes
        of_x = gradient * inside
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None, None
        of_scale = (
            codes.addcmul_(ratio, inside.to(ratio.dtype), value=-1).mul_(gradient).sum_to_size(ctx.shape)
            * ctx.gradient_scale
        )
        return of_x, of_scale, None, None, None


def _straight_through(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The same as torch's operators for fake quantization, to the bit, with a gradient only inside the range."""
    rounded = (x * scale.reciprocal()).round()
    codes = rounded.clamp(low, high)
    passed = torch.where(rounded == codes, x, 0.0)
    return (codes * scale).detach() + (passed - passed.detach())
