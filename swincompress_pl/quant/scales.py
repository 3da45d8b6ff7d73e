"""Scales of sites and weights, and the quantizers that apply them.

Symmetric ("bias-free") throughout: zero is code 0. The affine variant, kept for comparison with the paper's table,
also has zero-points and exists as a float simulation only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.graph import Graph, Node, Site, WeightedNode


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names may not contain dots


def quantize_weight(weight: Tensor, step: Tensor, q_max: int = 127) -> Tensor:
    """round(weight / step) clamped to [-q_max, q_max], as float; one step per output channel (axis 0).

    -128 is excluded: AVX2's 16-bit pair sums are exact only without it (docs/norm.md). The division runs in float64,
    so that training, export and every device round alike. Raises ValueError for weights that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weights hold NaN or infinite values; retrain or reload the layer")
    wide = weight.double() / step.double().reshape(-1, *[1] * (weight.ndim - 1))
    return torch.floor(wide + 0.5).clamp(-q_max, q_max).to(weight.dtype)


class SiteScale(nn.Module):
    """The scale of one site: `scale` (segments,), `balance` (C,) ratios, `zero_point` (segments,) when affine.

    Everything starts as NaN: a site that calibration or a checkpoint never filled is noticed, not used.
    """

    scale: Tensor
    balance: Tensor
    zero_point: Tensor

    def __init__(self, site: Site, *, affine: bool) -> None:
        super().__init__()
        self.site, self.affine = site, affine
        self.register_buffer("scale", torch.full((len(site.segments),), math.nan))
        if site.balanced:
            self.register_buffer("balance", torch.ones(site.channels))
        if affine:
            self.register_buffer("zero_point", torch.zeros(len(site.segments), dtype=torch.int32))

    def checked_scale(self) -> Tensor:
        if not (torch.isfinite(self.scale).all() and (self.scale > 0).all()):
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

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization with a straight-through gradient inside the range."""
        site = self.site
        low, high = (-site.q_max, site.q_max) if site.signed else (0, site.q_max)
        if self.affine and site.searched:
            low, high = affine_range(site.bits)
        x = x.float()
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
    """The step of a weight of `bits` per output channel, (M,); with `zero_point` (M,) when affine."""

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

    def forward(self, weight: Tensor) -> Tensor:
        zero = self.zero_point if self.affine else torch.zeros_like(self.step, dtype=torch.int32)
        low, high = affine_range(self.bits) if self.affine else (-self.q_max, self.q_max)
        return torch.fake_quantize_per_channel_affine(weight.float(), self.step, zero, 0, low, high)


class Scales(nn.Module):
    """All scales of a graph; as a `Quantizer` it fake-quantizes activations and weights."""

    def __init__(self, graph: Graph, network: nn.Module, bits: Bits, *, affine: bool = False) -> None:
        super().__init__()
        self.affine = affine
        self.sites = nn.ModuleDict({_key(name): SiteScale(site, affine=affine) for name, site in graph.sites.items()})
        self.weights = nn.ModuleDict(
            {
                _key(node.name): WeightScale(
                    node.folded_weight(network, None).shape[0], bits=bits.of_weight(node, graph), affine=affine
                )
                for node in graph.weighted_nodes
            }
        )

    def retarget(self, graph: Graph) -> None:
        """The same scales for a graph whose sites differ in width or sign."""
        for site in graph.sites.values():
            self.site(site).site = site

    def site(self, site: Site) -> SiteScale:
        module = self.sites[_key(site.name)]
        assert isinstance(module, SiteScale)
        return module

    def weight_scale(self, node: WeightedNode) -> WeightScale:
        module = self.weights[_key(node.name)]
        assert isinstance(module, WeightScale)
        return module

    def step(self, node: WeightedNode) -> Tensor:
        step = self.weight_scale(node).step
        if not (torch.isfinite(step).all() and (step > 0).all()):
            raise ValueError(
                "weight steps are missing; calibrate the network (quant.quantize) or load a calibrated checkpoint"
            )
        return step

    @property
    def balances(self) -> dict[str, Tensor]:
        modules = (module for module in self.sites.values() if isinstance(module, SiteScale))
        return {module.site.name: module.balance for module in modules if module.site.balanced}

    # Quantizer
    def activation(self, site: Site, x: Tensor) -> Tensor:
        if site.bits > 16:
            return x  # 2**20 steps to the largest logit: nothing to learn from
        result: Tensor = self.site(site)(x)
        return result

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        result: Tensor = self.weight_scale(node)(weight)
        return result

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None
