"""Sparsity layer by layer, from the network before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swincompress_pl.report.plain import Plain

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LayerSparsity(Plain):
    """One weight before and after a compression.

    Attributes:
        name: Path of the layer in the network.
        weights_before: Number of values before.
        nonzeros_after: Number of values after that are not zero.
    """

    name: str
    weights_before: int
    nonzeros_after: int

    @property
    def sparsity(self) -> float:
        """The part that is removed, 0 to 1."""
        return 1.0 - self.nonzeros_after / self.weights_before if self.weights_before else 0.0


def layer_sparsity(before: nn.Module, after: nn.Module) -> list[LayerSparsity]:
    """Counts what is left of every weight matrix and filter.

    Args:
        before: The network before.
        after: The same architecture after pruning: sliced, masked or both. Weights are matched by name, and one that is
            missing here counts as removed.

    Returns:
        One entry per weight, in the order of `before`.

    Raises:
        ValueError: If no name matches.
    """
    left = {name: int(tensor.detach().count_nonzero()) for name, tensor in after.named_parameters()}
    weights = {name: tensor.numel() for name, tensor in before.named_parameters() if _is_weight(name, tensor.ndim)}
    if weights and not weights.keys() & left.keys():
        raise ValueError(
            f"no weight of {type(before).__name__} is in {type(after).__name__}; pass both networks themselves, "
            "e.g. `quantized.network`"
        )
    return [
        LayerSparsity(
            name=name.removesuffix(".weight"), weights_before=size, nonzeros_after=min(size, left.get(name, 0))
        )
        for name, size in weights.items()
    ]


def _is_weight(name: str, dimensions: int) -> bool:
    return dimensions >= 2 and name.endswith(".weight")
