"""The settings of a search space, its targets, and what a search asks of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from torch import nn

from swincompress_pl import arguments
from swincompress_pl.pruning.compensation.compensator import Method
from swincompress_pl.pruning.criteria import (
    CRITERIA,
    SECOND_ORDER,
    Criterion,
    Gradients,
)
from swincompress_pl.pruning.structure.change import Change
from swincompress_pl.pruning.structure.cost import CostTracker

Removal = Mapping[str, Any]
"""All that is gone: the unit indices of each group, or the mask of each parameter, True where a weight stays."""

Removals = Callable[[int], Removal]
"""What is gone if so many units stay."""

WHOLE_NETWORK = "network"
WITHOUT_READERS = "magnitude"
"""What ranks, under "second_order", units that no layer reads as columns: only against units of their own group."""

_SMALL_TOLERANCE_POINTS = 0.1


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """What may be removed, and how much of it: the settings that both searches have in common.

    Attributes:
        granularity: "structured" (units of the network's groups), "weight" (single weights), n of m such as "2:4",
            "block", or "filter" (input channels, chosen for each filter alone).
        block_shape: (outputs, inputs) of a block; only for "block".
        kinds: Kinds of groups to prune; only for "structured".
        layers: Patterns (fnmatch) of the names to prune; None for all.
        criterion: A name in `pruning.CRITERIA`, or a function (`pruning.Criterion`).
        max_sparsity: Part of a target's original units that may go, in (0, 1).
        round_to: Kept widths, except the number of heads, are multiples of it; in spiking attention those of all heads
            together. Only for "structured".
        shrink: "round" slices what is removed for good, "end" masks it; only for "structured".
        ranking: "local" makes every group or layer a target, "global" makes the whole network one target.
        target_of: What a search is to save. With "macs", a global ranking prices units in MACs (see `GlobalSpace`).
        compensation: What makes up for a cut in the layers that read what went; see `compensation.Compensator`.
    """

    granularity: str = "structured"
    block_shape: tuple[int, int] = (8, 8)
    kinds: tuple[str, ...] = ("heads", "mlp")
    layers: tuple[str, ...] | None = None
    criterion: str | Criterion = "magnitude"
    max_sparsity: float = 0.9
    round_to: int = 8
    shrink: Literal["round", "end"] = "round"
    ranking: Literal["local", "global"] = "local"
    target_of: Literal["macs", "parameters", "bytes"] = "macs"
    compensation: Method = "none"


def checked_tolerance(tolerance: float, *, example: float = 1.0, stacklevel: int = 4) -> float:
    """Checks a tolerance in points: a ValueError outside (0, 100], a warning if it looks like a fraction."""
    wanted = f"in points, above 0 and at most 100, e.g. {example}"
    tolerance = arguments.number("tolerance", tolerance, lambda points: 0 < points <= 100, wanted)
    if tolerance < _SMALL_TOLERANCE_POINTS:
        warnings.warn(
            f"tolerance={tolerance:g} means {tolerance:g} points, {tolerance / 100:.2g} as a fraction; for "
            f"{100 * tolerance:g} points give tolerance={100 * tolerance:g}",
            stacklevel=stacklevel,
        )
    return tolerance


def check_criterion(criterion: str | Criterion) -> None:
    """Raises ValueError for an unknown criterion."""
    names = (*CRITERIA, SECOND_ORDER)
    known = callable(criterion) or (isinstance(criterion, str) and criterion in names)
    arguments.require("criterion", criterion, known, f"one of {', '.join(names)}, or a function")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one step narrows.

    Attributes:
        name: Name of the group, or of the parameter.
        kind: Kind of the group, "weight" or "global".
        units: Present number of units.
        initial_units: Number of units before the search.
        min_units: Number of units that have to stay.
        granule: Widths are multiples of it.
        weights: Number of weights that the initial units owned together.
        tensors: Names of the parameters that masking it changes.
        members: The targets that a global target stands for.
    """

    name: str
    kind: str
    units: int
    initial_units: int
    min_units: int = 1
    granule: int = 1
    weights: int
    tensors: tuple[str, ...]
    members: tuple[Target, ...] = ()

    def least_units(self, max_sparsity: float) -> int:
        """The smallest width that `max_sparsity`, `granule` and `min_units` allow."""
        allowed = math.ceil(self.initial_units * (1 - max_sparsity) / self.granule - 1e-9) * self.granule
        return max(allowed, self.min_units, self.granule)


class SearchSpace(Protocol):
    """How a search sees a network."""

    config: SpaceConfig

    def prepare(self, network: nn.Module) -> None:
        """Begins a round on the network as it is now; it comes before everything else."""
        ...

    def targets(self, network: nn.Module) -> list[Target]:
        """Everything that can be narrowed, in the order of the network."""
        ...

    def removals(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Removals:
        """Scores a target as it is now, as rank 0 does: `removals(...)(keep)` is what is gone if `keep` units stay.

        The lowest scores go first.
        """
        ...

    def refined(self, target: Target, removal: Removal) -> Removal:
        """As much of a target as `removal` has, chosen with more care, as rank 0 does; it may be `removal` itself."""
        ...

    def masked(self, network: nn.Module, removal: Removal) -> AbstractContextManager[Any]:
        """A context in which the network computes as if `removal` were gone."""
        ...

    def commit(self, network: nn.Module, removal: Removal) -> Change:
        """Removes it for good."""
        ...

    def costs(self, network: nn.Module, input_shape: Sequence[int] | None) -> CostTracker:
        """Counts what the network costs after a removal."""
        ...


def matching(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that any pattern matches, all for None; a ValueError for a pattern that matches none."""
    if patterns is None:
        return list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(list(names)[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            raise ValueError(f"layers: {pattern!r} matches nothing that can be pruned; there is {shown}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
