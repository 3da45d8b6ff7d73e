"""Where the tolerance ends: a score at the floor is within it, one a hundredth of a point below is not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from support.callback_cases import vit
from torch import nn

from swincompress_pl.pruning import AdaptivePruningConfig, SearchSession

BASELINE, TOLERANCE = 90.0, 1.0
FLOOR = BASELINE - TOLERANCE


def scripted(*wanted: float) -> Callable[[nn.Module], float]:
    """Gives these scores, one per call, and then the last one again."""
    found = itertools.chain(wanted, itertools.repeat(wanted[-1]))
    return lambda network: next(found)


def session(*scores: float) -> SearchSession:
    config = AdaptivePruningConfig(tolerance=TOLERANCE, step=0.25, max_sparsity=0.75)
    return SearchSession(vit(), scripted(*scores), config)


CASES = [(FLOOR, True), (FLOOR - 0.01, False), (FLOOR - 0.4, False)]


@pytest.mark.parametrize("retrains", [True, False])
@pytest.mark.parametrize(("score", "within"), CASES)
def test_a_round_begins_from_the_floor_on(score: float, within: bool, retrains: bool) -> None:
    """Training may have left the network below it."""
    search = session(BASELINE, score)
    search.network_changed()
    outcome = search.round(retrains=retrains)
    assert (outcome.steps != ()) is within
    assert outcome.state.score == score
    stops = not within and not retrains
    assert str(outcome.state.stopped).endswith("are below the tolerance before anything is tried") is stops


@pytest.mark.parametrize(("score", "within"), CASES)
def test_a_candidate_is_kept_from_the_floor_on(score: float, within: bool) -> None:
    """The network as it stands is scored once, as the baseline."""
    outcome = session(BASELINE, score).round()
    assert {step.accepted for step in outcome.steps} == {within}


@pytest.mark.parametrize(("score", "within"), CASES)
def test_a_round_is_kept_from_the_floor_on(score: float, within: bool) -> None:
    """Each of the four steps is within the tolerance; what they are together is scored at the end."""
    outcome = session(BASELINE, *[BASELINE] * 4, score).round()
    assert [step.accepted for step in outcome.steps] == [True] * 4 + [False] * (0 if within else 4)
    assert bool(outcome.applied.tensors) is within
