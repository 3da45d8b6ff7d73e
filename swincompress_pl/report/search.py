"""A pruning search as a report reads it: the plain data of `pruning.SearchState.to_dict()`, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

SEARCH_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing that the search may make smaller; units are its own (heads, channels, weights)."""

    name: str
    kind: str
    initial_units: int
    units: int
    locked: str | None = None

    @property
    def sparsity(self) -> float:
        """The part that is gone, 0 to 1."""
        return 1.0 - self.units / self.initial_units


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """One tried step. score: points with the step taken; parameters, macs: of the network after the decision.

    images: how many were scored for the decision; exact: they were all of the hold-out.
    """

    round: int
    target: str
    kind: str
    units_before: int
    units_after: int
    score: float
    accepted: bool
    parameters: int
    macs: int | None = None
    images: int | None = None
    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What the decisions cost. image_forwards counts a forward pass that began late by its part of the depth;
    naive_images is what scoring every step on the whole hold-out would have taken."""

    images_scored: int
    image_forwards: float
    naive_images: int
    decisions: int

    @property
    def times_fewer_images(self) -> float | None:
        """How many times fewer images than the naive loop's; None before the first one."""
        return self.naive_images / self.images_scored if self.images_scored and self.naive_images else None

    @property
    def times_fewer_forwards(self) -> float | None:
        """The same with image_forwards: the work, and not the count."""
        return self.naive_images / self.image_forwards if self.image_forwards and self.naive_images else None


@dataclass(frozen=True, kw_only=True)
class PruningSearch:
    """A search's state; tolerance in points, where it is known. targets are in the network's order."""

    baseline_score: float
    baseline_parameters: int
    baseline_macs: int | None
    score: float | None
    rounds: int
    stopped: str | None
    baseline_prunable: int | None
    targets: tuple[Target, ...]
    steps: tuple[SearchStep, ...]
    sensitivity: Mapping[str, tuple[tuple[float, float], ...]]
    scoring: Scoring | None
    elapsed_s: float | None
    granularity: str
    tolerance: float | None

    @classmethod
    def of(cls, data: Mapping[str, Any] | PruningSearch) -> PruningSearch:
        """Reads `SearchState.to_dict()`, with the optional entry "tolerance" (points) beside it.

        Raises ValueError for another version and for missing, ill-typed or contradictory entries, naming them. Entries
        that no report shows are passed over.
        """
        if isinstance(data, PruningSearch):
            return data
        version = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        if version != SEARCH_VERSION:
            raise ValueError(
                f"a pruning search of version {SEARCH_VERSION} is expected, not {version!r}; pass what "
                "SearchState.to_dict() of this version of swincompress_pl gives"
            )
        try:
            search = cls._read(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the pruning search is incomplete or ill-typed: {error!r}") from error
        search._check()
        return search

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        curves = data.get("sensitivity") or {}
        return cls(
            **{key: data[key] for key in ("baseline_score", "baseline_parameters", "baseline_macs", "score")},
            **{key: data[key] for key in ("rounds", "stopped")},
            targets=tuple(_taken(Target, {"name": name, **entry}) for name, entry in data["targets"].items()),
            steps=tuple(_taken(SearchStep, entry) for entry in data["steps"]),
            sensitivity={
                name: tuple(sorted((float(share), float(score)) for share, score in curve))
                for name, curve in curves.items()
            },
            baseline_prunable=data.get("baseline_prunable"),
            scoring=_taken(Scoring, data["scoring"]) if data.get("scoring") else None,
            elapsed_s=data.get("elapsed_s"),
            granularity=data.get("granularity") or "structured",
            tolerance=data.get("tolerance"),
        )

    def _check(self) -> None:
        known = {target.name for target in self.targets}
        for target in self.targets:
            if not 0 <= target.units <= target.initial_units or target.initial_units < 1:
                raise ValueError(f"target {target.name}: {target.units} of {target.initial_units} units cannot be")
        for number, step in enumerate(self.steps, 1):
            if step.target not in known:
                raise ValueError(f"step {number} is of {step.target!r}, which is no target of this search")
            if not math.isfinite(step.score):
                raise ValueError(f"step {number} ({step.target}): the score {step.score} is no number of points")
        unknown = sorted(set(self.sensitivity) - known)
        if unknown:
            raise ValueError(f"sensitivity of {', '.join(map(repr, unknown))}, which is no target of this search")

    @property
    def last_round(self) -> int:
        """The round of the last step, also where that round is not over yet."""
        return max([self.rounds, *(step.round for step in self.steps)])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its targets, in order of appearance."""
        return tuple(dict.fromkeys(target.kind for target in self.targets))

    @property
    def parameters(self) -> int:
        """Of the network as the search left it."""
        return self.steps[-1].parameters if self.steps else self.baseline_parameters

    @property
    def macs(self) -> int | None:
        """Of the network as the search left it; None where unknown."""
        return self.steps[-1].macs if self.steps else self.baseline_macs

    def sparsity_by_round(self) -> npt.NDArray[np.float64]:
        """(targets, rounds) in [0, 1]: what of each target is gone after each round.

        It follows the accepted steps; the last column is what the targets themselves say.
        """
        gone = np.zeros((len(self.targets), self.last_round))
        row = {target.name: number for number, target in enumerate(self.targets)}
        for step in self.steps:
            if step.accepted:
                left = step.units_after / self.targets[row[step.target]].initial_units
                gone[row[step.target], step.round - 1 :] = 1.0 - left
        if self.last_round:
            gone[:, -1] = [target.sparsity for target in self.targets]
        return gone


def _taken(kind: Any, entry: Mapping[str, Any]) -> Any:
    """`kind` from those entries that it knows."""
    return kind(**{field.name: entry[field.name] for field in fields(kind) if field.name in entry})
