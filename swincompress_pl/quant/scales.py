"""Scales of sites and weights, and the quantizers that apply them.

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

from swincompress_pl.quant.graph.graph import Graph, Node, Quantizer, WeightedNode
from swincompress_pl.quant.graph.quantizer_spec import Site

# A bias of 2**30 accumulator steps is refused at export; learned steps stay twice as large as that asks for.
_BIAS_STEPS = 2.0**29


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names may not contain dots


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


class _Drifted(torch.autograd.Function):
    """base * (drift + sqrt(drift^2 + 1)): positive for every drift, `base` itself at 0, and made of operations that
    round alike on every device (as an exponential would not).

    Its gradient is divided by base^2, so that a step of plain gradient descent on `drift` moves the scale as far as
    LSQ's step on the scale itself does, while Adam moves all scales by the same part of themselves.
    """

    @staticmethod
    def forward(ctx: Any, drift: Tensor, base: Tensor) -> Tensor:
        """drift, base: (scales,)."""
        wide = drift.double()
        root = (wide * wide + 1).sqrt()
        ctx.save_for_backward((1 + wide / root) / base)
        return ((wide + root) * base).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the drift alone: base is fixed."""
        (factor,) = ctx.saved_tensors
        return (gradient * factor).to(gradient.dtype), None


class SiteScale(nn.Module):
    """The scale of one site: `scale` (segments,), `balance` (C,) ratios, `zero_point` (segments,) when affine.

    shift: (C,) of a balanced site, (1,) of another that is shiftable: the codes stand for the values plus this.
    signed: (1,) uint8, so that a state dict says which codes have a sign.

    Everything starts as NaN: a site that calibration or a checkpoint never filled is noticed, not used.
    Where scales are learned, `scale` is the calibrated one; `Scales.fixed` gives the present one.
    """

    scale: Tensor
    balance: Tensor
    shift: Tensor
    signed: Tensor
    zero_point: Tensor

    def __init__(self, site: Site, *, affine: bool) -> None:
        super().__init__()
        self.site, self.affine = site, affine
        known = math.nan if site.fixed_scale is None else site.fixed_scale
        self.register_buffer("scale", torch.full((len(site.segments),), known))
        if site.balanced:
            self.register_buffer("balance", torch.ones(site.channels))
        self.register_buffer("signed", torch.tensor([site.signed], dtype=torch.uint8))
        if site.shiftable:
            self.register_buffer("shift", torch.zeros(site.channels if site.balanced else 1))
        if affine:
            self.register_buffer("zero_point", torch.zeros(len(site.segments), dtype=torch.int32))

    def checked_scale(self) -> Tensor:
        # Compiled code cannot raise on a value; evaluation, which is not compiled, does.
        if not torch.compiler.is_compiling() and not (torch.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(
                f"site {self.site.name!r} has scale {self.scale.tolist()}; calibrate the network (quant.quantize) or "
                "load a checkpoint of a calibrated one"
            )
        return self.scale

    def _spread(self, per_segment: Tensor) -> Tensor:
        sizes = torch.tensor(self.site.segments, device=per_segment.device)
        return per_segment.repeat_interleave(sizes, output_size=self.site.channels)

    def channel_scales(self) -> Tensor:
        """(C,) scale of every channel."""
        scales = self._spread(self.checked_scale())
        return scales * self.balance if self.site.balanced else scales

    def learned(self, x: Tensor, scale: Tensor) -> Tensor:
        """Fake quantization with `scale` (segments,) in the place of this one, which gets a gradient."""
        site = self.site
        # LSQ's n: the values of one image that share a scale.
        count = math.prod(x.shape[1:]) / len(site.segments)
        if len(site.segments) > 1:
            scale = self._spread(scale)
        if site.balanced:
            scale = scale * self.balance
        shifted: Tensor = LearnedStep.apply(
            x.float() + self.shift if site.shiftable else x.float(), scale, -site.q_max if site.signed else 0,
            site.q_max, 1 / math.sqrt(max(1.0, count) * site.q_max),
        )  # fmt: skip
        return shifted - self.shift if site.shiftable else shifted

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization with a straight-through gradient inside the range."""
        if self.site.shiftable and not self.affine:
            return self._rounded(x.float() + self.shift) - self.shift
        return self._rounded(x.float())

    def _rounded(self, x: Tensor) -> Tensor:
        site = self.site
        low, high = (-site.q_max, site.q_max) if site.signed else (0, site.q_max)
        if self.affine and site.searched:
            low, high = affine_range(site.bits)
        elif torch.compiler.is_compiling():  # the operators below cannot be traced for batches of every size
            scale = self.channel_scales() if len(site.segments) > 1 or site.balanced else self.scale
            return _straight_through(x, scale, low, high)
        if len(site.segments) == 1 and not site.balanced:
            zero = self.zero_point[0] if self.affine else torch.zeros((), dtype=torch.int32, device=x.device)
            return torch.fake_quantize_per_tensor_affine(x, self.checked_scale()[0], zero, low, high)
        zeros = (
            self._spread(self.zero_point)
            if self.affine
            else torch.zeros(site.channels, dtype=torch.int32, device=x.device)
        )
        return torch.fake_quantize_per_channel_affine(x, self.channel_scales(), zeros, x.ndim - 1, low, high)


def affine_range(bits: int) -> tuple[int, int]:
    """Codes with an offset: all 2**bits of them."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class WeightScale(nn.Module):
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


class Scales(nn.Module):
    """All scales of a graph; `quantizer()` fake-quantizes activations and weights with them.

    weight_bits: {layer: width of its weights}. drift: the one parameter of learned scales, (scales,), after `learn`:
    how far each of the searched sites' scales and of the weights' steps has moved from the calibrated one.
    """

    drift: nn.Parameter | None

    def __init__(
        self, graph: Graph, network: nn.Module, weight_bits: Mapping[str, int], *, affine: bool = False
    ) -> None:
        super().__init__()
        self.affine = affine
        self.sites = nn.ModuleDict(
            {
                _key(name): SiteScale(site, affine=affine)
                for name, site in graph.sites.items()
                if site.fixed_scale is None
            }
        )
        self.weights = nn.ModuleDict(
            {
                _key(node.name): WeightScale(
                    node.folded_weight(network, None).shape[0], bits=weight_bits[node.name], affine=affine
                )
                for node in graph.weighted_nodes
            }
        )
        self.register_parameter("drift", None)

    def retarget(self, graph: Graph) -> None:
        """The same scales for a graph whose sites differ in width or sign."""
        for site in graph.sites.values():
            if site.fixed_scale is None:
                scale = self.site_scale(site)
                scale.site = site
                scale.signed.fill_(site.signed)

    def site(self, site: Site) -> SiteScale:
        """The scale of a site; RuntimeError where scales are learned, see `fixed`."""
        self._check_fixed()
        return self.site_scale(site)

    def _check_fixed(self) -> None:
        if self.drift is not None:
            raise RuntimeError(
                "the scales are learned, and here they are as calibrated; read QuantizedNetwork.fixed_scales()"
            )

    def site_scale(self, site: Site) -> SiteScale:
        """The scale of a site, as calibrated where scales are learned; a fixed one is no part of the state."""
        if site.fixed_scale is not None:
            return SiteScale(site, affine=False).to(next(self.buffers()).device)
        module = self.sites[_key(site.name)]
        assert isinstance(module, SiteScale)
        return module

    def weight_scale(self, node: WeightedNode) -> WeightScale:
        """The width and the calibrated steps of a layer; `step` gives those that count."""
        module = self.weights[_key(node.name)]
        assert isinstance(module, WeightScale)
        return module

    def step(self, node: WeightedNode) -> Tensor:
        """(M,) the steps of a layer; RuntimeError where scales are learned, see `fixed`."""
        self._check_fixed()
        step = self.weight_scale(node).step
        if not (torch.isfinite(step).all() and (step > 0).all()):
            raise ValueError(
                "weight steps are missing; calibrate the network (quant.quantize) or load a calibrated checkpoint"
            )
        return step

    @property
    def unsigned(self) -> tuple[str, ...]:
        """The names of the sites whose codes have no sign, as a loaded state dict says."""
        modules = (module for module in self.sites.values() if isinstance(module, SiteScale))
        return tuple(module.site.name for module in modules if not module.signed)

    @property
    def balances(self) -> dict[str, Tensor]:
        modules = (module for module in self.sites.values() if isinstance(module, SiteScale))
        return {module.site.name: module.balance for module in modules if module.site.balanced}

    # Learned scales

    def learn(self) -> None:
        """From now on the scales of sites of up to 8 bits and the steps of weights are trained: `drift`, from 0.

        Wider sites keep theirs (rounding costs nothing there), and so do the ratios of balanced ones. Doing it twice
        changes nothing. Raises ValueError for affine scales.
        """
        if self.affine:
            raise ValueError("method 'affine' has zero-points, which are not learned; use 'searched' or 'max'")
        if self.drift is None:
            calibrated = torch.cat(list(self.calibrated().values()))
            self.drift = nn.Parameter(torch.zeros_like(calibrated))

    def present(self) -> dict[str, Tensor]:
        """The learned scales by `sites.<key>` and `weights.<key>`, differentiable; empty where none are learned."""
        if self.drift is None:
            return {}
        calibrated = self.calibrated()
        base = torch.cat(list(calibrated.values()))
        if not (torch.isfinite(base).all() and (base > 0).all() and torch.isfinite(self.drift).all()):
            missing = [key for key, value in calibrated.items() if not (torch.isfinite(value) & (value > 0)).all()]
            raise ValueError(
                f"{missing[0] if missing else 'scales.drift'} is not finite or not positive; calibrate the network "
                "(quant.quantize), load a checkpoint of a calibrated one, or learn with a smaller scale_lr_factor"
            )
        values: Tensor = _Drifted.apply(self.drift, base)
        return dict(zip(calibrated, values.split([len(value) for value in calibrated.values()]), strict=True))

    def calibrated(self) -> dict[str, Tensor]:
        """What `drift` moves, as it was calibrated, in its order."""
        sites = {
            f"sites.{key}": m.scale for key, m in self.sites.items() if isinstance(m, SiteScale) and m.site.searched
        }
        steps = {f"weights.{key}": m.step for key, m in self.weights.items() if isinstance(m, WeightScale)}
        return sites | steps

    @torch.no_grad()
    def fixed(self, graph: Graph, network: nn.Module) -> Scales:
        """The same with what was learned written into every `scale` and `step`; itself where nothing is learned.

        Steps are raised where the layer's bias would not fit the accumulator.
        """
        if self.drift is None:
            return self
        # Not a copy of the module: a parameter that is part of an autograd graph could not be copied.
        result = copy.copy(self)
        result._modules = {name: copy.deepcopy(module) for name, module in self._modules.items()}
        result._parameters = {"drift": None}
        for key, value in self.present().items():
            kind, name = key.split(".", 1)
            getattr(result.get_submodule(kind)[name], "scale" if kind == "sites" else "step").copy_(value)  # type: ignore[index]
        for node in graph.weighted_nodes:
            bias, site = node.folded_bias(network), graph.site_of(node.inputs[0])
            in_scale = 1.0 if site is None else float(result.site(site).scale[0])
            step = result.weight_scale(node).step
            if bias is not None:
                step.copy_(torch.maximum(step, bias.abs() / (in_scale * _BIAS_STEPS)))
            step.copy_(node.settled_step(network, step, in_scale))
        return result

    def quantizer(self) -> Quantizer:
        """What fake-quantizes one pass."""
        return self if self.drift is None else _LearnedScales(self, self.present())

    # Quantizer
    def activation(self, site: Site, x: Tensor) -> Tensor:
        if site.bits > 16 or site.fixed_scale is not None:
            return x  # 2**20 steps to the largest logit, or whole numbers: nothing to learn from
        result: Tensor = self.site(site)(x)
        return result

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        result: Tensor = self.weight_scale(node)(weight)
        return result

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None


class _LearnedScales:
    """A Quantizer for one pass, with the present values of the learned scales."""

    def __init__(self, scales: Scales, present: Mapping[str, Tensor]) -> None:
        self._scales, self._present = scales, present

    @property
    def balances(self) -> dict[str, Tensor]:
        return self._scales.balances

    def activation(self, site: Site, x: Tensor) -> Tensor:
        scale = self._present.get(f"sites.{_key(site.name)}")
        return self._wide(site, x) if scale is None else self._scales.site_scale(site).learned(x, scale)

    def _wide(self, site: Site, x: Tensor) -> Tensor:
        return x if site.bits > 16 or site.fixed_scale is not None else self._scales.site_scale(site)(x)

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return self._scales.weight_scale(node).learned(weight, self._present[weight_key(node)])

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None
