"""What a search may remove: units of structured groups, or single weights.

A search space lists its targets, chooses what goes (the lowest scores), masks it for a trial, and makes it permanent.
There are two: `StructuredSpace` slices units away, and `WeightSpace` keeps weights, n:m, blocks or filters at zero by
masks. `GlobalSpace` treats the whole network as a single target of either, so that one step takes the lowest scores of
all layers together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from swincompress_pl import arguments
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.compensation.compensator import Compensator, Method
from swincompress_pl.pruning.compensation.masks import MaskCompensator
from swincompress_pl.pruning.compensation.plans import images_of
from swincompress_pl.pruning.compensation.readers import Predict
from swincompress_pl.pruning.criteria import (
    CRITERIA,
    SECOND_ORDER,
    Criterion,
    Gradients,
    estimates_loss,
    lowest_units,
    unit_scores,
    weight_scores,
)
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero
from swincompress_pl.pruning.structure.apply import apply_plan, check_layers, stored_tensor
from swincompress_pl.pruning.structure.change import Change, commit_masks, consumer_masks, gone_units, owners
from swincompress_pl.pruning.structure.cost import CostTracker, count_macs, skeleton
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.patterns import Pattern, parse_granularity
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.trial import FirstInputs, check_cuts
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, temporary_mask
from swincompress_pl.registry import ExplainingAdapter, adapter_for

Removal = Mapping[str, Any]
"""All that is gone: the unit indices of each group, or the mask of each parameter, True where a weight stays."""

WHOLE_NETWORK = "network"
WITHOUT_READERS = "magnitude"
"""What ranks, under "second_order", units that no layer reads as columns: only against units of their own group."""

_PER_MILLE = 1000
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
        round_to: Kept widths, except those of heads, are multiples of it; only for "structured".
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

    def removal(self, network: nn.Module, target: Target, keep: int, gradients: Gradients | None) -> Removal:
        """What is gone of a target if `keep` units stay: the lowest scores go first, as rank 0 computes them."""
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


def local_space(
    config: SpaceConfig, initial_units: Mapping[str, int] | None = None, compensator: Compensator | None = None
) -> StructuredSpace | WeightSpace:
    """The space of `config` with a target for every group or layer.

    `initial_units` are the widths before the search, if it has begun already. `compensator` makes up for what goes; it
    belongs to the search, because it outlives the space of a round.
    """
    if config.granularity == "structured":
        return StructuredSpace(config, initial_units, compensator)
    pattern = parse_granularity(config.granularity, block_shape=config.block_shape)
    return WeightSpace(config, pattern, compensator)


def search_space(
    config: SpaceConfig,
    initial_units: Mapping[str, int] | None = None,
    input_shape: Sequence[int] | None = None,
    compensator: Compensator | None = None,
) -> StructuredSpace | WeightSpace | GlobalSpace:
    """The space that `config` asks for; see `local_space`.

    `input_shape` is that of one input with its batch axis. A global ranking needs it to know what a unit costs in MACs.
    """
    local = local_space(config, initial_units, compensator)
    return GlobalSpace(local, input_shape) if config.ranking == "global" else local


def needs_calibration(config: SpaceConfig) -> bool:
    """Whether unlabelled images are needed: to compensate what goes, or to rank by it."""
    return config.compensation != "none" or config.criterion == SECOND_ORDER


def compensator_for(
    config: SpaceConfig, calibration: Iterable[Any] | None, *, intercepts: bool = True, predict: Predict | None = None
) -> Compensator | None:
    """The compensator that a config asks for, with images from batches (images, ...) or tensors; None for none.

    A ValueError says so if there are no images for it.
    """
    if not needs_calibration(config):
        return None
    if calibration is None:
        asked = "compensation" if config.compensation != "none" else "criterion"
        raise ValueError(
            f"{asked}={getattr(config, asked)!r} needs calibration=: batches of unlabelled training images, e.g. a "
            "DataLoader over a few hundred"
        )
    method: Method = "ridge" if config.compensation == "none" else config.compensation
    return Compensator(images_of(calibration), method=method, predict=predict, intercepts=intercepts)


def check_on_trial(
    network: nn.Module, config: SpaceConfig, heard: FirstInputs, input_shape: Sequence[int] | None
) -> None:
    """Raises ValueError if units cannot be cut as the groups say (`check_cuts`).

    `heard` has the inputs of the network while it was scored. If scoring did not call it, images are made of
    `input_shape`; without either, nothing is checked. Masks of weights change no shape, and need no trial.
    """
    arguments = heard.or_random(network, input_shape)
    if config.granularity == "structured" and arguments is not None:
        check_cuts(network, StructuredSpace(config).groups(network), arguments)


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
        names = set(_matching([g.name for g in chosen], self.config.layers))
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
                    granule=1 if g.kind == "heads" else self.config.round_to,
                    weights=_owned(shapes, g) // g.units * before,
                    tensors=tuple(dict.fromkeys([*g.masked_parameters(), *self._rewritten(g)])),
                )
            )
        return found

    def scores(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Tensor:
        """The scores of the group's units; those that are masked already score below all others."""
        group = self._group(network, target)
        scores = self._unit_scores(network, group, gradients)
        gone = list(gone_units(network, group))
        scores[gone] = -1.0
        return scores

    def removal(self, network: nn.Module, target: Target, keep: int, gradients: Gradients | None) -> Removal:
        """See `SearchSpace.removal`."""
        return from_rank_zero(self.lowest(self.scores(network, target, gradients), target, keep))

    def lowest(self, scores: Tensor, target: Target, keep: int) -> Removal:
        """What is gone if the `keep` units of `target` with the highest `scores` stay."""
        return {target.name: lowest_units(scores, len(scores) - keep)}

    def refined(self, target: Target, removal: Removal) -> Removal:
        """Returns `removal`: the scores of units are those of their removal one after the other."""
        return removal

    def kept(self, target: Target, units: int) -> int:
        """What stays if `units` stay, as `CostTracker` counts it: units."""
        return units

    def scores_of_kept(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Tensor:
        """The scores (target.units,), float64, of the units that are still there, to be compared between targets."""
        scores = self.scores(network, target, gradients).double()
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
        return {g.name: self._why_not(g) for g in self.groups(network) if not self._compensator.tensors(g)}

    def _why_not(self, group: Group) -> str:
        known = {} if self._compensator is None else self._compensator.readers.left_alone
        reasons = [f"{n}: {known[n]}" for p in group.consumers() if (n := p.tensor.removesuffix(".weight")) in known]
        return "; ".join(reasons) or f"kind {group.kind!r}"

    def costs(self, network: nn.Module, input_shape: Sequence[int] | None) -> CostTracker:
        """See `SearchSpace.costs`."""
        return CostTracker(network, self.groups(network), input_shape)

    def _group(self, network: nn.Module, target: Target) -> Group:
        return next(g for g in self.groups(network) if g.name == target.name)


class WeightSpace:
    """Weights of the linear layers and convolutions in the network's segments, divided by a pattern and kept at zero.

    The layer that reads the pixels (patch embedding) and the head are left alone, as in the paper.
    """

    def __init__(self, config: SpaceConfig, pattern: Pattern, compensator: Compensator | None = None) -> None:
        self.config, self.pattern = config, pattern
        self._compensator: MaskCompensator | None = None
        if compensator is not None:
            self._compensator = MaskCompensator(compensator, writes=config.compensation != "none")
        self._refined: dict[str, tuple[Tensor, Tensor]] = {}  # the latest of each layer, before and after

    def prepare(self, network: nn.Module) -> None:
        """Begins a round on the network as it is now: collects what compensation and "second_order" need."""
        self._refined = {}
        if self._compensator is not None:
            self._compensator.begin_round(network, self._names(network))

    def _names(self, network: nn.Module) -> list[str]:
        """The weights that may be masked."""
        prunable = prunable_weights(network)
        if not prunable:
            raise ValueError(
                f"granularity={self.config.granularity!r}: {type(network).__name__} has no linear layer or convolution "
                "behind the one that reads the pixels; there is nothing to prune"
            )
        names = _matching(prunable, self.config.layers)
        check_layers(network, names)
        return names

    def targets(self, network: nn.Module) -> list[Target]:
        """One target per layer."""
        parameters = dict(network.named_parameters(remove_duplicate=False))  # a shared one is refused by its own name
        names, masks = self._names(network), masked_parameters(network)
        found = []
        for name in names:
            shape = tuple(parameters[name].shape)
            self.pattern.check(name, shape)
            units = self.pattern.units(shape)
            weights = parameters[name].numel()
            kept = units
            if name in masks:
                kept = round(int(masks[name][1].sum()) * units / weights)
            found.append(
                Target(
                    name=name,
                    kind="weight",
                    units=kept,
                    initial_units=units,
                    min_units=self.pattern.min_units,
                    weights=weights,
                    tensors=tuple(dict.fromkeys([name, *self._rewritten(name)])),
                )
            )
        return found

    def scores(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Tensor:
        """The scores of the parameter's weights; those that are masked already score below all others."""
        if self.config.criterion == SECOND_ORDER:
            scores = self._errors(network, target.name)
        else:
            scores = weight_scores(network, target.name, self.config.criterion, gradients)
        masks = masked_parameters(network)
        if target.name in masks:
            scores = scores.masked_fill(~masks[target.name][1].to(scores.device), -1.0)
        return scores

    def removal(self, network: nn.Module, target: Target, keep: int, gradients: Gradients | None) -> Removal:
        """See `SearchSpace.removal`."""
        return from_rank_zero(self.lowest(self.scores(network, target, gradients), target, keep))

    def lowest(self, scores: Tensor, target: Target, keep: int) -> Removal:
        """What is gone if the `keep` units of `target` with the highest `scores` stay."""
        return {target.name: self.pattern.keep_mask(scores, keep)}

    def refined(self, target: Target, removal: Removal) -> Removal:
        """The mask of as many weights that costs least, where `criterion` is "second_order"; else `removal`."""
        if self.config.criterion != SECOND_ORDER or self._compensator is None:
            return removal
        known = self._refined.get(target.name)
        if known is None or not torch.equal(known[0], removal[target.name]):
            known = self._refined[target.name] = removal[target.name], self._best_mask(target, removal[target.name])
        return {target.name: known[1]}

    def _best_mask(self, target: Target, mask: Tensor) -> Tensor:
        assert self._compensator is not None
        keep = round(int(mask.sum()) * target.initial_units / target.weights)

        def kept(saliency: Tensor, part: float) -> Tensor:
            return self.pattern.keep_mask(saliency, target.units - round((target.units - keep) * part))

        found = self._compensator.best_mask(target.name, kept, mask.shape)
        return mask if found is None else from_rank_zero(found.to(mask.device))

    def kept(self, target: Target, units: int) -> int:
        """What stays if `units` stay, as `CostTracker` counts it: weights."""
        return target.weights // target.initial_units * units

    def scores_of_kept(self, network: nn.Module, target: Target, gradients: Gradients | None) -> Tensor:
        """The scores (target.units,), float64, of the units that are still there, to be compared between targets."""
        saliency = self.scores(network, target, gradients)
        scores = self.pattern.unit_scores(saliency).double().cpu()
        if self.config.criterion == SECOND_ORDER:
            scores = scores * self._sensitivity(network, target, saliency)
        return scores[scores >= 0]

    def _sensitivity(self, network: nn.Module, target: Target, saliency: Tensor) -> float:
        """How far the network's answers move per unit of score, measured once: half of the weights go on trial."""
        assert self._compensator is not None
        removal = self.refined(target, self.lowest(saliency, target, max(target.units // 2, target.min_units)))
        error = float(saliency[(saliency >= 0) & ~removal[target.name].to(saliency.device)].sum())
        return self._compensator.sensitivity(network, removal, error)

    def masked(self, network: nn.Module, removal: Removal) -> AbstractContextManager[Any]:
        """See `SearchSpace.masked`."""
        if self._compensator is not None:
            return self._compensator.masked(network, removal)
        with ExitStack() as stack:
            for name, mask in removal.items():
                stack.enter_context(temporary_mask(network, name, mask))
            return stack.pop_all()

    def commit(self, network: nn.Module, removal: Removal) -> Change:
        """Registers masks."""
        if self._compensator is None:
            return commit_masks(network, removal)
        names = sorted({tensor for name in removal for tensor in self._rewritten(name)})
        before = {name: stored_tensor(network, name).detach().clone() for name in names}
        with all_or_nothing(written=owners(network, [*removal, *before])):
            self._compensator.settle(network, removal)
            return replace(commit_masks(network, removal), rewritten=before)

    def _rewritten(self, name: str) -> tuple[str, ...]:
        """The tensors that compensating a mask changes."""
        return () if self._compensator is None else self._compensator.tensors(name)

    def _errors(self, network: nn.Module, name: str) -> Tensor:
        shape = stored_tensor(network, name).shape
        errors = None if self._compensator is None else self._compensator.errors(name, shape)
        if errors is None:
            reason = "the space has no calibration images" if self._compensator is None else self._compensator.why(name)
            raise ValueError(
                f"criterion='second_order': the weights of {name} cannot be solved again ({reason}); leave the layer "
                "out (layers=), or take another criterion"
            )
        return errors

    def costs(self, network: nn.Module, input_shape: Sequence[int] | None) -> CostTracker:
        """See `SearchSpace.costs`."""
        return CostTracker(network, None, input_shape)


class GlobalSpace:
    """The whole network as one target, in per mille of its prunable weights: a step takes the lowest scores anywhere.

    Scores that estimate the loss (`estimates_loss`, the Fisher criteria) are divided by what the unit costs. So a step
    takes what saves most per loss, in the order in which a knapsack is filled. The cost of a structured unit is in MACs
    if `target_of` is "macs" and `input_shape` is known; any other cost is in parameters. Other scores stay as they are.
    Every member keeps what `max_sparsity`, `round_to` and its own limits ask for, so a step may remove less than asked.
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

    def removal(self, network: nn.Module, target: Target, keep: int, gradients: Gradients | None) -> Removal:
        """See `SearchSpace.removal`; `keep` is in per mille."""
        removal: dict[str, Any] = {}
        for member, width in zip(target.members, self._widths(network, target, keep, gradients), strict=True):
            if width < member.units:
                scores = self.local.scores(network, member, gradients)
                removal.update(self.local.lowest(scores, member, width))
        return from_rank_zero(removal)

    def _widths(self, network: nn.Module, target: Target, keep: int, gradients: Gradients | None) -> list[int]:
        """The members' widths if together they lose the lowest (target.units - keep) per mille of all weights."""
        scores = [self.local.scores_of_kept(network, m, gradients) for m in target.members]
        if estimates_loss(self.config.criterion):
            # A space lives for one round, in which nothing is sliced.
            self._known_prices = prices = self._known_prices or self._prices(network, target.members)
            scores = [each / price for each, price in zip(scores, prices, strict=True)]
        owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
        costs = torch.tensor([m.weights / m.initial_units for m in target.members], dtype=torch.float64)
        order = torch.argsort(torch.cat(scores), stable=True)
        budget = target.weights * (target.units - keep) / _PER_MILLE
        count = int((costs[owners[order]].cumsum(0) <= budget * (1 + 1e-9)).sum())
        gone = torch.bincount(owners[order[:count]], minlength=len(target.members)).tolist()
        widths = []
        for member, removed in zip(target.members, gone, strict=True):
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


def prunable_weights(network: nn.Module) -> list[str]:
    """The weights of linear layers and convolutions inside the network's segments, without the one that reads pixels.

    The latter is the first of them.
    """
    segments = adapter_for(network).segments(network)
    return [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and any(name.startswith(f"{segment}.") for segment in segments)
    ][1:]


def _owned(shapes: Mapping[str, torch.Size], group: Group) -> int:
    """The number of parameter elements that the units of `group` own."""
    parts = [(shapes[s.tensor], s) for s in group.slices if s.tensor in shapes]
    return sum(math.prod(shape) // shape[s.axis] * s.width * len(s.offsets) * group.units for shape, s in parts)


def _matching(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that any pattern matches, all for None; a ValueError for a pattern that matches none."""
    if patterns is None:
        return list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(list(names)[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            raise ValueError(f"layers: {pattern!r} matches nothing that can be pruned; there is {shown}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
