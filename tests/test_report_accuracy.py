"""Accuracies carry their uncertainty, and losses are judged on paired predictions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]  # scikit-learn brings it

from swincompress_pl.report import Accuracy, PairedComparison, wilson_interval

COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
CELLS = st.tuples(*[st.integers(0, 200)] * 4).filter(lambda cells: sum(cells) > 0)


@given(COUNTS)
def test_wilson_interval_is_scipys(counts: tuple[int, int]) -> None:
    correct, images = counts
    expected = binomtest(correct, images).proportion_ci(method="wilson")
    assert wilson_interval(correct, images) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(COUNTS)
def test_wilson_interval_holds_the_share(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    assert 0.0 <= low <= counts[0] / counts[1] <= high <= 1.0
    assert low < high


def test_600_images_have_a_margin_of_about_3_points() -> None:
    low, high = Accuracy(correct=510, images=600).interval_percent
    assert 2.7 < (high - low) / 2 < 3.1


@pytest.mark.parametrize(("correct", "images"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(correct: int, images: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} correct of {images} images"):
        Accuracy(correct=correct, images=images)


def test_accuracy_of_predictions() -> None:
    accuracy = Accuracy.of(np.array([1, 2, 3, 3]), np.array([1, 2, 3, 4]))
    assert (accuracy.correct, accuracy.images, accuracy.percent) == (3, 4, 75.0)
    assert "n = 4" in str(accuracy)
    assert Accuracy.from_dict(accuracy.to_dict()) == accuracy


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros(3, int), np.zeros(4, int), "lengths differ: predictions 3, labels 4"),
        (np.zeros((3, 10)), np.zeros(3, int), r"predictions is float64 of shape \(3, 10\)"),
    ],
)
def test_logits_or_other_lengths_are_refused(predictions: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Accuracy.of(predictions, labels)


def test_paired_comparison_counts_every_way() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0])
    before = np.array([0, 0, 0, 1, 1, 1])
    after = np.array([0, 1, 2, 0, 1, 2])
    paired = PairedComparison.of(before, after, labels)
    assert (paired.both_right, paired.right_to_wrong, paired.wrong_to_right, paired.both_wrong) == (1, 2, 1, 2)
    assert paired.same_predictions == 2
    assert paired.change_points == pytest.approx(-100 / 6)
    assert PairedComparison.from_dict(paired.to_dict()) == paired


@given(CELLS)
def test_mid_p_is_the_binomial_test_less_half_the_point(cells: tuple[int, int, int, int]) -> None:
    right, lost, gained, wrong = cells
    paired = PairedComparison(
        both_right=right, right_to_wrong=lost, wrong_to_right=gained, both_wrong=wrong, same_predictions=right
    )
    if lost + gained == 0:
        assert paired.p_value == 1.0
        return
    from scipy.stats import binom

    n, k = lost + gained, min(lost, gained)
    expected = min(1.0, 2 * binom.cdf(k, n, 0.5) - binom.pmf(k, n, 0.5))
    assert paired.p_value == pytest.approx(expected, rel=1e-9)


@given(CELLS)
def test_interval_holds_the_shrunken_change_and_mirrors(cells: tuple[int, int, int, int]) -> None:
    right, lost, gained, wrong = cells
    paired = PairedComparison(
        both_right=right, right_to_wrong=lost, wrong_to_right=gained, both_wrong=wrong, same_predictions=right
    )
    mirror = PairedComparison(
        both_right=right, right_to_wrong=gained, wrong_to_right=lost, both_wrong=wrong, same_predictions=right
    )
    low, high = paired.interval_points
    assert -100.0 <= low <= 100.0 * (gained - lost) / (paired.images + 2) <= high <= 100.0
    assert mirror.interval_points == pytest.approx((-high, -low))
    assert mirror.change_points == -paired.change_points


def test_contradicting_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="9 same predictions contradict"):
        PairedComparison(both_right=3, right_to_wrong=1, wrong_to_right=1, both_wrong=1, same_predictions=9)
    with pytest.raises(ValueError, match="at least one image"):
        PairedComparison(both_right=0, right_to_wrong=0, wrong_to_right=0, both_wrong=0, same_predictions=0)
