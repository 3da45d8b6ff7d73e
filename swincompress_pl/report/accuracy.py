"""Accuracy with its uncertainty: an interval for every figure, and paired comparisons for every loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.integer[Any]] | Sequence[int]
_Z_95 = NormalDist().inv_cdf(0.975)


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Computes the 95 % score interval of a proportion (Wilson 1927), which also holds at 0 and at 1.

    Args:
        correct: Number of correct answers, 0 to `images`.
        images: Number of images, 1 or more.

    Returns:
        The lower and the upper end, in [0, 1].

    Raises:
        ValueError: If the counts are outside their ranges.
    """
    if not 0 <= correct <= images or images < 1:
        raise ValueError(
            f"{correct} correct of {images} images: correct must lie in [0, images], and there must be an image"
        )
    share, z2 = correct / images, _Z_95**2
    center = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = _Z_95 / (1 + z2 / images) * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2))
    low = 0.0 if correct == 0 else max(0.0, center - half)
    high = 1.0 if correct == images else min(1.0, center + half)
    return low, high


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracy as counts.

    Attributes:
        correct: Number of images whose class was predicted, 0 to `images`.
        images: Number of images, 1 or more.

    Raises:
        ValueError: If the counts are outside their ranges.
    """

    correct: int
    images: int

    def __post_init__(self) -> None:
        wilson_interval(self.correct, self.images)

    @classmethod
    def of(cls, predictions: Labels, labels: Labels) -> Accuracy:
        """Counts the correct predictions.

        Args:
            predictions: (N,) predicted class numbers, integers.
            labels: (N,) true class numbers, integers.

        Returns:
            The accuracy.

        Raises:
            ValueError: If an argument is not integers of shape (N,), the lengths differ, or N is 0.
        """
        predicted, true = _vector("predictions", predictions), _vector("labels", labels)
        _same_length(predictions=predicted, labels=true)
        return cls(correct=int((predicted == true).sum()), images=len(true))

    @property
    def percent(self) -> float:
        """Top-1 accuracy in percent, 0 to 100."""
        return 100.0 * self.correct / self.images

    @property
    def interval_percent(self) -> tuple[float, float]:
        """The 95 % Wilson interval in percent."""
        low, high = wilson_interval(self.correct, self.images)
        return 100.0 * low, 100.0 * high

    def __str__(self) -> str:
        low, high = self.interval_percent
        return f"{self.percent:.2f} % [{low:.2f}, {high:.2f}], n = {self.images}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts, and the percentages that follow from them."""
        return {
            "correct": self.correct,
            "images": self.images,
            "top1_percent": self.percent,
            "interval95_percent": list(self.interval_percent),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Accuracy:
        """Rebuilds what `to_dict` gave; the percentages are computed again.

        Args:
            data: The plain data.

        Returns:
            The accuracy.

        Raises:
            KeyError: If a count is missing.
            ValueError: If the counts are outside their ranges.
        """
        return cls(correct=data["correct"], images=data["images"])


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Compares two models image by image: `before` and `after` a compression.

    Attributes:
        both_right: Images that both models classify correctly.
        right_to_wrong: Images that only `before` classifies correctly.
        wrong_to_right: Images that only `after` classifies correctly.
        both_wrong: Images that neither model classifies correctly.
        same_predictions: Images for which both models predict the same class, right or wrong.

    Raises:
        ValueError: If a count is negative, there are no images, or the counts contradict each other.
    """

    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int
    same_predictions: int

    def __post_init__(self) -> None:
        cells = (self.both_right, self.right_to_wrong, self.wrong_to_right, self.both_wrong)
        if min(cells) < 0 or sum(cells) < 1:
            raise ValueError(f"paired counts {cells}: they must be at least 0 and count at least one image")
        if not self.both_right <= self.same_predictions <= self.both_right + self.both_wrong:
            raise ValueError(f"{self.same_predictions} same predictions contradict the paired counts {cells}")

    @classmethod
    def of(cls, before: Labels, after: Labels, labels: Labels) -> PairedComparison:
        """Counts the agreements and changes.

        Args:
            before: (N,) class numbers that the first model predicts, integers.
            after: (N,) class numbers that the second model predicts, integers.
            labels: (N,) true class numbers, integers.

        Returns:
            The comparison.

        Raises:
            ValueError: If an argument is not integers of shape (N,), the lengths differ, or N is 0.
        """
        old, new, true = _vector("before", before), _vector("after", after), _vector("labels", labels)
        _same_length(before=old, after=new, labels=true)
        was, is_now = old == true, new == true
        return cls(
            both_right=int((was & is_now).sum()),
            right_to_wrong=int((was & ~is_now).sum()),
            wrong_to_right=int((~was & is_now).sum()),
            both_wrong=int((~was & ~is_now).sum()),
            same_predictions=int((old == new).sum()),
        )

    @property
    def images(self) -> int:
        """The number of images."""
        return self.both_right + self.right_to_wrong + self.wrong_to_right + self.both_wrong

    @property
    def change_points(self) -> float:
        """Accuracy after minus accuracy before, in percentage points; a loss is negative."""
        return 100.0 * (self.wrong_to_right - self.right_to_wrong) / self.images

    @property
    def interval_points(self) -> tuple[float, float]:
        """The 95 % interval of `change_points` (Bonett & Price 2012, adjusted Wald for paired proportions)."""
        n = self.images + 2
        gained, lost = (self.wrong_to_right + 1) / n, (self.right_to_wrong + 1) / n
        half = _Z_95 * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2) / n)
        return max(-100.0, 100.0 * (gained - lost - half)), min(100.0, 100.0 * (gained - lost + half))

    @property
    def p_value(self) -> float:
        """The two-sided mid-p McNemar test of "no change" (Fagerland et al. 2013), in (0, 1]."""
        changed, fewer = self.right_to_wrong + self.wrong_to_right, min(self.right_to_wrong, self.wrong_to_right)
        if changed == 0:
            return 1.0
        tail = sum(math.comb(changed, k) for k in range(fewer + 1))
        # p = 2 * P(X <= fewer) - P(X = fewer) for X ~ Binomial(changed, 1/2), in integers up to the last division
        return min(1.0, (2 * tail - math.comb(changed, fewer)) / (1 << changed))

    def __str__(self) -> str:
        low, high = self.interval_points
        return (
            f"{self.change_points:+.2f} points [{low:+.2f}, {high:+.2f}]: {self.right_to_wrong} right -> wrong, "
            f"{self.wrong_to_right} wrong -> right, {self.same_predictions} of {self.images} predictions the same "
            f"(mid-p McNemar {self.p_value:.3g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts, and the figures that follow from them."""
        return {
            "both_right": self.both_right,
            "right_to_wrong": self.right_to_wrong,
            "wrong_to_right": self.wrong_to_right,
            "both_wrong": self.both_wrong,
            "same_predictions": self.same_predictions,
            "change_points": self.change_points,
            "interval95_points": list(self.interval_points),
            "p_value": self.p_value,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PairedComparison:
        """Rebuilds what `to_dict` gave; the derived figures are computed again.

        Args:
            data: The plain data.

        Returns:
            The comparison.

        Raises:
            KeyError: If a count is missing.
            ValueError: If the counts contradict each other.
        """
        counts = ("both_right", "right_to_wrong", "wrong_to_right", "both_wrong", "same_predictions")
        return cls(**{key: data[key] for key in counts})


def _vector(name: str, values: Any) -> npt.NDArray[np.integer[Any]]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; it must be class numbers, integers of shape (N,)"
        )
    return array


def _same_length(**vectors: npt.NDArray[np.integer[Any]]) -> None:
    if len({len(vector) for vector in vectors.values()}) != 1:
        raise ValueError("lengths differ: " + ", ".join(f"{name} {len(vector)}" for name, vector in vectors.items()))
