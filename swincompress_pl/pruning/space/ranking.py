"""The whole network as one target: a global ranking."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.pruning.criteria import (
    Gradients,
    estimates_loss,
)
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.space.config import WHOLE_NETWORK, Removal, Removals, Target
from swincompress_pl.pruning.space.structured import StructuredSpace
from swincompress_pl.pruning.space.weights import WeightSpace
from swincompress_pl.pruning.structure.apply import apply_plan
from swincompress_pl.pruning.structure.change import Change
from swincompress_pl.pruning.structure.cost import CostTracker, count_macs, skeleton
from swincompress_pl.pruning.structure.plan import PruningPlan

_PER_MILLE = 1000


class GlobalSpace:
    """The whole network as one target, in per mille of its prunable weights: a step takes the lowest scores anywhere.

    Scores that estimate the loss (`estimates_loss`, the Fisher criteria) are divided by what the unit costs. So a step
    takes what saves most per loss, in the order in which a knapsack is filled. The cost of a structured unit is in MACs
    if `target_of` is "macs" and `input_shape` is known; any other cost is in parameters. Other scores stay as they are.
    Every member keeps what `max_sparsity`, `round_to` and its own limits ask for; the others then lose more, so that a
    step removes what it is asked for, or the least that `round_to` allows.
    """

    def __init__(self, local: StructuredSpace | WeightSpace, input_shape: Sequence[int] | None = None) -> None:
        self.local, self.config, self.input_shape = local, local.config, input_shape
        self._known_prices: list[float] = []

    def targets(self, network: nn.Module) -> list[Target]:
        """One target for the whole network, with the targets of the local space as its members."""
        members = tuple(self.local.targets(network))
        return [
            Target(
                name=WHOLE_NETWORK,
                kind="global",
                units=_PER_MILLE,
                initial_units=_PER_MILLE,
                weights=sum(m.weights for m in members),
                tensors=tuple(dict.fromkeys(name for m in members for name in m.tensors)),
                members=members,
            )
        ]

    def removals(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Removals:
        """See `SearchSpace.removals`; `keep` is in per mille."""
        scores = [self.local.scores(network, member, gradients) for member in target.members]
        owners = self._owners(network, target, scores)

        def at(keep: int) -> Removal:
            removal: dict[str, Any] = {}
            for member, its, width in zip(target.members, scores, self._widths(target, owners, keep), strict=True):
                if width < member.units:
                    removal.update(self.local.lowest(its, member, width))
            return from_rank_zero(removal)

        return at

    def _owners(self, network: nn.Module, target: Target, given: Sequence[Tensor]) -> Tensor:
        """Which member has each unit (units,), the lowest score of all first."""
        scores = [self.local.scores_of_kept(network, m, its) for m, its in zip(target.members, given, strict=True)]
        if estimates_loss(self.config.criterion):
            # A space lives for one round, in which nothing is sliced.
            self._known_prices = prices = self._known_prices or self._prices(network, target.members)
            scores = [each / price for each, price in zip(scores, prices, strict=True)]
        owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
        return owners[torch.argsort(torch.cat(scores), stable=True)]

    def _widths(self, target: Target, owners: Tensor, keep: int) -> list[int]:
        """The members' widths if together they lose the lowest (target.units - keep) per mille of all weights."""
        costs = [m.weights / m.initial_units for m in target.members]
        budget = target.weights * (target.units - keep) / _PER_MILLE * (1 + 1e-9)

        def lost(count: int) -> float:
            widths = self._without(target.members, owners[:count])
            return sum(c * (m.units - w) for c, m, w in zip(costs, target.members, widths, strict=True))

        count = int((torch.tensor(costs, dtype=torch.float64)[owners].cumsum(0) <= budget).sum())
        counts = range(count, len(owners) + 1)
        count = counts[bisect_right(counts, budget, key=lost) - 1]  # granules lose less than is asked
        if budget > 0 and not lost(count):
            count = counts[min(bisect_right(counts, 0.0, key=lost), len(counts) - 1)]
        return self._without(target.members, owners[:count])

    def _without(self, members: Sequence[Target], gone: Tensor) -> list[int]:
        """The members' widths without units of these members (units,), as far as their limits and granules allow."""
        widths = []
        for member, removed in zip(members, torch.bincount(gone, minlength=len(members)).tolist(), strict=True):
            width = -(-(member.units - removed) // member.granule) * member.granule
            widths.append(min(max(width, member.least_units(self.config.max_sparsity)), member.units))
        return widths

    def _prices(self, network: nn.Module, members: Sequence[Target]) -> list[float]:
        """What a unit of each member costs in the present network, in MACs or parameters."""
        structured = isinstance(self.local, StructuredSpace)
        if not structured or self.config.target_of != "macs" or self.input_shape is None:
            return [m.weights / m.initial_units for m in members]
        assert isinstance(self.local, StructuredSpace)
        groups = {g.name: g for g in self.local.groups(network)}
        whole, prices = count_macs(network, self.input_shape), []
        for member in members:
            group, bare = groups[member.name], skeleton(network)
            cut = min(member.granule, group.units - 1)
            if cut:
                apply_plan(bare, PruningPlan.removing([group], {group.name: range(cut)}))
            prices.append((whole - count_macs(bare, self.input_shape)) / cut if cut else float(whole))
        return prices

    def prepare(self, network: nn.Module) -> None:
        """See `SearchSpace.prepare`."""
        self.local.prepare(network)

    def refined(self, target: Target, removal: Removal) -> Removal:
        """See `SearchSpace.refined`; it refines each member."""
        return {
            name: gone
            for member in target.members
            if member.name in removal
            for name, gone in self.local.refined(member, {member.name: removal[member.name]}).items()
        }

    def masked(self, network: nn.Module, removal: Removal) -> AbstractContextManager[Any]:
        """See `SearchSpace.masked`."""
        return self.local.masked(network, removal)

    def commit(self, network: nn.Module, removal: Removal) -> Change:
        """See `SearchSpace.commit`."""
        return self.local.commit(network, removal)

    def costs(self, network: nn.Module, input_shape: Sequence[int] | None) -> CostTracker:
        """See `SearchSpace.costs`."""
        return self.local.costs(network, input_shape)
