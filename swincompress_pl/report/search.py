"""A pruning search in a record: its state, read from plain data and checked, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl.pruning.adaptive.state import SearchState, TargetState
from swincompress_pl.pruning.evaluation.scorer import ScoringCost
from swincompress_pl.report.plain import read_plain


def read_search(data: Mapping[str, Any] | SearchState) -> SearchState:
    """Reads `SearchState.to_dict()`; "tolerance", in points, is None if it is unknown.

    A ValueError names missing, ill-typed or contradictory entries, or another version.
    """
    if isinstance(data, Mapping) and "tolerance" in data and data["tolerance"] is None:
        state = read_plain(SearchState, {**data, "tolerance": 0.0}, "the pruning search", _check)
        state.tolerance = None  # type: ignore[assignment]  # for the report alone; no search goes on from here
        return state
    return read_plain(SearchState, data, "the pruning search", _check)


def _check(state: SearchState) -> None:
    for name, target in state.targets.items():
        if not 0 <= target.units <= target.initial_units or target.initial_units < 1:
            raise ValueError(f"target {name}: {target.units} of {target.initial_units} units are impossible")
    for number, step in enumerate(state.steps, 1):
        if step.target not in state.targets:
            raise ValueError(f"step {number} is of {step.target!r}, which is not a target of this search")
    unknown = sorted(set(state.sensitivity) - set(state.targets))
    if unknown:
        raise ValueError(f"sensitivity of {', '.join(map(repr, unknown))}, which is not a target of this search")
    missing = sorted({field.name for field in fields(ScoringCost)} - set(state.scoring)) if state.scoring else []
    if missing:
        raise ValueError(f"scoring has no {', '.join(missing)}; it is the plain data of a ScoringCost")


def last_round(state: SearchState) -> int:
    """The round of the last step, even if that round is not over."""
    return max([state.rounds, *(step.round for step in state.steps)])


def parameters_left(state: SearchState) -> int:
    """The parameters of the network as the search left it."""
    return state.steps[-1].parameters if state.steps else state.baseline_parameters


def macs_left(state: SearchState) -> int | None:
    """The MACs per image of the network as the search left it; None if unknown."""
    return state.steps[-1].macs if state.steps else state.baseline_macs


def kinds_of(state: SearchState) -> tuple[str, ...]:
    """The kinds of its targets, in order of appearance."""
    return tuple(dict.fromkeys(target.kind for target in state.targets.values()))


def sparsity_of(target: TargetState) -> float:
    """The part of a target that is removed, 0 to 1."""
    return 1.0 - target.units / target.initial_units


def sparsities_by_round(state: SearchState) -> npt.NDArray[np.float64]:
    """The part of each target that is removed after each round, (targets, rounds) in [0, 1].

    It follows the accepted steps. The last column is what the targets themselves say.
    """
    gone = np.zeros((len(state.targets), last_round(state)))
    row = {name: number for number, name in enumerate(state.targets)}
    for step in state.steps:
        if step.accepted:
            left = step.units_after / state.targets[step.target].initial_units
            gone[row[step.target], step.round - 1 :] = 1.0 - left
    if gone.shape[1]:
        gone[:, -1] = [sparsity_of(target) for target in state.targets.values()]
    return gone


def sensitivity_curve(state: SearchState, target: str) -> list[tuple[float, float]]:
    """[(part removed, score in points), ...] of one target alone, in increasing order; empty if unknown."""
    return sorted((float(share), float(score)) for share, score in state.sensitivity.get(target, ()))


def times_fewer_images(scoring: Mapping[str, Any]) -> float | None:
    """How many times fewer images were scored than in the naive loop; None before the first image."""
    return _times_fewer(scoring, "images_scored")


def times_fewer_forwards(scoring: Mapping[str, Any]) -> float | None:
    """How many times less work, in whole forward passes, the scoring was than in the naive loop."""
    return _times_fewer(scoring, "image_forwards")


def _times_fewer(scoring: Mapping[str, Any], taken: str) -> float | None:
    naive, ours = scoring.get("naive_images"), scoring.get(taken)
    return naive / ours if naive and ours else None
