"""The kinds of graph nodes: for each, its float computation and its integer form.

`forward` is what calibration and training run. `lower` writes the operation of the specification
(`swincompress_pl.spec`) that means the same. They stand side by side, so that nobody changes only one of them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swincompress_pl._deprecated import renamed
from swincompress_pl.quant.graph.graph import Lowering, Node, Run, WeightedNode, parameter, to_array
from swincompress_pl.spec import EXP_STEPS, multiplier
from swincompress_pl.spec.lowering import TABLE_CODES, layer_norm_integers, table_values


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class LinearNode(WeightedNode):
    """The nn.Linear at `module`.

    `layer_scale`, the path of a factor per output channel, and the number `factor` are folded into weight and bias.
    """

    layer_scale: str | None = None
    factor: float = 1.0

    def _gamma(self, network: nn.Module) -> Tensor | None:
        if self.layer_scale is not None:
            return parameter(network, self.layer_scale) * self.factor
        if self.factor == 1.0:
            return None
        weight = parameter(network, f"{self.module}.weight")
        return weight.new_full((len(weight),), self.factor)

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """The weight (M, K), with layer scale and ratios."""
        weight = parameter(network, f"{self.module}.weight")
        gamma = self._gamma(network)
        if gamma is not None:
            weight = weight * gamma[:, None]
        return weight if equalization is None else weight * equalization

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """The bias (M,), with the layer scale."""
        bias: Tensor | None = getattr(network.get_submodule(self.module), "bias", None)
        gamma = self._gamma(network)
        return bias if bias is None or gamma is None else bias * gamma

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Writes the weight; rows whose layer scale is 0 stay as they are."""
        weight, gamma = parameter(network, f"{self.module}.weight"), self._gamma(network)
        unfolded = folded if equalization is None else folded / equalization
        weight.copy_(unfolded if gamma is None else torch.where(gamma == 0, weight.T, unfolded.T / gamma).T)

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Adds to the bias; entries whose layer scale is 0 stay as they are."""
        bias, gamma = getattr(network.get_submodule(self.module), "bias", None), self._gamma(network)
        if bias is not None:
            bias += change if gamma is None else torch.where(gamma == 0, 0.0, change / gamma)

    def input_rows(self, network: nn.Module, x: Tensor) -> Tensor:
        """The tokens, (N, rows, K)."""
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (..., K) to (..., M)."""
        return F.linear(inputs[0], run.weight(self), self.folded_bias(run.network))

    def lower(self, lowering: Lowering) -> None:
        """Writes a `linear` operation."""
        weight_q, step = lowering.weight(self)
        unit = step * lowering.scalar_scale(self.inputs[0])
        bias = self.folded_bias(lowering.network)
        real_bias = np.zeros(len(step)) if bias is None else to_array(bias)
        # The input's codes include a constant. What it adds to the output, with the rounded weights, is subtracted.
        added = lowering.centering(self.inputs[0]) / lowering.ratios(self.inputs[0])
        real_bias = real_bias - (weight_q * added).sum(1) * step + lowering.centering(self.output)
        lowering.emit(
            self,
            "linear",
            attributes={"channels": len(step)},
            tensors={
                "weight": weight_q,
                "bias": lowering.bias(self, real_bias, unit),
                **lowering.requantization(unit / lowering.scales(self.output)),
            },
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingNode(LinearNode):
    """The nn.Identity at `module`, the end of a network without a classifier.

    A product with the identity matrix turns the codes of the features into integers of one scale. The matrix is not a
    parameter, and it is exact at its steps.
    """

    channels: int

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """The identity matrix (C, C), with the ratios."""
        identity = torch.eye(self.channels, device=next(network.parameters()).device)
        return identity if equalization is None else identity * equalization

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """No bias."""
        return None

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Does nothing, because there is nothing to learn or to round."""

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Does nothing, because there is no bias."""

    def exact_step(self, weight: Tensor, q_max: int) -> Tensor | None:
        """The steps that put the diagonal at the largest code."""
        return weight.diagonal() / q_max


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class PixelConvNode(WeightedNode):
    """The nn.Conv2d at `module` that reads the image, with `mean` and `std` per channel for pixels in [0, 1].

    Integers read raw pixels, so mean and standard deviation are folded into weights and bias. The mean is folded with
    the *quantized* weights, so that their rounding errors act only on centered pixels. The convolution has no padding,
    because the mean of a padded border would be another one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def _conv(self, network: nn.Module) -> nn.Conv2d:
        conv = network.get_submodule(self.module)
        assert isinstance(conv, nn.Conv2d)
        return conv

    def _deviation(self, network: nn.Module) -> Tensor:
        """The standard deviation in pixel steps, (C, 1, 1)."""
        weight = self._conv(network).weight
        return torch.tensor(self.std, dtype=weight.dtype, device=weight.device)[:, None, None] * 255

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """The weight (M, C, kh, kw) for centered pixels."""
        return self._conv(network).weight / self._deviation(network)

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """The bias (M,), without the mean."""
        return self._conv(network).bias

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Writes the weight."""
        self._conv(network).weight.copy_(folded * self._deviation(network))

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Adds to the bias."""
        bias = self._conv(network).bias
        if bias is not None:
            bias += change

    def input_rows(self, network: nn.Module, x: Tensor) -> Tensor:
        """The receptive fields, (N, rows, C kh kw), in pixel steps."""
        conv = self._conv(network)
        pixels = x * self._deviation(network)  # centered, in pixel steps
        return F.unfold(pixels, conv.kernel_size, stride=conv.stride).transpose(1, 2)

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to tokens (N, rows, M)."""
        conv = self._conv(run.network)
        weight = run.weight(self) * self._deviation(run.network)
        return F.conv2d(inputs[0], weight, conv.bias, conv.stride).flatten(2).transpose(1, 2)

    def lower(self, lowering: Lowering) -> None:
        """Writes a `conv2d` operation."""
        conv = self._conv(lowering.network)
        weight_q, unit = lowering.weight(self)
        mean = np.asarray(self.mean, dtype=np.float64) * 255
        real_bias = np.zeros(len(unit)) if conv.bias is None else to_array(conv.bias)
        real_bias = real_bias - (weight_q.astype(np.float64).sum(axis=(2, 3)) @ mean) * unit
        lowering.emit(
            self,
            "conv2d",
            attributes={
                "channels": len(unit),
                "kernel": list(conv.kernel_size),
                "stride": list(conv.stride),
                "padding": [0, 0],
            },
            tensors={
                "weight": np.ascontiguousarray(weight_q.transpose(0, 2, 3, 1)),
                "bias": lowering.bias(self, real_bias, unit),
                **lowering.requantization(unit / lowering.scales(self.output)),
            },
        )


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class LayerNormNode(Node):
    """The nn.LayerNorm at `module`; the ratios of the output's channels are folded into gain and offset."""

    module: str

    def _norm(self, network: nn.Module) -> nn.LayerNorm:
        norm = network.get_submodule(self.module)
        assert isinstance(norm, nn.LayerNorm)
        return norm

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Normalizes the channels of (N, rows, C)."""
        result: Tensor = self._norm(run.network)(inputs[0])  # the module itself, as pruning may have masked it on trial
        return result

    def lower(self, lowering: Lowering) -> None:
        """Writes a `layer_norm` operation."""
        norm = self._norm(lowering.network)
        scales = lowering.scales(self.output)
        channels = len(scales)
        bias = np.zeros(channels) if norm.bias is None else to_array(norm.bias)
        attributes, tensors = layer_norm_integers(
            np.ones(channels) if norm.weight is None else to_array(norm.weight),
            bias + lowering.centering(self.output),
            eps=norm.eps,
            input_scale=lowering.scalar_scale(self.inputs[0]),
            output_scale=scales,
        )
        lowering.emit(self, "layer_norm", attributes=attributes, tensors=tensors)


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class ActivationNode(Node):
    """The elementwise function at `module`, as a table over the codes of its input."""

    module: str

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps each value alone."""
        result: Tensor = run.network.get_submodule(self.module)(inputs[0])
        return result

    def lower(self, lowering: Lowering) -> None:
        """Writes a `table` operation."""
        codes = torch.from_numpy(TABLE_CODES)
        # In double precision, also what it has learned (the slope of a PReLU).
        function = copy.deepcopy(lowering.network.get_submodule(self.module)).to("cpu", torch.float64).eval()
        (centering_in,), (centering_out,) = lowering.centering(self.inputs[0]), lowering.centering(self.output)
        real = to_array(function(codes * lowering.scalar_scale(self.inputs[0]) - centering_in)) + centering_out
        values = table_values(real, lowering.scalar_scale(self.output), lowering.spec(self.output).dtype)
        lowering.emit(self, "table", tensors={"values": values})


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class AddNode(Node):
    """The residual sum of two values that have the stream's unit; the second may lack the axis of time."""

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Adds the second input to the first one."""
        stream, branch = inputs
        return stream + (branch if branch.ndim == stream.ndim else branch.unsqueeze(1))

    def lower(self, lowering: Lowering) -> None:
        """Writes an `add` operation."""
        lowering.emit(self, "add")


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class AddConstantNode(Node):
    """Adds the rows from `first` on of a parameter (1, R, C), such as the position embedding of the patches."""

    parameter: str
    first: int = 0

    def _rows(self, network: nn.Module) -> Tensor:
        return parameter(network, self.parameter)[0, self.first :]

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Adds the rows to (N, rows, C)."""
        return inputs[0] + self._rows(run.network)

    def lower(self, lowering: Lowering) -> None:
        """Writes an `add_constant` operation."""
        lowering.emit(
            self, "add_constant", tensors={"constant": lowering.constant(self, to_array(self._rows(lowering.network)))}
        )


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class PrependNode(Node):
    """Puts constant tokens in front: the `parameters` (1, R, C), plus the first rows of the parameter `position`."""

    parameters: tuple[str, ...]
    position: str | None = None

    def _rows(self, network: nn.Module) -> Tensor:
        rows = torch.cat([parameter(network, path)[0] for path in self.parameters])
        return rows if self.position is None else rows + parameter(network, self.position)[0, : len(rows)]

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (N, rows, C) to more rows."""
        rows = self._rows(run.network)
        return torch.cat([rows.expand(inputs[0].shape[0], -1, -1), inputs[0]], dim=1)

    def lower(self, lowering: Lowering) -> None:
        """Writes a `prepend` operation."""
        rows = lowering.constant(self, to_array(self._rows(lowering.network)))
        lowering.emit(self, "prepend", attributes={"rows": len(rows)}, tensors={"rows": rows})


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True, eq=False)
class GatherNode(Node):
    """Moves tokens by an index (rows, joined): window partition and its reverse, patch merging, choice of a token."""

    index: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        super().__post_init__()
        # Code that torch.compile traces cannot look into NumPy arrays.
        object.__setattr__(self, "_pads", bool((self.index < 0).any()))

    @property
    def pads(self) -> bool:
        """Whether rows of zeros (index -1) are among the output's."""
        pads: bool = self._pads  # type: ignore[attr-defined]
        return pads

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (N, rows, C) to the rows of the index, (N, rows, joined C)."""
        x = inputs[0]
        index = torch.from_numpy(self.index).to(x.device)
        if self.pads:
            x = F.pad(x, (0, 0, 0, 1))  # row -1 is the zero row
            index = index % x.shape[1]
        return x[:, index.flatten()].reshape(x.shape[0], index.shape[0], -1)

    def lower(self, lowering: Lowering) -> None:
        """Writes a `gather` operation."""
        index = self.index
        lowering.emit(
            self, "gather", attributes={"rows": index.shape[0], "joined": index.shape[1]}, tensors={"index": index}
        )


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True)
class MeanNode(Node):
    """The mean over all `rows`, tokens and time steps, as one sum and one requantization.

    With one row it gives a token another scale.
    """

    rows: int

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (N, ..., C) to (N, C)."""
        return inputs[0].flatten(1, -2).mean(dim=1)

    def lower(self, lowering: Lowering) -> None:
        """Writes a `mean` operation."""
        factor = lowering.scales(self.inputs[0]) / (self.rows * lowering.scales(self.output))
        lowering.emit(self, "mean", tensors=lowering.requantization(factor))


@renamed(site="quantizer")
@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionNode(Node):
    """Multi-head attention inside windows, from q | k | v in one matrix.

    The module at `module` has `num_heads`, `scale` and, with `bias_index` (length, length), the table
    `relative_position_bias_table` (T, heads). `region` has labels (windows, length); tokens attend only to tokens of
    their own region. `dropout` is the path of the attention dropout.
    """

    module: str
    windows: int
    qk_dim: int
    v_dim: int
    bias_index: npt.NDArray[np.int32] | None = None
    region: npt.NDArray[np.uint8] | None = None
    dropout: str | None = None

    def _heads_and_scale(self, network: nn.Module) -> tuple[int, float]:
        module: Any = network.get_submodule(self.module)
        return int(module.num_heads), float(module.scale)

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps q | k | v (N, rows, heads (2 qk_dim + v_dim)) to (N, rows, heads v_dim)."""
        heads, scale = self._heads_and_scale(run.network)
        x = inputs[0]
        batch, rows, _ = x.shape
        split = (heads * self.qk_dim, heads * self.qk_dim, heads * self.v_dim)
        q, k, v = (
            part.reshape(batch, self.windows, rows // self.windows, heads, -1).transpose(2, 3)
            for part in x.split(split, dim=-1)
        )
        logits = (q * scale) @ k.transpose(-2, -1)
        if self.bias_index is not None:
            table = parameter(run.network, f"{self.module}.relative_position_bias_table")
            logits = logits + table[torch.from_numpy(self.bias_index).to(x.device)].permute(2, 0, 1)
        if self.region is not None:
            region = torch.from_numpy(self.region).to(x.device)
            other = region[:, None, :, None] != region[:, None, None, :]
            logits = logits.masked_fill(other, -math.inf)
        probabilities = logits.softmax(dim=-1)
        if self.dropout is not None:
            probabilities = run.network.get_submodule(self.dropout)(probabilities)
        attended: Tensor = (probabilities @ v).transpose(2, 3).reshape(batch, rows, -1)
        return attended

    def lower(self, lowering: Lowering) -> None:
        """Writes an `attention` operation."""
        heads, scale = self._heads_and_scale(lowering.network)
        q_scale, k_scale, v_scale = np.broadcast_to(lowering.segment_scales(self.inputs[0]), 3)
        logit_unit = q_scale * k_scale * scale
        exp_mult, exp_shift = multiplier(np.full(heads, logit_unit * math.log2(math.e) * EXP_STEPS))
        out_mult, out_shift = multiplier(np.full(heads, v_scale / lowering.scalar_scale(self.output)))
        tensors: dict[str, npt.NDArray[Any]] = {
            "exp_mult": exp_mult,
            "exp_shift": exp_shift,
            "out_mult": out_mult,
            "out_shift": out_shift,
        }
        attributes = {"windows": self.windows, "heads": heads, "qk_dim": self.qk_dim, "v_dim": self.v_dim}
        if self.bias_index is not None:
            table = to_array(parameter(lowering.network, f"{self.module}.relative_position_bias_table")).T
            tensors["bias_table"] = lowering.bias(self, np.ascontiguousarray(table), np.full(table.shape, logit_unit))
            tensors["bias_index"] = self.bias_index
            attributes["biases"] = table.shape[1]
        if self.region is not None:
            tensors["region"] = self.region
        lowering.emit(self, "attention", attributes=attributes, tensors=tensors)
