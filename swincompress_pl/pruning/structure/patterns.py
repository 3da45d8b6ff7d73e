"""Which weights of a matrix can only go together: single weights, n of m, blocks, channels of filters.

A pattern divides the weights of a layer, seen as (rows, columns) = (outputs, inputs * ...), into units, and keeps those
with the highest saliency. `units(shape)` counts them, and `keep_mask(saliency, keep)` says which weights stay:

    parse_granularity("weight")                      a unit is one weight
    parse_granularity("2:4")                         4 units: the best, second, ... of each 4 consecutive input weights
    parse_granularity("block", block_shape=(8, 8))   a unit is a block of 8 outputs by 8 inputs
    parse_granularity("filter")                      a unit is the best, second, ... input channel of every filter

Of equal units the one with the lower index goes first, so what a mask keeps is also kept by every mask that keeps more.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Pattern(ABC):
    """How the weights of a layer are divided into units."""

    @property
    def min_units(self) -> int:
        """The number of units that have to stay."""
        return 1

    @abstractmethod
    def units(self, shape: Sequence[int]) -> int:
        """The number of units of a weight."""

    @abstractmethod
    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises ValueError, naming the layer, for a shape that the pattern does not divide."""

    @abstractmethod
    def unit_scores(self, saliency: Tensor) -> Tensor:
        """The score of each unit, the sum over its weights: saliency of the weight's shape -> (units,) float64."""

    @abstractmethod
    def _kept(self, saliency: Tensor, keep: int) -> Tensor: ...

    def keep_mask(self, saliency: Tensor, keep: int) -> Tensor:
        """The weights of the `keep` best units: bool, True where kept, of the saliency's shape and device.

        Raises ValueError unless the saliency is finite, and `keep` is between `min_units` and `units(shape)`.
        """
        self.check("saliency", saliency.shape)
        units = self.units(saliency.shape)
        if not self.min_units <= keep <= units:
            raise ValueError(f"keep={keep}: {self} of shape {tuple(saliency.shape)} keeps {self.min_units} to {units}")
        if not bool(torch.isfinite(saliency).all()):
            raise ValueError(f"the saliency of shape {tuple(saliency.shape)} is not finite; are there NaN weights?")
        if keep == units:
            return torch.ones_like(saliency, dtype=torch.bool)
        return self._kept(saliency.detach(), keep)


@dataclass(frozen=True)
class SingleWeights(Pattern):
    """Unstructured: every weight is a unit."""

    def units(self, shape: Sequence[int]) -> int:
        """See `Pattern.units`."""
        return math.prod(shape)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """See `Pattern.check`."""
        if not math.prod(shape):
            raise ValueError(f"{name}: a weight of shape {tuple(shape)} is empty; leave the layer out")

    def unit_scores(self, saliency: Tensor) -> Tensor:
        """See `Pattern.unit_scores`."""
        return saliency.flatten().double()

    def _kept(self, saliency: Tensor, keep: int) -> Tensor:
        return _highest(saliency.flatten(), keep).reshape(saliency.shape)

    def __str__(self) -> str:
        return "weight"


@dataclass(frozen=True)
class NOfM(Pattern):
    """Of every m consecutive input weights, n stay; 1 <= n < m.

    The m units are the ranks inside a group of m: keeping k of them keeps the k best of each group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"granularity '{self.n}:{self.m}': n of m weights stay, so 1 <= n < m, e.g. '2:4'")

    @property
    def min_units(self) -> int:
        """The number of units that have to stay: n."""
        return self.n

    def units(self, shape: Sequence[int]) -> int:
        """See `Pattern.units`."""
        return self.m

    def check(self, name: str, shape: Sequence[int]) -> None:
        """See `Pattern.check`."""
        _, columns = _matrix(name, shape, str(self))
        if columns % self.m:
            raise ValueError(
                f"{name}: {columns} input weights are no multiple of {self.m}, so granularity '{self}' does not divide "
                "them; leave the layer out, or choose an m that does"
            )

    def unit_scores(self, saliency: Tensor) -> Tensor:
        """See `Pattern.unit_scores`."""
        return self._groups(saliency).double().sort(dim=1, descending=True).values.sum(0)

    def _kept(self, saliency: Tensor, keep: int) -> Tensor:
        groups = self._groups(saliency)
        rank = torch.zeros(groups.shape, dtype=torch.int16, device=groups.device)
        for one in range(self.m):  # m^2 comparisons of whole columns: much faster than sorting millions of short rows
            for other in range(self.m):
                if other != one:
                    a, b = groups[:, one], groups[:, other]
                    rank[:, one] += (b > a) if other < one else (b >= a)
        return (rank < keep).reshape(saliency.shape)

    def _groups(self, saliency: Tensor) -> Tensor:
        return saliency.reshape(-1, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of `rows` outputs by `columns` inputs; the score of a block is the sum over its weights."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"block_shape=({self.rows}, {self.columns}): both have to be 1 or more, e.g. (8, 8)")

    def units(self, shape: Sequence[int]) -> int:
        """See `Pattern.units`."""
        return shape[0] // self.rows * (math.prod(shape[1:]) // self.columns)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """See `Pattern.check`."""
        rows, columns = _matrix(name, shape, str(self))
        if rows % self.rows or columns % self.columns:
            raise ValueError(
                f"{name}: a weight of {rows} x {columns} is not divided by blocks of {self.rows} x {self.columns}; "
                "leave the layer out, or choose a block_shape that divides it"
            )

    def unit_scores(self, saliency: Tensor) -> Tensor:
        """See `Pattern.unit_scores`."""
        rows, columns = saliency.shape[0], math.prod(saliency.shape[1:])
        blocks = saliency.reshape(rows // self.rows, self.rows, columns // self.columns, self.columns)
        return blocks.sum((1, 3), dtype=torch.float64).flatten()

    def _kept(self, saliency: Tensor, keep: int) -> Tensor:
        blocks = _highest(self.unit_scores(saliency), keep).reshape(saliency.shape[0] // self.rows, 1, -1, 1)
        return blocks.expand(-1, self.rows, -1, self.columns).reshape(saliency.shape)

    def __str__(self) -> str:
        return f"block {self.rows}x{self.columns}"


@dataclass(frozen=True)
class FilterChannels(Pattern):
    """Every filter (output) keeps the same number of input channels, chosen for itself.

    This is PrimeSVT's filter pruning (arXiv 2606.03428, Alg. 2). A channel of a filter is its whole kernel, so in a
    linear layer it is one weight. The units are the ranks inside a filter: keeping k of them keeps the k best channels
    of each.
    """

    def units(self, shape: Sequence[int]) -> int:
        """See `Pattern.units`."""
        return shape[1]

    def check(self, name: str, shape: Sequence[int]) -> None:
        """See `Pattern.check`."""
        _matrix(name, shape, str(self))

    def unit_scores(self, saliency: Tensor) -> Tensor:
        """See `Pattern.unit_scores`."""
        return self._channels(saliency).sort(dim=1, descending=True).values.sum(0)

    def _kept(self, saliency: Tensor, keep: int) -> Tensor:
        channels = self._channels(saliency)
        order = channels.argsort(dim=1, stable=True)
        kept = torch.ones_like(channels, dtype=torch.bool).scatter_(1, order[:, : channels.shape[1] - keep], False)
        return kept.reshape(*kept.shape, *[1] * (saliency.ndim - 2)).expand(saliency.shape).contiguous()

    def _channels(self, saliency: Tensor) -> Tensor:
        return saliency.flatten(2).sum(2, dtype=torch.float64) if saliency.ndim > 2 else saliency.double()

    def __str__(self) -> str:
        return "filter"


def parse_granularity(granularity: str, *, block_shape: tuple[int, int] = (8, 8)) -> Pattern:
    """The pattern of a granularity.

    Granularities are "weight", "n:m" with 1 <= n < m (n of m stay), "block" of (outputs, inputs), and "filter" (input
    channels of each filter). Raises ValueError for any other name; "structured" removes whole units and has no pattern.
    """
    if granularity == "weight":
        return SingleWeights()
    if granularity == "block":
        return Blocks(*block_shape)
    if granularity == "filter":
        return FilterChannels()
    ratio = re.fullmatch(r"(\d+):(\d+)", granularity)
    if ratio is None:
        hint = " ('structured' removes whole units and has no pattern)" if granularity == "structured" else ""
        raise ValueError(
            f"granularity {granularity!r}: choose 'weight', 'n:m' such as '2:4', 'block', or 'filter'{hint}"
        )
    return NOfM(int(ratio[1]), int(ratio[2]))


def _matrix(name: str, shape: Sequence[int], pattern: str) -> tuple[int, int]:
    if len(shape) < 2 or not math.prod(shape):
        raise ValueError(
            f"{name}: shape {tuple(shape)} has no rows and columns for granularity '{pattern}'; leave the tensor "
            "out, or choose 'weight'"
        )
    return shape[0], math.prod(shape[1:])


def _highest(values: Tensor, keep: int) -> Tensor:
    """A mask (N,) of the `keep` highest values, 1 <= keep < N; of equal values the lower index is left out."""
    removed = values.numel() - keep
    threshold = values.kthvalue(removed).values
    kept = values > threshold
    # Exactly `keep` stay: of those at the threshold, the last ones.
    missing = keep - int(kept.sum())
    if missing:
        kept[(values == threshold).nonzero().flatten()[-missing:]] = True
    return kept
