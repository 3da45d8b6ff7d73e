"""Scales of activations and weights, and the quantizers that apply them.

Symmetric ("bias-free") throughout: zero is code 0. The affine variant, kept for comparison with the paper's table,
also has zero-points and exists as a float simulation only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swincompress_pl._deprecated import renamed_attributes
from swincompress_pl.quant.graph.graph import Graph, Node, Quantizer, WeightedNode
from swincompress_pl.quant.graph.quantizer_spec import QuantizerSpec

# A bias of 2**30 accumulator steps is refused at export; learned steps stay twice as large as that asks for.
_BIAS_STEPS = 2.0**29


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names may not contain dots


# Keys of version 0.1 in a state dict, and what they are now.
_OLD_PARTS = {"sites": "activations", "balance": "equalization", "shift": "centering", "drift": "adjustment"}


def _present_key(key: str) -> str:
    """A key of `Scales.state_dict()` as this version spells it. Names of layers have no dots, but other characters."""
    kind, *inner = key.split(".")
    last = [*inner[:-1], _OLD_PARTS.get(inner[-1], inner[-1])] if inner and kind in ("sites", "activations") else inner
    return ".".join([_OLD_PARTS.get(kind, kind), *last])


def weight_key(node: WeightedNode) -> str:
    """The key of a layer's steps in `Scales.calibrated` and `Scales.present`."""
    return f"weights.{_key(node.name)}"


def quantize_weight(weight: Tensor, step: Tensor, q_max: int = 127) -> Tensor:
    """round(weight / step) clamped to [-q_max, q_max], as float; one step per output channel (axis 0).

    -128 is excluded: AVX2's 16-bit pair sums are exact only without it (docs/norm.md). The division runs in float64,
    so that training, export and every device round alike. Raises ValueError for weights that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weights hold NaN or infinite values; retrain or reload the layer")
    wide = weight.double() / step.double().reshape(-1, *[1] * (weight.ndim - 1))
    return torch.floor(wide + 0.5).clamp(-q_max, q_max).to(weight.dtype)


class LearnedStep(torch.autograd.Function):
    """Fake quantization that gives its scale a gradient (LSQ, Esser et al., arXiv 1902.08153).

    x times 1 inside the range and 0 outside; the scale round(x/s) - x/s inside and the clipped code outside, summed to
    its shape and multiplied by `gradient_scale`. One pass forward and one saved tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        """x: any shape; scale: broadcasts against it."""
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.range, ctx.gradient_scale, ctx.shape = (low, high), gradient_scale, scale.shape
        return ratio.round().clamp_(low, high).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """The two gradients."""
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
    """What torch's operators for fake quantization do, to the bit, with a gradient inside the range alone."""
    rounded = (x * scale.reciprocal()).round()
    codes = rounded.clamp(low, high)
    passed = torch.where(rounded == codes, x, 0.0)
    return (codes * scale).detach() + (passed - passed.detach())


class _Adjusted(torch.autograd.Function):
    """base * (a + sqrt(a^2 + 1)) for an adjustment a, which is sinh(log(scale / base)): positive for every a, `base`
    itself at 0, and made of operations that round alike on every device (as an exponential would not).

    Its gradient is divided by base^2, so that a step of plain gradient descent on `adjustment` moves the scale as far
    as LSQ's step on the scale itself does, while Adam moves all scales by the same part of themselves.
    """

    @staticmethod
    def forward(ctx: Any, adjustment: Tensor, base: Tensor) -> Tensor:
        """adjustment, base: (scales,)."""
        wide = adjustment.double()
        root = (wide * wide + 1).sqrt()
        ctx.save_for_backward((1 + wide / root) / base)
        return ((wide + root) * base).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the adjustment alone: base is fixed."""
        (factor,) = ctx.saved_tensors
        return (gradient * factor).to(gradient.dtype), None


@renamed_attributes(site="spec", balance="equalization", shift="centering")
class ActivationQuantizer(nn.Module):
    """An activation quantizer: `scale` (segments,), `equalization` (C,) ratios, `zero_point` (segments,) when affine.

    centering: (C,) of an equalized one, (1,) of another that can center: the codes stand for the values plus this.
    signed: (1,) uint8, so that a state dict says which codes have a sign.

    Everything starts as NaN: one that calibration or a checkpoint never filled is noticed, not used.
    Where scales are learned, `scale` is the calibrated one; `Scales.fixed` gives the present one.
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
        self.register_buffer("scale", torch.full((len(spec.segments),), known))
        if spec.equalized:
            self.register_buffer("equalization", torch.ones(spec.channels))
        self.register_buffer("signed", torch.tensor([spec.signed], dtype=torch.uint8))
        if spec.can_center:
            self.register_buffer("centering", torch.zeros(spec.channels if spec.equalized else 1))
        if affine:
            self.register_buffer("zero_point", torch.zeros(len(spec.segments), dtype=torch.int32))

    def checked_scale(self) -> Tensor:
        # Compiled code cannot raise on a value; evaluation, which is not compiled, does.
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
        """(C,) scale of every channel."""
        scales = self._spread(self.checked_scale())
        return scales * self.equalization if self.spec.equalized else scales

    def learned(self, x: Tensor, scale: Tensor) -> Tensor:
        """Fake quantization with `scale` (segments,) in the place of this one, which gets a gradient."""
        spec = self.spec
        # LSQ's n: the values of one image that share a scale.
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
        """Fake quantization with a straight-through gradient inside the range."""
        if self.spec.can_center and not self.affine:
            return self._rounded(x.float() + self.centering) - self.centering
        return self._rounded(x.float())

    def _rounded(self, x: Tensor) -> Tensor:
        spec = self.spec
        low, high = (-spec.q_max, spec.q_max) if spec.signed else (0, spec.q_max)
        if self.affine and spec.searched:
            low, high = affine_range(spec.bits)
        elif torch.compiler.is_compiling():  # the operators below cannot be traced for batches of every size
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


def affine_range(bits: int) -> tuple[int, int]:
    """Codes with an offset: all 2**bits of them."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class WeightQuantizer(nn.Module):
    """The step of a weight of `bits` per output channel, (M,); with `zero_point` (M,) when affine.

    Where scales are learned, `step` is the calibrated one; `Scales.fixed` gives the present one.
    """

    step: Tensor
    zero_point: Tensor

    def __init__(self, rows: int, *, bits: int, affine: bool) -> None:
        super().__init__()
        self.bits, self.affine = bits, affine
        self.register_buffer("step", torch.full((rows,), math.nan))
        if affine:
            self.register_buffer("zero_point", torch.zeros(rows, dtype=torch.int32))

    @property
    def q_max(self) -> int:
        """Largest symmetric code."""
        return int(2 ** (self.bits - 1) - 1)

    def learned(self, weight: Tensor, step: Tensor) -> Tensor:
        """Fake quantization with `step` (M,) in the place of this one, which gets a gradient."""
        column = step.reshape(-1, *[1] * (weight.ndim - 1))
        gradient_scale = 1 / math.sqrt(max(1, weight[0].numel()) * self.q_max)
        result: Tensor = LearnedStep.apply(weight.float(), column, -self.q_max, self.q_max, gradient_scale)
        return result

    def forward(self, weight: Tensor) -> Tensor:
        zero = self.zero_point if self.affine else torch.zeros_like(self.step, dtype=torch.int32)
        low, high = affine_range(self.bits) if self.affine else (-self.q_max, self.q_max)
        return torch.fake_quantize_per_channel_affine(weight.float(), self.step, zero, 0, low, high)


@renamed_attributes(
    balances="equalizations",
    drift="adjustment",
    site="activation_quantizer",
    site_scale="calibrated_quantizer",
    sites="activations",
    weight_scale="weight_quantizer",
)
class Scales(nn.Module):
    """All scales of a graph; `quantizer()` fake-quantizes activations and weights with them.

    weight_bits: {layer: width of its weights}. adjustment: the one parameter of learned scales, (scales,), after
    `learn`: how far each of the searched activation scales and of the weights' steps has moved from the calibrated one.
    """

    adjustment: nn.Parameter | None

    def __init__(
        self, graph: Graph, network: nn.Module, weight_bits: Mapping[str, int], *, affine: bool = False
    ) -> None:
        super().__init__()
        self.affine = affine
        self.activations = nn.ModuleDict(
            {
                _key(name): ActivationQuantizer(spec, affine=affine)
                for name, spec in graph.quantizers.items()
                if spec.fixed_scale is None
            }
        )
        self.weights = nn.ModuleDict(
            {
                _key(node.name): WeightQuantizer(
                    node.folded_weight(network, None).shape[0], bits=weight_bits[node.name], affine=affine
                )
                for node in graph.weighted_nodes
            }
        )
        self.register_parameter("adjustment", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[prefix + _present_key(key.removeprefix(prefix))] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def retarget(self, graph: Graph) -> None:
        """The same scales for a graph whose quantizers differ in width or sign."""
        for spec in graph.quantizers.values():
            if spec.fixed_scale is None:
                scale = self.calibrated_quantizer(spec)
                scale.spec = spec
                scale.signed.fill_(spec.signed)

    def activation_quantizer(self, spec: QuantizerSpec) -> ActivationQuantizer:
        """The quantizer of this spec; RuntimeError where scales are learned, see `fixed`."""
        self._check_fixed()
        return self.calibrated_quantizer(spec)

    def _check_fixed(self) -> None:
        if self.adjustment is not None:
            raise RuntimeError(
                "the scales are learned, and here they are as calibrated; read QuantizedNetwork.fixed_scales()"
            )

    def calibrated_quantizer(self, spec: QuantizerSpec) -> ActivationQuantizer:
        """The quantizer of this spec, as calibrated where scales are learned; a fixed one is no part of the state."""
        if spec.fixed_scale is not None:
            return ActivationQuantizer(spec, affine=False).to(next(self.buffers()).device)
        module = self.activations[_key(spec.name)]
        assert isinstance(module, ActivationQuantizer)
        return module

    def weight_quantizer(self, node: WeightedNode) -> WeightQuantizer:
        """The width and the calibrated steps of a layer; `step` gives those that count."""
        module = self.weights[_key(node.name)]
        assert isinstance(module, WeightQuantizer)
        return module

    def step(self, node: WeightedNode) -> Tensor:
        """(M,) the steps of a layer; RuntimeError where scales are learned, see `fixed`."""
        self._check_fixed()
        step = self.weight_quantizer(node).step
        if not (torch.isfinite(step).all() and (step > 0).all()):
            raise ValueError(
                "weight steps are missing; calibrate the network (quant.quantize) or load a calibrated checkpoint"
            )
        return step

    @property
    def unsigned(self) -> tuple[str, ...]:
        """The names of the activation quantizers whose codes have no sign, as a loaded state dict says."""
        modules = (module for module in self.activations.values() if isinstance(module, ActivationQuantizer))
        return tuple(module.spec.name for module in modules if not module.signed)

    @property
    def equalizations(self) -> dict[str, Tensor]:
        modules = (module for module in self.activations.values() if isinstance(module, ActivationQuantizer))
        return {module.spec.name: module.equalization for module in modules if module.spec.equalized}

    # Learned scales

    def learn(self) -> None:
        """From now on the activation scales of up to 8 bits and the steps of weights are trained: `adjustment`, from 0.

        Wider ones keep theirs (rounding costs nothing there), and so do the ratios of equalized ones. Doing it twice
        changes nothing. Raises ValueError for affine scales.
        """
        if self.affine:
            raise ValueError("method 'affine' has zero-points, which are not learned; use 'searched' or 'max'")
        if self.adjustment is None:
            calibrated = torch.cat(list(self.calibrated().values()))
            self.adjustment = nn.Parameter(torch.zeros_like(calibrated))

    def present(self) -> dict[str, Tensor]:
        """The learned scales by `activations.<key>` and `weights.<key>`, differentiable; empty where none are."""
        if self.adjustment is None:
            return {}
        calibrated = self.calibrated()
        base = torch.cat(list(calibrated.values()))
        if not (torch.isfinite(base).all() and (base > 0).all() and torch.isfinite(self.adjustment).all()):
            missing = [key for key, value in calibrated.items() if not (torch.isfinite(value) & (value > 0)).all()]
            raise ValueError(
                f"{missing[0] if missing else 'scales.adjustment'} is not finite or not positive; calibrate the "
                "network (quant.quantize), load a checkpoint of a calibrated one, or learn with a smaller "
                "scale_lr_factor"
            )
        values: Tensor = _Adjusted.apply(self.adjustment, base)
        return dict(zip(calibrated, values.split([len(value) for value in calibrated.values()]), strict=True))

    def calibrated(self) -> dict[str, Tensor]:
        """What `adjustment` moves, as it was calibrated, in its order."""
        activations = {
            f"activations.{key}": m.scale
            for key, m in self.activations.items()
            if isinstance(m, ActivationQuantizer) and m.spec.searched
        }
        steps = {f"weights.{key}": m.step for key, m in self.weights.items() if isinstance(m, WeightQuantizer)}
        return activations | steps

    @torch.no_grad()
    def fixed(self, graph: Graph, network: nn.Module) -> Scales:
        """The same with what was learned written into every `scale` and `step`; itself where nothing is learned.

        Steps are raised where the layer's bias would not fit the accumulator.
        """
        if self.adjustment is None:
            return self
        # Not a copy of the module: a parameter that is part of an autograd graph could not be copied.
        result = copy.copy(self)
        result._modules = {name: copy.deepcopy(module) for name, module in self._modules.items()}
        result._parameters = {"adjustment": None}
        for key, value in self.present().items():
            kind, name = key.split(".", 1)
            buffer = "scale" if kind == "activations" else "step"
            getattr(result.get_submodule(kind)[name], buffer).copy_(value)  # type: ignore[index]
        for node in graph.weighted_nodes:
            bias, spec = node.folded_bias(network), graph.spec_of(node.inputs[0])
            in_scale = 1.0 if spec is None else float(result.activation_quantizer(spec).scale[0])
            step = result.weight_quantizer(node).step
            if bias is not None:
                step.copy_(torch.maximum(step, bias.abs() / (in_scale * _BIAS_STEPS)))
            step.copy_(node.settled_step(network, step, in_scale))
        return result

    def quantizer(self) -> Quantizer:
        """What fake-quantizes one pass."""
        return self if self.adjustment is None else _LearnedScales(self, self.present())

    # Quantizer
    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        if spec.bits > 16 or spec.fixed_scale is not None:
            return x  # 2**20 steps to the largest logit, or whole numbers: nothing to learn from
        result: Tensor = self.activation_quantizer(spec)(x)
        return result

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        result: Tensor = self.weight_quantizer(node)(weight)
        return result

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None


class _LearnedScales:
    """A Quantizer for one pass, with the present values of the learned scales."""

    def __init__(self, scales: Scales, present: Mapping[str, Tensor]) -> None:
        self._scales, self._present = scales, present

    @property
    def equalizations(self) -> dict[str, Tensor]:
        return self._scales.equalizations

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        scale = self._present.get(f"activations.{_key(spec.name)}")
        return self._wide(spec, x) if scale is None else self._scales.calibrated_quantizer(spec).learned(x, scale)

    def _wide(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        return x if spec.bits > 16 or spec.fixed_scale is not None else self._scales.calibrated_quantizer(spec)(x)

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return self._scales.weight_quantizer(node).learned(weight, self._present[weight_key(node)])

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None
