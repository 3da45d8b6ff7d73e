"""The sequential test: its counts are right, and its decisions are those of all images."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swincompress_pl.pruning.evaluation.sequential_test import (
    Order,
    Predictions,
    Standing,
    Tally,
    Trial,
    add_tallies,
    deviations_for,
    look_parts,
    make_order,
)


def _reference(images: int, rng: np.random.Generator) -> Predictions:
    margin = rng.normal(3, 3, images)
    return Predictions(margin > 0, margin)


def _shifted(before: Predictions, shift: np.ndarray) -> Predictions:
    margin = before.margin + shift
    return Predictions(margin > 0, margin)


def _order(reference: Predictions, rng: np.random.Generator, batch_size: int = 16) -> Order:
    labels = rng.integers(0, 5, len(reference.margin))
    return make_order(reference, labels, batch_size=batch_size, seed=0)


def _decide(standing: Standing, candidate: Predictions, needed: int, confidence: float = 0.99) -> tuple[bool, Trial]:
    trial, parts = Trial(standing), look_parts()
    for part in parts:
        while trial.seen < part * len(candidate.margin):
            batch = trial.next_batch()
            assert batch is not None
            trial.add(batch, candidate.at(standing.order.batches[batch]))
        answer = trial.tally().decide(needed, deviations_for(confidence, len(parts) - 1))
        if answer is not None:
            return answer, trial
    raise AssertionError("undecided with every image seen")


@given(images=st.integers(1, 700), batch_size=st.integers(1, 64), classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_order_is_a_partition_into_batches(images: int, batch_size: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    reference = _reference(images, rng)
    order = make_order(reference, labels, batch_size=batch_size, seed=seed)
    assert sorted(np.concatenate(order.batches).tolist()) == list(range(images))
    assert all(1 <= len(batch) <= batch_size for batch in order.batches)
    assert sorted([*range(order.pilot), *(n for own in order.pure for n in own)]) == list(range(len(order.batches)))
    for stratum, own in enumerate(order.pure):
        assert all((order.stratum[order.batches[number]] == stratum).all() for number in own)
    again = make_order(reference, labels, batch_size=batch_size, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(order.batches, again.batches, strict=True))


def test_small_margins_make_the_small_strata_and_classes_stay_in_proportion() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 400)
    reference = _reference(4000, rng)
    order = make_order(reference, labels, batch_size=40, seed=0)
    assert np.bincount(order.stratum).tolist() == [250, 250, 500, 1000, 2000]
    margins = [np.abs(reference.margin[order.stratum == stratum]) for stratum in range(5)]
    assert all(inner.max() <= outer.min() for inner, outer in pairwise(margins))
    top = np.concatenate([order.batches[number] for number in order.pure[4][:10]])
    share = np.bincount(labels[order.stratum == 4], minlength=10) / 2000
    assert np.abs(np.bincount(labels[top], minlength=10) - 400 * share).max() <= 4


@settings(max_examples=60)
@given(
    images=st.integers(1, 400),
    seed=st.integers(0, 9999),
    scale=st.floats(0, 4),
    offset=st.integers(-30, 30),
    confidence=st.floats(0.5, 1),
)
@example(images=9, seed=0, scale=1.0, offset=0, confidence=1 - 2**-53)  # the last number before certainty
def test_what_it_calls_seen_is_counted_exactly(
    images: int, seed: int, scale: float, offset: int, confidence: float
) -> None:
    rng = np.random.default_rng(seed)
    reference = _reference(images, rng)
    standing = Standing(_order(reference, rng), reference)
    for _ in range(3):  # each candidate is accepted: chains of links, some seen on few images
        candidate = _shifted(reference, rng.normal(-0.1, scale, images))
        right = int(candidate.correct.sum())
        answer, trial = _decide(standing, candidate, right + offset, confidence)
        tally = trial.tally()
        seen = np.concatenate([standing.order.batches[batch] for batch in trial.found])
        assert len(set(seen.tolist())) == len(seen) == tally.seen
        assert tally.correct == int(candidate.correct[seen].sum())
        if tally.seen == images:
            assert (tally.estimate, tally.variance) == (right, 0.0)
            assert answer == (offset <= 0)
        else:
            assert tally.variance > 0
        if confidence == 1:
            assert answer == (offset <= 0)
        standing.accept(trial)
        assert np.array_equal(standing.latest.correct[seen], candidate.correct[seen])
        for chain in standing.chains:
            counts = [link.seen for link in chain]
            assert counts == sorted(set(counts), reverse=True)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), needed=st.integers(-5, 130))
def test_certainty_stops_the_count(seed: int, needed: int) -> None:
    """With confidence 1 the answer is that of all images, and no batch is scored after it is certain."""
    rng = np.random.default_rng(seed)
    reference = _reference(120, rng)
    candidate = _shifted(reference, rng.normal(-1, 2, 120))
    answer, trial = _decide(Standing(_order(reference, rng, 8), reference), candidate, needed, 1.0)
    right = int(candidate.correct.sum())
    assert answer == (right >= needed)
    if needed <= 0 or needed > 120:
        assert trial.seen <= 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "in proportion", "few images strongly"])
def test_wrong_decisions_are_as_rare_as_stated(kind: str) -> None:
    """Within 12 images of the floor, for shifts of several shapes: at most 1 % of the decisions by the default."""
    wrong, decisions = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        reference = _reference(2000, rng)
        shift = {
            "normal": rng.normal(-0.1, 0.3, 2000),
            "heavy tails": rng.standard_t(3, 2000) * 0.2,
            "in proportion": rng.normal(0, 0.2, 2000) * np.abs(reference.margin),
            "few images strongly": np.where(rng.random(2000) < 0.05, rng.normal(0, 2, 2000), rng.normal(0, 0.1, 2000)),
        }[kind]
        candidate = _shifted(reference, shift)
        order = _order(reference, rng, 32)
        for offset in (-12, -4, -1, 0, 1, 4, 12):
            needed = int(candidate.correct.sum()) + offset
            answer, _ = _decide(Standing(order, reference), candidate, needed)
            wrong += answer != (offset <= 0)
            decisions += 1
    assert wrong <= decisions / 100


def test_the_estimates_error_is_about_what_its_variance_says() -> None:
    """Over a chain of accepted candidates, each seen on a part of the images: standardised errors near 1."""
    squares = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        reference = _reference(2000, rng)
        standing, now = Standing(_order(reference, rng, 32), reference), reference
        for part in (0.5, 0.1, 0.3, 0.2):
            now = _shifted(now, rng.normal(-0.1, 0.3, 2000))
            trial = Trial(standing)
            while trial.seen < part * 2000:
                batch = trial.next_batch()
                assert batch is not None
                trial.add(batch, now.at(standing.order.batches[batch]))
                if batch >= standing.order.pilot - 1:
                    trial.tally()
            tally = trial.tally()
            standing.accept(trial)
            squares.append((tally.estimate - int(now.correct.sum())) ** 2 / tally.variance)
    assert 0.2 < float(np.mean(squares)) < 1.3


def test_a_candidate_that_changes_nothing_is_decided_by_the_pilot() -> None:
    rng = np.random.default_rng(0)
    reference = _reference(4000, rng)
    standing = Standing(_order(reference, rng, 64), reference)
    answer, trial = _decide(standing, reference, int(reference.correct.sum()) - 2)
    assert answer
    assert trial.seen <= 4000 // 20


@pytest.mark.parametrize("offset", [0, 1])
def test_small_shifts_are_settled_at_the_floor_itself(offset: int) -> None:
    """The floor is just met, or just missed: without the tail of the shifts every image would be scored."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference = _reference(4000, rng)
        candidate = _shifted(reference, rng.normal(-0.002, 0.005, 4000))
        needed = int(candidate.correct.sum()) + offset
        answer, trial = _decide(Standing(_order(reference, rng, 32), reference), candidate, needed)
        assert answer == (offset == 0)
        assert trial.seen <= 1500


def test_far_from_the_floor_few_images_decide() -> None:
    rng = np.random.default_rng(0)
    reference = _reference(4000, rng)
    candidate = _shifted(reference, rng.normal(-0.2, 0.3, 4000))
    for needed, expected in ((int(reference.correct.sum()) - 400, True), (int(reference.correct.sum()) + 200, False)):
        answer, trial = _decide(Standing(_order(reference, rng, 64), reference), candidate, needed)
        assert answer is expected
        assert trial.seen <= 1000


def test_shards_add_up_to_the_whole() -> None:
    tallies = [
        Tally(10, 4, 3, 8.5, 0.25, 8, 0.125),
        Tally(20, 20, 11, 11.0, 0.0, 11, 0.0),
        Tally(0, 0, 0, 0.0, 0.0, 0, 0.0),
    ]
    assert add_tallies(tallies) == Tally(30, 24, 14, 19.5, 0.25, 19, 0.125)


@pytest.mark.parametrize(
    ("needed", "answer"), [(50, True), (59, True), (60, None), (71, None), (72, False), (81, False)]
)
def test_a_decision_keeps_its_distance_and_a_whole_image(needed: int, answer: bool | None) -> None:
    """50 right of 70 seen, 30 unseen; an estimate of 65 with a deviation of 2, of which three are kept."""
    assert Tally(100, 70, 50, 65.0, 4.0, 64, 30.0).decide(needed, 3.0) is answer


@pytest.mark.parametrize(
    ("needed", "expected_changes", "answer"),
    [
        (64, 1e-4, True),  # one change would turn it: as likely as 1e-4
        (65, 1e-4, False),
        (64, 0.01, None),  # 0.01 is more than the 0.00135 beyond three deviations
        (63, 0.01, True),  # two changes: 5e-5
        (66, 0.01, False),
        (63, 0.1, None),
        (60, 0.1, True),
        (69, 0.1, False),
    ],
)
def test_where_hardly_an_answer_changes_they_are_counted(
    needed: int, expected_changes: float, answer: bool | None
) -> None:
    """64 right as things stand, and 30 unseen of which few change; by the normal distribution all stay open."""
    assert Tally(100, 70, 40, 64.5, 100.0, 64, expected_changes).decide(needed, 3.0) is answer
    assert Tally(100, 70, 40, 64.5, 100.0, 64, expected_changes).decide(needed, math.inf) is None


def test_looks_grow_to_all_and_share_the_error() -> None:
    parts = look_parts()
    assert parts[-1] == 1
    assert all(a < b for a, b in pairwise(parts))
    assert deviations_for(0.99, 1) == pytest.approx(2.326, abs=1e-3)
    assert deviations_for(0.99, 10) == pytest.approx(3.090, abs=1e-3)
    assert deviations_for(1.0, 10) == math.inf


def test_a_shard_without_images_says_nothing() -> None:
    none = Predictions(np.zeros(0, np.bool_), np.zeros(0))
    order = make_order(none, np.zeros(0, np.int64), batch_size=8, seed=0)
    trial = Trial(Standing(order, none))
    assert trial.next_batch() is None
    assert trial.tally() == Tally(0, 0, 0, 0.0, 0.0, 0, 0.0)
