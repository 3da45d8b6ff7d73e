"""Whole units of the groups of a network, sliced away or masked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.criteria import (
    SECOND_ORDER,
    Gradients,
    lowest_units,
    unit_scores,
)
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.space.config import WITHOUT_READERS, Removal, Removals, SpaceConfig, Target, matching
from swincompress_pl.pruning.structure.apply import apply_plan, check_layers, stored_tensor
from swincompress_pl.pruning.structure.change import Change, commit_masks, consumer_masks, gone_units, owners
from swincompress_pl.pruning.structure.cost import CostTracker
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.registry import ExplainingAdapter, adapter_for


class StructuredSpace:
    """Whole units of the network's groups, sliced away at once or, with `shrink="end"`, masked until the end."""

    def __init__(
        self,
        config: SpaceConfig,
        initial_units: Mapping[str, int] | None = None,
        compensator: Compensator | None = None,
    ) -> None:
        self.config, self.initial_units = config, initial_units or {}
        self._compensator = compensator

    def prepare(self, network: nn.Module) -> None:
        """Begins a round on the network as it is now: collects what compensation and "second_order" need."""
        if self._compensator is not None:
            self._compensator.begin_round(network, self.groups(network))
        groups, unread = self.groups(network), self.without_readers(network)
        if unread and (self.config.ranking == "global" or len(unread) == len(groups)):
            raise self._unreadable(next(g for g in groups if g.name in unread))
        if unread:
            shown = "; ".join(f"{name} ({why})" for name, why in unread.items())
            warnings.warn(
                f"criterion='second_order': no layer reads the units of {len(unread)} groups as columns that could be "
                f"solved again, so {WITHOUT_READERS!r} ranks these, and their cuts are not compensated: {shown}",
                stacklevel=2,
            )

    def groups(self, network: nn.Module) -> list[Group]:
        """The groups of the kinds and names in the config; a ValueError for a kind or a pattern that matches none."""
        adapter = adapter_for(network)
        groups: list[Group] = adapter.groups(network)
        kinds = sorted({g.kind for g in groups})
        for kind in self.config.kinds:
            if kind not in kinds:
                reason = adapter.uncovered(network).get(kind) if isinstance(adapter, ExplainingAdapter) else None
                raise ValueError(
                    f"kinds={self.config.kinds}: {type(network).__name__} has no group of kind {kind!r}, only "
                    f"{', '.join(kinds)}{'' if reason is None else f'; {reason}'}"
                )
        chosen = [g for g in groups if g.kind in self.config.kinds]
        names = set(matching([g.name for g in chosen], self.config.layers))
        return [g for g in chosen if g.name in names]

    def targets(self, network: nn.Module) -> list[Target]:
        """One target per group."""
        shapes = {name: p.shape for name, p in network.named_parameters()}
        found = []
        groups = self.groups(network)
        check_layers(network, (part.tensor for group in groups for part in group.slices))
        for g in groups:
            before = self.initial_units.get(g.name, g.units)
            found.append(
                Target(
                    name=g.name,
                    kind=g.kind,
                    units=g.units - len(gone_units(network, g)),
                    initial_units=before,
                    min_units=g.min_units,
                    granule=self._granule(g),
                    weights=_owned(shapes, g) // g.units * before,
                    tensors=tuple(dict.fromkeys([*g.masked_parameters(), *self._rewritten(g)])),
                )
            )
        return found

    def _granule(self, group: Group) -> int:
        """Widths are multiples of it; where a unit is one of each head, the heads' width together is rounded."""
        if group.kind == "heads":
            return 1
        return self.config.round_to // math.gcd(self.config.round_to, group.heads)

    def scores(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Tensor:
        """The scores of the group's units; those that are masked already score below all others."""
        group = self._group(network, target)
        scores = self._unit_scores(network, group, gradients)
        gone = list(gone_units(network, group))
        scores[gone] = -1.0
        return scores

    def removals(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Removals:
        """See `SearchSpace.removals`."""
        scores = self.scores(network, target, gradients)
        return lambda keep: from_rank_zero(self.lowest(scores, target, keep))

    def lowest(self, scores: Tensor, target: Target, keep: int) -> Removal:
        """What is gone if the `keep` units of `target` with the highest `scores` stay."""
        return {target.name: lowest_units(scores, len(scores) - keep)}

    def refined(self, target: Target, removal: Removal) -> Removal:
        """Returns `removal`: the scores of units are those of their removal one after the other."""
        return removal

    def kept(self, target: Target, units: int) -> int:
        """What stays if `units` stay, as `CostTracker` counts it: units."""
        return units

    def scores_of_kept(self, network: nn.Module, target: Target, scores: Tensor) -> Tensor:
        """Those of `scores` (target.units,), float64, whose units are still there, to be compared between targets."""
        scores = scores.double()
        if self.config.criterion == SECOND_ORDER and self._compensator is not None:
            scores = scores * self._compensator.sensitivity(network, self._group(network, target))
        return scores[scores >= 0]

    def masked(self, network: nn.Module, removal: Removal) -> AbstractContextManager[Any]:
        """See `SearchSpace.masked`."""
        groups = {g.name: g for g in self.groups(network)}
        with ExitStack() as stack:
            for name, units in removal.items():
                stack.enter_context(mask_units(network, groups[name], units))
            if self._repairer is not None:
                stack.enter_context(self._repairer.compensated(network, self._lost(groups, removal)))
            return stack.pop_all()

    def commit(self, network: nn.Module, removal: Removal) -> Change:
        """Slices the network; with `shrink="end"` registers masks instead."""
        groups = {g.name: g for g in self.groups(network)}
        sliced = self.config.shrink != "end"
        before: dict[str, Tensor] = {}
        if self._repairer is not None:
            names = {name for group in removal for name in self._rewritten(groups[group])}
            before = {name: stored_tensor(network, name).detach().clone() for name in sorted(names)}
        with all_or_nothing(written=owners(network, before)):
            lost = self._lost(groups, removal)
            if self._repairer is not None:
                self._repairer.settle(network, lost)
            if sliced and self._compensator is not None:
                self._compensator.narrowed(lost)
            if sliced:
                change = Change(applied=apply_plan(network, PruningPlan.removing(groups.values(), removal)))
            else:
                change = commit_masks(network, consumer_masks(network, groups, removal))
            return replace(change, rewritten=before)

    @property
    def _repairer(self) -> Compensator | None:
        """The compensator, unless it only ranks."""
        return None if self.config.compensation == "none" else self._compensator

    def _rewritten(self, group: Group) -> tuple[str, ...]:
        """The tensors that compensating a cut of the group changes."""
        return () if self._repairer is None else self._repairer.tensors(group)

    def _lost(self, groups: Mapping[str, Group], removal: Removal) -> dict[str, frozenset[int]]:
        """The columns of the readers that go with a removal."""
        lost: dict[str, frozenset[int]] = {}
        for name, units in removal.items():
            here = {} if self._compensator is None else self._compensator.lost_columns(groups[name], units)
            lost |= {reader: lost.get(reader, frozenset()) | columns for reader, columns in here.items()}
        return lost

    def _unit_scores(self, network: nn.Module, group: Group, gradients: Gradients | None) -> Tensor:
        if self.config.criterion != SECOND_ORDER:
            return unit_scores(network, group, self.config.criterion, gradients)
        errors = None if self._compensator is None else self._compensator.removal_errors(group)
        if errors is not None:
            return errors
        return unit_scores(network, group, WITHOUT_READERS, gradients)

    def _unreadable(self, group: Group) -> ValueError:
        return ValueError(
            f"criterion='second_order': no layer reads the units of {group.name} as columns that could be solved "
            f"again ({self._why_not(group)}); leave it out (kinds=, layers=), or take another criterion"
        )

    def without_readers(self, network: nn.Module) -> dict[str, str]:
        """{group: why} of those that "second_order" cannot rank; `WITHOUT_READERS` ranks them."""
        if self.config.criterion != SECOND_ORDER or self._compensator is None:
            return {}
        return {g.name: self._why_not(g) for g in self.groups(network) if not self._compensator.ranks(g)}

    def _why_not(self, group: Group) -> str:
        known = {} if self._compensator is None else self._compensator.readers.left_alone
        reasons = [f"{n}: {known[n]}" for p in group.consumers() if (n := p.tensor.removesuffix(".weight")) in known]
        return "; ".join(reasons) or f"kind {group.kind!r}"

    def costs(self, network: nn.Module, input_shape: Sequence[int] | None) -> CostTracker:
        """See `SearchSpace.costs`."""
        return CostTracker(network, self.groups(network), input_shape)

    def _group(self, network: nn.Module, target: Target) -> Group:
        return next(g for g in self.groups(network) if g.name == target.name)


def _owned(shapes: Mapping[str, torch.Size], group: Group) -> int:
    """The number of parameter elements that the units of `group` own."""
    parts = [(shapes[s.tensor], s) for s in group.slices if s.tensor in shapes]
    return sum(math.prod(shape) // shape[s.axis] * s.width * len(s.offsets) * group.units for shape, s in parts)
