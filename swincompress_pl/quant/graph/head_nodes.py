"""The graph nodes that only heads have; see `nodes.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swincompress_pl.quant.graph.graph import Run, parameter
from swincompress_pl.quant.graph.nodes import LinearNode


@dataclass(frozen=True, kw_only=True)
class NormedLinearNode(LinearNode):
    """The nn.Linear at `module` with the nn.BatchNorm1d before it and behind it, as one layer.

    The BatchNorms are folded into the layer, with their running statistics. In training, unless they are in `eval()`,
    they normalize by the batch and update these statistics, as elsewhere in torch.
    """

    norm_before: str | None = None
    norm_after: str | None = None

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """The weight (M, K), with the factors of the BatchNorms and the ratios."""
        before, after = self._factors(network)
        weight = parameter(network, f"{self.module}.weight") * before * after[:, None]
        return weight if equalization is None else weight * equalization

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """The bias (M,), with what the BatchNorms add."""
        weight = parameter(network, f"{self.module}.weight")
        bias = weight @ _offset(network, self.norm_before, weight.new_zeros(weight.shape[1]))
        own: Tensor | None = getattr(network.get_submodule(self.module), "bias", None)
        bias = bias if own is None else bias + own
        _, after = self._factors(network)
        return bias * after + _offset(network, self.norm_after, torch.zeros_like(bias))

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Writes the weight; entries with a factor of 0 stay as they are."""
        before, after = self._factors(network)
        weight, factor = parameter(network, f"{self.module}.weight"), before * after[:, None]
        unfolded = folded if equalization is None else folded / equalization
        weight.copy_(torch.where(factor == 0, weight, unfolded / torch.where(factor == 0, 1.0, factor)))

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Adds to the bias of the layer; entries with a factor of 0 stay as they are."""
        bias: Tensor | None = getattr(network.get_submodule(self.module), "bias", None)
        if bias is not None:
            _, after = self._factors(network)
            bias += torch.where(after == 0, 0.0, change / torch.where(after == 0, 1.0, after))

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (..., K) to (..., M)."""
        weight = run.weight(self)
        norms = [None if path is None else run.network.get_submodule(path) for path in self._paths]
        if not any(norm is not None and norm.training for norm in norms):
            return F.linear(inputs[0], weight, self.folded_bias(run.network))
        before, after = self._factors(run.network)
        factor = before * after[:, None]
        weight = weight / torch.where(factor == 0, 1.0, factor)
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        x = x if norms[0] is None else norms[0](x)
        y: Tensor = F.linear(x, weight, getattr(run.network.get_submodule(self.module), "bias", None))
        y = y if norms[1] is None else norms[1](y)
        return y.reshape(*inputs[0].shape[:-1], -1)

    @property
    def _paths(self) -> tuple[str | None, str | None]:
        return self.norm_before, self.norm_after

    def _factors(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """The factors of the BatchNorms before and behind the layer, (K,) and (M,)."""
        weight = parameter(network, f"{self.module}.weight")
        outputs, inputs = weight.shape
        before = _factor(network, self.norm_before, weight.new_ones(inputs))
        return before, _factor(network, self.norm_after, weight.new_ones(outputs))


@dataclass(frozen=True, kw_only=True)
class LatentQkvNode(LinearNode):
    """The rows q | k | v for attention of one learned query to all tokens, which the nn.Linear at `module` reads.

    The layer gives k | v. The query does not depend on the tokens, so it is a bias of rows without weights, and every
    token has the same one.

    Attributes:
        name: As in `Node`.
        inputs: As in `Node`.
        output: As in `Node`.
        quantizer: As in `Node`.
        regularizers: As in `Node`.
        module: Path of the layer.
        latent: Path of the parameter (1, 1, C).
        query: Path of the layer between `latent` and the query, an nn.Linear or nn.Identity.
    """

    latent: str
    query: str

    def folded_weight(self, network: nn.Module, equalization: Tensor | None) -> Tensor:
        """The weight (3 C, K): zeros for the query, then that of k and v, with the ratios."""
        weight = parameter(network, f"{self.module}.weight")
        weight = torch.cat([weight.new_zeros(len(weight) // 2, weight.shape[1]), weight])
        return weight if equalization is None else weight * equalization

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """The bias (3 C,): the query, then that of k and v."""
        layer: Any = network.get_submodule(self.module)
        query: Tensor = network.get_submodule(self.query)(parameter(network, self.latent)).flatten()
        return torch.cat([query, query.new_zeros(layer.out_features) if layer.bias is None else layer.bias])

    def set_folded_weight(self, network: nn.Module, folded: Tensor, equalization: Tensor | None) -> None:
        """Writes the weight of k and v."""
        weight = parameter(network, f"{self.module}.weight")
        unfolded = folded if equalization is None else folded / equalization
        weight.copy_(unfolded[len(folded) - len(weight) :])

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Adds to the bias of k and v; the query is exact."""
        bias: Tensor | None = getattr(network.get_submodule(self.module), "bias", None)
        if bias is not None:
            bias += change[len(change) - len(bias) :]


def _factor(network: nn.Module, path: str | None, ones: Tensor) -> Tensor:
    """What the BatchNorm at `path` multiplies each channel with; `ones` if there is none."""
    if path is None:
        return ones
    norm: Any = network.get_submodule(path)
    factor: Tensor = torch.rsqrt(norm.running_var + norm.eps)
    return factor if norm.weight is None else factor * norm.weight


def _offset(network: nn.Module, path: str | None, zeros: Tensor) -> Tensor:
    """What the BatchNorm at `path` adds to each channel; `zeros` if there is none."""
    if path is None:
        return zeros
    norm: Any = network.get_submodule(path)
    offset: Tensor = -norm.running_mean * _factor(network, path, zeros)
    return offset if norm.bias is None else offset + norm.bias
