"""All scales of a graph: the calibrated ones, the learned ones, and those that the integers use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swincompress_pl._deprecated import find_old_name, renamed_attributes
from swincompress_pl.quant.graph import Graph, Passthrough, Quantizer, QuantizerSpec, WeightedNode
from swincompress_pl.quant.quantizers import ActivationQuantizer, WeightQuantizer

# Export refuses a bias of 2**30 accumulator steps, so learned steps stay twice as large as that demands.
_BIAS_STEPS = 2.0**29


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names may not contain dots


# Keys of version 0.1 in a state dict, and their present names.
_OLD_PARTS = {"sites": "activations", "balance": "equalization", "shift": "centering", "drift": "adjustment"}


def _present_key(key: str) -> str:
    """A key of `Scales.state_dict()` as this version spells it. The names of layers in it have no dots."""
    kind, *inner = key.split(".")
    last = [*inner[:-1], _OLD_PARTS.get(inner[-1], inner[-1])] if inner and kind in ("sites", "activations") else inner
    return ".".join([_OLD_PARTS.get(kind, kind), *last])


def weight_key(node: WeightedNode) -> str:
    """The key of a layer's steps in `Scales.calibrated` and `Scales.present`."""
    return f"weights.{_key(node.name)}"


class _Adjusted(torch.autograd.Function):
    """The scale base * (a + sqrt(a^2 + 1)) for an adjustment a = sinh(log(scale / base)).

    It is positive for every a, and `base` at 0. Its operations round alike on all devices, which an exponential would
    not. The gradient is divided by base^2. So a step of plain gradient descent on `a` moves the scale as far as a step
    of LSQ on the scale itself, while Adam moves all scales by the same part of themselves.
    """

    @staticmethod
    def forward(ctx: Any, adjustment: Tensor, base: Tensor) -> Tensor:
        """The scales for `adjustment` and `base`, all (scales,)."""
        wide = adjustment.double()
        root = (wide * wide + 1).sqrt()
        ctx.save_for_backward((1 + wide / root) / base)
        return ((wide + root) * base).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of the adjustment only, since `base` is fixed."""
        (factor,) = ctx.saved_tensors
        return (gradient * factor).to(gradient.dtype), None


@renamed_attributes(
    balances="equalizations",
    drift="adjustment",
    site="activation_quantizer",
    site_scale="calibrated_quantizer",
    sites="activations",
    weight_scale="weight_quantizer",
)
class Scales(Passthrough, nn.Module):
    """All scales of a graph; `quantizer()` fake-quantizes activations and weights with them.

    Args:
        graph: The graph.
        network: The network that it describes.
        weight_bits: Maps each layer to the width of its weights.
        affine: Whether the quantizers have zero-points.

    Attributes:
        adjustment: The only parameter of learned scales, (scales,), after `learn`; before, None. It tells how far each
            searched activation scale and each weight step has moved from its calibrated value.
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
        """Takes over the widths and signs of the quantizers of another graph; the scales stay."""
        for spec in graph.quantizers.values():
            if spec.fixed_scale is None:
                scale = self.calibrated_quantizer(spec)
                scale.spec = spec
                scale.signed.fill_(spec.signed)

    def activation_quantizer(self, spec: QuantizerSpec) -> ActivationQuantizer:
        """The quantizer of a spec; a RuntimeError is raised if scales are learned, see `fixed`."""
        self._check_fixed()
        return self.calibrated_quantizer(spec)

    def _check_fixed(self) -> None:
        if self.adjustment is not None:
            raise RuntimeError(
                "the scales are learned, and these are the calibrated ones; read QuantizedNetwork.fixed_scales()"
            )

    def calibrated_quantizer(self, spec: QuantizerSpec) -> ActivationQuantizer:
        """The quantizer of a spec, with the calibrated scale; one with a fixed scale is not part of the state."""
        if spec.fixed_scale is not None:
            return ActivationQuantizer(spec, affine=False).to(next(self.buffers()).device)
        module = self.activations[_key(spec.name)]
        assert isinstance(module, ActivationQuantizer)
        return module

    def weight_quantizer(self, node: WeightedNode) -> WeightQuantizer:
        """The width and the calibrated steps of a layer; `step` returns those that are in use."""
        module = self.weights[_key(node.name)]
        assert isinstance(module, WeightQuantizer)
        return module

    def step(self, node: WeightedNode) -> Tensor:
        """The steps of a layer, (M,).

        A RuntimeError is raised if scales are learned, see `fixed`, and a ValueError if the steps are missing.
        """
        self._check_fixed()
        step = self.weight_quantizer(node).step
        if not (torch.isfinite(step).all() and (step > 0).all()):
            raise ValueError(
                "weight steps are missing; calibrate the network (quant.quantize) or load a calibrated checkpoint"
            )
        return step

    @property
    def unsigned(self) -> tuple[str, ...]:
        """The names of the activation quantizers whose codes have no sign, as in a loaded state dict."""
        modules = (module for module in self.activations.values() if isinstance(module, ActivationQuantizer))
        return tuple(module.spec.name for module in modules if not module.signed)

    @property
    def equalizations(self) -> dict[str, Tensor]:
        """The ratios (C,) of the channels, for each equalized quantizer by name."""
        modules = (module for module in self.activations.values() if isinstance(module, ActivationQuantizer))
        return {module.spec.name: module.equalization for module in modules if module.spec.equalized}

    # Learned scales

    def learn(self) -> None:
        """Makes activation scales of up to 8 bits and weight steps trainable, by `adjustment`, which starts at 0.

        Wider scales stay fixed, because their rounding costs nothing, and so do the ratios of equalized quantizers. A
        second call changes nothing. A ValueError is raised for affine scales.
        """
        if self.affine:
            raise ValueError("method 'affine' has zero-points, which are not learned; use 'searched' or 'max'")
        if self.adjustment is None:
            calibrated = torch.cat(list(self.calibrated().values()))
            self.adjustment = nn.Parameter(torch.zeros_like(calibrated))

    def present(self) -> dict[str, Tensor]:
        """The learned scales by `activations.<key>` and `weights.<key>`, differentiable; empty if none are learned."""
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
        """The calibrated values of the scales that `adjustment` moves, in its order."""
        activations = {
            f"activations.{key}": m.scale
            for key, m in self.activations.items()
            if isinstance(m, ActivationQuantizer) and m.spec.searched
        }
        steps = {f"weights.{key}": m.step for key, m in self.weights.items() if isinstance(m, WeightQuantizer)}
        return activations | steps

    @torch.no_grad()
    def fixed(self, graph: Graph, network: nn.Module) -> Scales:
        """A copy with the learned values in every `scale` and `step`, or these scales if none are learned.

        Steps are raised if the layer's bias would not fit the accumulator.
        """
        if self.adjustment is None:
            return self
        # The module is not copied as a whole, because a parameter that is part of an autograd graph cannot be copied.
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
        """The quantizer for one pass."""
        return self if self.adjustment is None else _LearnedScales(self, self.present())

    # Quantizer
    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        """Fake-quantizes a value."""
        if spec.bits > 16 or spec.fixed_scale is not None:
            return x  # rounding to whole numbers, or to 2**20 steps of logits, would teach nothing
        result: Tensor = self.activation_quantizer(spec)(x)
        return result

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        """Fake-quantizes a folded weight."""
        result: Tensor = self.weight_quantizer(node)(weight)
        return result


class _LearnedScales(Passthrough):
    """The quantizer for one pass, with the present values of the learned scales."""

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


def __getattr__(name: str) -> object:
    return find_old_name("quant.scales", name)
