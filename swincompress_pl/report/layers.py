"""Sparsity layer by layer, read off two networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swincompress_pl.report.plain import Plain

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LayerSparsity(Plain):
    """One weight before and after: its values before, and its non-zeros after (removed ones do not count)."""

    name: str
    weights_before: int
    nonzeros_after: int

    @property
    def sparsity(self) -> float:
        """The part that is gone, 0 to 1."""
        return 1.0 - self.nonzeros_after / self.weights_before if self.weights_before else 0.0


def layer_sparsity(before: nn.Module, after: nn.Module) -> list[LayerSparsity]:
    """For every weight matrix or filter of `before`, what of it is left in `after`, in the order of `before`.

    Weights are matched by name, so `after` is the same architecture pruned: sliced, masked or both. One that is
    missing there counts as gone. Raises ValueError when no name matches.
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
