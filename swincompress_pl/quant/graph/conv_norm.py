"""Convolutions of spiking networks with the BatchNorms after them, as one graph node; see `nodes.py`.

Values are channels-last: (N, H, W, C) before the first neuron, and (N, T, H, W, C) after it. BatchNorms are folded into
the layer before them, with their running statistics. In training, unless they are in `eval()`, they normalize by the
batch and update these statistics, as elsewhere in torch. The weight is then folded, rounded, and unfolded again before
the convolution. Source of the folding: Krishnamoorthi (arXiv 1806.08342), without the correction there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swincompress_pl.quant.graph.graph import (
    Current,
    FloatArray,
    HeldLayer,
    Lowering,
    Run,
    WeightedNode,
    parameter,
    to_array,
)
from swincompress_pl.quant.graph.neurons import Neuron
from swincompress_pl.spec.spiking import AS_IT_IS, CURRENT_MAX

FRACTION_BITS_MAX = 8
# A threshold is a whole number of steps over this, a power of two that is not above the fraction of any layer.
_THRESHOLD_FRACTION = 8
# By what factor training may raise a bias, or lift it above the threshold, before the steps need another calibration.
_BIAS_HEADROOM = 16


@dataclass(frozen=True, kw_only=True)
class ConvNormNode(WeightedNode):
    """The convolution at `module` (nn.Conv2d, or nn.Conv1d with kernel 1) and the BatchNorms after it, as one layer.

    `norms` are the paths of the BatchNorms. `rows` is the range of output channels that this node computes, for a layer
    whose parts go different ways (q | k | v). `neuron` is the module of the neurons that read the output as a current,
    in the unit of the weights; with None, the output has the unit of its own quantizer. With `counts`, neurons that
    give counts read it, and the layer's operation is written with them. `mean` and `std` are those of
    the images, for the layer that reads them. `border` is a BatchNorm before a layer without padding, whose input is
    padded by one pixel with the value that the BatchNorm makes of 0. `size` is the (H, W) of the layer's input; with
    None it is that of the images.
    """

    norms: tuple[str, ...]
    rows: tuple[int, int] | None = None
    neuron: str | None = None
    counts: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    border: str | None = None
    size: tuple[int, int] | None = None

    def _conv(self, network: nn.Module) -> Any:
        return network.get_submodule(self.module)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def _norms(self, network: nn.Module) -> list[Any]:
        return [network.get_submodule(path) for path in self.norms]

    def _factor_and_offset(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """The factor and the offset of all BatchNorms together, (M,) each."""
        factor: Tensor | None = None
        offset: Tensor | None = None
        for norm in self._norms(network):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
            factor = scale if factor is None else factor * scale
            offset = shift if offset is None else offset * scale + shift
        weight = self._conv(network).weight
        if factor is None or offset is None:
            return torch.ones_like(weight[:, 0].flatten(1)[:, 0]), torch.zeros_like(weight[:, 0].flatten(1)[:, 0])
        return factor, offset

    def _deviation(self, weight: Tensor) -> Tensor:
        """The standard deviation of the images in pixel steps, (C, 1, 1); 1 after the first layer."""
        if self.std is None:
            return torch.ones((), dtype=weight.dtype, device=weight.device)
        return torch.tensor(self.std, dtype=weight.dtype, device=weight.device)[:, None, None] * 255

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """The weight (M, C / groups, kh, kw), with the factor of the BatchNorms."""
        weight = self._conv(network).weight
        square = weight[..., None] if weight.ndim == 3 else weight
        factor, _ = self._factor_and_offset(network)
        return self._rows(square * factor[:, None, None, None]) / self._deviation(weight)

    def folded_bias(self, network: nn.Module) -> Tensor:
        """The bias (M,), with factor and offset of the BatchNorms."""
        factor, offset = self._factor_and_offset(network)
        bias = self._conv(network).bias
        return self._rows(offset if bias is None else bias * factor + offset)

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Writes the weight; channels whose factor is 0 stay as they are."""
        factor = self._rows(self._factor_and_offset(network)[0])[:, None, None, None]
        weight = self._rows(self._conv(network).weight)
        real = folded * self._deviation(weight)
        weight.copy_(torch.where(factor == 0, weight.reshape(real.shape), real / factor).reshape(weight.shape))

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Adds to the bias of the last BatchNorm, or of the convolution if there is none."""
        if self.norms:
            self._rows(parameter(network, f"{self.norms[-1]}.bias")).add_(change)
        elif self._conv(network).bias is not None:
            self._rows(self._conv(network).bias).add_(change)

    def _channels_last(self, x: Tensor) -> Tensor:
        """The input with channels last; images come as every network takes them, (N, C, H, W)."""
        return x if self.mean is None else x.movedim(-3, -1)

    def geometry(self, network: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Kernel, stride, padding and groups of the convolution."""
        conv = self._conv(network)
        if conv.weight.ndim == 3:
            return (1, 1), (1, 1), (0, 0), conv.groups
        padding = tuple(conv.padding) if self.border is None else (1, 1)
        return tuple(conv.kernel_size), tuple(conv.stride), padding, conv.groups

    def _border(self, network: nn.Module) -> Tensor:
        """The value with which images are padded, (C,) or ()."""
        if self.border is None:
            weight: Tensor = self._conv(network).weight
            return weight.new_zeros(())
        norm: Any = network.get_submodule(self.border)
        border: Tensor = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return border.detach()

    def _padded(self, network: nn.Module, x: Tensor) -> Tensor:
        """The images of a value, padded: (B, H + 2 ph, W + 2 pw, C)."""
        _, _, (high, wide), _ = self.geometry(network)
        x = self._channels_last(x)
        border = self._border(network)
        return F.pad(x.reshape(-1, *x.shape[-3:]) - border, (0, 0, wide, wide, high, high)) + border

    def _images(self, network: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The images (B, C, H, W) of a value, and the padding with zeros that they still need."""
        if self.border is not None:
            return self._padded(network, x).permute(0, 3, 1, 2), (0, 0)
        x = self._channels_last(x)
        return x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2), self.geometry(network)[2]

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (..., H, W, C), or images (N, C, H, W), to (..., H', W', M)."""
        x, norms = inputs[0], self._norms(run.network)
        _, stride, _, groups = self.geometry(run.network)
        weight = run.weight(self) * self._deviation(x)
        by_batch = any(norm.training for norm in norms)
        bias = self._unfolded_bias(run.network) if by_batch else self.folded_bias(run.network)
        if by_batch:
            factor = self._rows(self._factor_and_offset(run.network)[0])[:, None, None, None]
            weight = weight / torch.where(factor == 0, 1, factor)
        # The images have channels first in memory, which takes a copy only where another layer made them otherwise.
        # With channels last, backward passes of torch 2.15 on a CPU give wrong gradients (double precision, 3 channels)
        # or write beyond their memory (1 x 1, stride 2, 4 to 8 channels).
        images, padding = self._images(run.network, x)
        y = F.conv2d(images.contiguous(), weight, bias, stride, padding, groups=groups)
        for norm in norms if by_batch else ():
            y = self._normalized(norm, y)
        y = y.permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    def _unfolded_bias(self, network: nn.Module) -> Tensor | None:
        bias = self._conv(network).bias
        return None if bias is None else self._rows(bias)

    def _normalized(self, norm: Any, y: Tensor) -> Tensor:
        """Normalizes (B, M, H, W) by the batch and updates the running statistics of these rows.

        If `norm` is in eval mode, it normalizes by the running statistics.
        """
        if norm.training and (self.rows is None or self.rows[0] == 0):
            norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        mean, variance, scale, shift = map(self._rows, (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return F.batch_norm(y, mean, variance, scale, shift, norm.training, momentum, norm.eps)

    def groups(self, network: nn.Module) -> int:
        """The groups of the convolution."""
        return int(self._conv(network).groups)

    def grid(self, network: nn.Module, step: Tensor, equalization: Tensor | None) -> float:
        """The step of the convolution's own weight, for a typical channel."""
        factor = self._rows(self._factor_and_offset(network)[0]).abs()
        return float((step * self._deviation(step).mean() / torch.where(factor == 0, 1, factor)).median())

    def settled_step(self, network: nn.Module, step: Tensor, in_scale: float) -> Tensor:
        """The nearest steps of which the threshold is a whole number, counted in fractions that every neuron has.

        They are large enough for the neuron to count threshold and bias in these fractions. Smaller weights would not
        change a membrane potential.
        """
        if self.neuron is None:
            return step
        threshold = Neuron.of(self.neuron, network.get_submodule(self.neuron)).threshold / in_scale
        bias = self.folded_bias(network).abs() / in_scale
        largest = torch.maximum(bias, torch.full_like(bias, threshold))
        step = torch.maximum(step, _BIAS_HEADROOM * largest * 2**FRACTION_BITS_MAX / CURRENT_MAX)
        threshold = threshold * _THRESHOLD_FRACTION
        return threshold / torch.round(threshold / step).clamp(min=1)

    def search_weight(self, network: nn.Module) -> Tensor:
        """The weight (M, K) over the inputs of all groups, with zeros for inputs of another group."""
        weight = self.folded_weight(network, None)
        groups = self.groups(network)
        if groups == 1:
            return weight.flatten(1)
        depth, outputs = weight.shape[1], len(weight) // groups
        whole = weight.new_zeros(len(weight), groups, *weight.shape[1:])
        for group in range(groups):
            whole[group * outputs : (group + 1) * outputs, group] = weight[group * outputs : (group + 1) * outputs]
        return whole.reshape(len(weight), groups * depth, *weight.shape[2:]).flatten(1)

    def sampled_rows(self, network: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """The receptive fields (R, K) at these output positions, in pixel steps for the first layer."""
        kernel, stride, _, _ = self.geometry(network)
        fields = self._padded(network, x).unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
        height, width = fields.shape[1:3]
        picked = fields[index // (height * width), index // width % height, index % width]
        return (picked * self._deviation(x)).flatten(1)

    def input_rows(self, network: nn.Module, x: Tensor) -> Tensor:
        """The receptive fields (B, rows, K), in pixel steps for the first layer."""
        kernel, stride, _, _ = self.geometry(network)
        images = self._padded(network, x).permute(0, 3, 1, 2) * self._deviation(x)
        return F.unfold(images, kernel, stride=stride).transpose(1, 2)

    def _bias_map(self, lowering: Lowering, weight_q: Any, step: FloatArray) -> FloatArray:
        """The bias (H, W, M), or (M,), with what the integers leave out.

        That is the mean of the images, which is subtracted wherever there is a pixel, or the border, which is added
        wherever there is none. Both are multiplied by the rounded weights.
        """
        network, weight = lowering.network, torch.from_numpy(weight_q).double()
        bias = to_array(self.folded_bias(network))
        if self.mean is None and self.border is None:
            return bias
        inside = torch.tensor(self.mean).double() * 255 if self.mean else self._border(network).cpu().double()
        _, stride, padding, groups = self.geometry(network)
        image = inside[None, :, None, None].expand(1, -1, *self._in_size(lowering))
        seen = F.conv2d(image, weight, stride=stride, padding=padding, groups=groups)
        if self.border is not None:
            around = F.pad(image, (padding[1], padding[1], padding[0], padding[0]), mode="replicate")
            seen = seen - F.conv2d(around, weight, stride=stride, groups=groups)
        return bias - seen[0].permute(1, 2, 0).numpy() * step

    def _in_size(self, lowering: Lowering) -> tuple[int, int]:
        return (lowering.graph.height, lowering.graph.width) if self.size is None else self.size

    def lower(self, lowering: Lowering) -> None:
        """Writes a `linear` or a `conv2d` operation, or holds it for the neurons that give counts of it."""
        weight_q, step = lowering.weight(self)
        source = lowering.graph.spec_of(self.inputs[0])
        unit = step if source is None else step * lowering.scalar_scale(self.inputs[0])
        bias, later = self._bias_map(lowering, weight_q, step), np.zeros(len(unit))
        if self.neuron is not None and bias.ndim == 1:  # the neuron adds it, in finer units
            bias, later = later, bias
        codes = lowering.bias(self, bias, unit)
        kind, attributes, tensors = self._operation(lowering.network, weight_q)
        tensors["bias"] = codes
        if self.counts:
            lowering.held[self.output] = HeldLayer(
                node=self, kind=kind, attributes=attributes, tensors=tensors, unit=unit
            )
            return
        if self.neuron is not None:
            mult, shift = np.full(len(unit), AS_IT_IS[0], np.int32), np.full(len(unit), AS_IT_IS[1], np.uint8)
            a_max = 255 if source is None else source.q_max
            reach = a_max * np.abs(weight_q.astype(np.int64)).reshape(len(unit), -1).sum(1)
            reach = reach + np.abs(codes.reshape(-1, len(unit)).astype(np.int64)).max(0)
            lowering.currents[self.output] = Current(unit=unit, bias=later, reach=float(reach.max()))
            factors: dict[str, Any] = {"mult": mult, "shift": shift}
        else:
            factors = lowering.requantization(unit / lowering.scales(self.output))
        lowering.emit(self, kind, attributes=attributes, tensors=tensors | factors)

    def _operation(self, network: nn.Module, weight_q: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Kind, attributes and weight of the operation."""
        kernel, stride, padding, groups = self.geometry(network)
        attributes: dict[str, Any] = {"channels": len(weight_q)}
        if kernel == (1, 1) and stride == (1, 1) and groups == 1 and self.mean is None:
            return "linear", attributes, {"weight": weight_q.reshape(len(weight_q), -1)}
        attributes |= {"groups": groups} if groups > 1 else {}
        attributes |= {"kernel": list(kernel), "stride": list(stride), "padding": list(padding)}
        return "conv2d", attributes, {"weight": np.ascontiguousarray(weight_q.transpose(0, 2, 3, 1))}
