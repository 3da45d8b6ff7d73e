"""An audit: a part of the hold-out that decides nothing until a round is over, and then says what the round has lost.

A search decides hundreds of times on the same images, and keeps what happens to look good on them. So the loss on these
images is too small; the loss on images that decided nothing is not. The audit compares the network with the unpruned
one on the same images. If it lost more than the tolerance, steps are given back, so the audit answers a yes or no each
time it is looked at, and nothing else.

The bounds on the loss hold for all looks of a search together, with 95 % confidence. The network of look l has been
chosen by the yes or no of the l - 1 looks before. If k of these said no, it is one of C(l - 1, k) networks, which do
not depend on the audit's images any further. Each gets the same share of the 5 %, and the shares of all l and k add up
to it: 6 / (pi^2 l^2) is for look l, and (l + 1) / (l (k + 1) (k + 2)) of this for k. A split over the rounds alone
would not count what a round tried and gave back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import betainccinv, betaincinv
from torch import nn

from swincompress_pl.arguments import number
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, rank, sum_over_ranks, world_size
from swincompress_pl.pruning.evaluation.scorer import ROUNDING_POINTS, Evaluate, Evaluator, Scorer, as_evaluator

ERROR = 0.05
"""The probability, over all looks of a search, that one of the bounds is too small."""

_LARGEST_AUDIT = 1 << 40  # images; an audit that needs more is not counted out


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the audit found at the end of a round. `str(audit)` describes it in one line.

    Attributes:
        round: Number of the round, from 1.
        images: Number of images of the audit.
        tolerance: The tolerance of the round, in points.
        baseline_points: Score of the unpruned network on the audit, in points.
        lost_points: Points lost against it on the audit; below 0 if points were won.
        deciding_lost_points: Points lost on the part of the hold-out that decided.
        only_before: Number of images that only the unpruned network gets right.
        only_after: Number of images that only the pruned one gets right.
        bound_points: Largest loss of accuracy on such images, in points, that the counts allow at `confidence`. With
            the scores "agreement" and "kl", right is what the unpruned network answers; it is a bound of the changed
            answers then, and the accuracy lost is no larger.
        confidence: Probability that this bound holds, 0 to 1; all bounds of a search hold together with 95 %.
        look: How many times the search has looked at the audit so far, this time included, 1 or more.
        given_back: Number of steps (with PrimeSVT, of candidates) that were within the tolerance on the deciding part,
            and were given back because of the audit.
    """

    round: int
    images: int
    tolerance: float
    baseline_points: float
    lost_points: float
    deciding_lost_points: float
    only_before: int
    only_after: int
    bound_points: float
    confidence: float
    look: int
    given_back: int = 0

    @property
    def holds(self) -> bool:
        """Whether no more than the tolerance was lost on the audit."""
        return self.lost_points <= self.tolerance + ROUNDING_POINTS

    @property
    def optimism_points(self) -> float:
        """How much more was lost on the audit than on the deciding part, in points."""
        return self.lost_points - self.deciding_lost_points

    def __str__(self) -> str:
        return (
            f"{self.lost_points:.2f} points lost on {self.images:,} images that decided nothing (at most "
            f"{self.bound_points:.2f} with {100 * self.confidence:.3g} % confidence), {self.deciding_lost_points:.2f} "
            f"on the deciding part, optimism {self.optimism_points:+.2f}"
        )


class AuditScorer(Scorer, Protocol):
    """A scorer that also says which images were answered right, such as a `HoldOut`."""

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each image of this rank was answered right by the network that was scored in full last."""
        ...

    @property
    def own_images(self) -> int:
        """The number of images of this rank."""
        ...

    @property
    def counts_answers(self) -> bool:
        """Whether a point of the score is a hundredth of the images."""
        ...

    def identity(self) -> str:
        """Tells this rank's images from others."""
        ...


class Auditor:
    """Compares networks with the unpruned one on images that decide nothing else.

    Args:
        scorer: The part of the hold-out that audits; it scores for nobody else.
        part: What part of the hold-out it is, 0 to 1.
    """

    def __init__(self, scorer: AuditScorer, part: float) -> None:
        self._scorer, self._part = scorer, part
        self._before: npt.NDArray[np.bool_] | None = None
        self._baseline_points = 0.0

    def begin(self, network: nn.Module, tolerance: float) -> list[str]:
        """Scores the unpruned network; returns its answers as text for `resume`, one for each rank.

        Warns if a single image is worth more than the tolerance, in points.
        """
        self._baseline_points = self._scorer.full(network)
        self._before = self._scorer.right
        images = self._scorer.images
        if self._scorer.counts_answers and 100 / images > tolerance:
            needed = math.ceil(100 / tolerance)
            warnings.warn(
                f"audit={self._part:g}: one of the {images:,} images of the audit is {100 / images:.3g} points, so it "
                f"cannot resolve a tolerance of {tolerance:g}; {needed:,} images of the audit could. Give a larger "
                "hold-out, or raise audit or the tolerance",
                stacklevel=8,
            )
        mine = f"{self._baseline_points!r} {self._scorer.identity()} {np.packbits(self._before).tobytes().hex()}"
        return from_all_ranks(mine)

    def resume(self, before: Sequence[str]) -> None:
        """Takes up what `begin` returned. Raises a ValueError if it is of other images."""
        if len(before) != world_size():
            raise ValueError(
                f"audit={self._part:g}: the number of processes was {len(before)} when the search began and is "
                f"{world_size()} now, which would audit other images; go on with as many as it began with"
            )
        score, identity, answers = [*before[rank()].split(" "), "", "", ""][:3]
        if identity != self._scorer.identity():
            raise ValueError(
                f"audit={self._part:g}: the audit has other images than the one that the search began with; give the "
                "same hold-out (in the same order) and the same audit, or begin a new search"
            )
        count = self._scorer.own_images
        try:
            self._baseline_points = float(score)
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(answers), np.uint8))
        except ValueError as error:
            raise ValueError(f"the answers of the audit are damaged: {error}; begin a new search") from error
        if not 0 <= self._baseline_points <= 100 or not count <= len(bits) < count + 8:
            raise ValueError(f"the answers of the audit are damaged: {count} answers are expected; begin a new search")
        self._before = bits[:count].astype(np.bool_)

    def look(
        self,
        network: nn.Module,
        earlier: Sequence[Audit],
        *,
        round: int,
        tolerance: float,
        deciding_lost_points: float,
        given_back: int,
    ) -> Audit:
        """Scores a network, and compares it with the unpruned one.

        Args:
            network: The network as the round would leave it.
            earlier: The audits of the rounds before.
            round: Number of the round.
            tolerance: Its tolerance in points.
            deciding_lost_points: Points lost on the deciding part.
            given_back: Number of looks of this round that did not hold.

        Returns:
            What was found, whether it holds or not.
        """
        assert self._before is not None  # begin or resume come first
        score = self._scorer.full(network)
        after = self._scorer.right
        counts = [int((self._before & ~after).sum()), int((after & ~self._before).sum())]
        only_before, only_after = (int(count) for count in sum_over_ranks(counts))
        failed = sum(audit.given_back for audit in earlier) + given_back
        number = (earlier[-1].look if earlier else 0) + given_back + 1
        confidence = 1 - error_of_look(number, failed)
        images = self._scorer.images
        return Audit(
            round=round,
            images=images,
            tolerance=tolerance,
            baseline_points=self._baseline_points,
            lost_points=self._baseline_points - score,
            deciding_lost_points=deciding_lost_points,
            only_before=only_before,
            only_after=only_after,
            bound_points=loss_bound(only_before, only_after, images, confidence),
            confidence=confidence,
            look=number,
            given_back=given_back,
        )

    def warn_if_coarse(self, audit: Audit, earlier: Sequence[Audit]) -> None:
        """Warns, the first time in a search, if the bound is farther from the loss than the tolerance."""
        if not self._scorer.counts_answers or not _is_coarse(audit) or any(map(_is_coarse, earlier)):
            return
        needed = images_needed(audit)
        told = f"about {needed:,}" if needed < _LARGEST_AUDIT else "far more"
        warnings.warn(
            f"audit={self._part:g}: {audit}. An audit of this size cannot resolve a tolerance of {audit.tolerance:g}; "
            f"with as many changed answers per image, {told} images of the audit would. Give a larger hold-out, raise "
            "audit or the tolerance, or take the bound as what may be lost",
            stacklevel=8,
        )

    def spent(self) -> dict[str, float]:
        """What auditing has cost (`ScoringCost`)."""
        spent: dict[str, float] = self._scorer.cost.to_dict()
        return spent


def checked_audit(part: float) -> float:
    """Checks what part of a hold-out audits: a ValueError outside [0, 1)."""
    return number("audit", part, lambda part: 0 <= part < 1, "a part of the hold-out, 0 (none) to below 1, e.g. 0.3")


def audit_facts(audit: Audit | None) -> list[tuple[str, str]]:
    """What an audit found, as pairs of a label and a text; empty without one."""
    if audit is None:
        return []
    lost = f"{audit.lost_points:.2f} points on {audit.images:,} images that decided nothing"
    return [
        (
            "lost on the audit",
            f"{lost}, at most {audit.bound_points:.2f} with {100 * audit.confidence:.3g} % confidence",
        ),
        (
            "lost on the deciding part",
            f"{audit.deciding_lost_points:.2f} points, optimism {audit.optimism_points:+.2f}",
        ),
    ]


def split_for_audit(evaluate: Evaluate | Scorer | Evaluator, part: float) -> tuple[Evaluator, Auditor | None]:
    """What decides, and what audits: `part` of the images, 0 for none.

    Raises:
        ValueError: If what scores cannot be split, or has too few images.
    """
    evaluator = as_evaluator(evaluate)
    if part == 0:
        return evaluator, None
    split: Any = getattr(evaluator.scorer, "split", None)
    if split is None:
        raise ValueError(
            f"audit={part:g}: what scores is a function of the network (or monitor=, in a fit), which cannot be "
            "split; give a HoldOut of images, or audit=0"
        )
    deciding, auditing = split(part)
    return Evaluator(deciding), Auditor(auditing, part)


def error_of_look(number: int, failed: int) -> float:
    """The probability that the bound of look `number` (from 1) may be too small, if `failed` looks before it said no.

    The sum over all networks that a search can come to is `ERROR`; see the top of the file.
    """
    of_number = 6 / (math.pi * number) ** 2
    of_failed = (number + 1) / (number * (failed + 1) * (failed + 2))
    return ERROR * of_number * of_failed / math.comb(number - 1, failed)


def loss_bound(only_before: float, only_after: float, images: float, confidence: float) -> float:
    """An upper bound on the points lost, that is on 100 (p - q), from counts of images.

    p and q are the probabilities that only the unpruned, or only the pruned network answers right. Half of the error is
    for the upper Clopper-Pearson bound on p, half for the lower one on q (Bonferroni). Both are exact, so the
    probability that the bound is too small is at most 1 - `confidence`, whatever p and q are.

    Args:
        only_before: Number of images that only the unpruned network gets right.
        only_after: Number of images that only the pruned one gets right.
        images: Number of images, drawn independently of both networks.
        confidence: Above 0 and below 1.

    Returns:
        The bound in points, -100 to 100.
    """
    error = (1 - confidence) / 2
    most = 1.0 if only_before >= images else float(betainccinv(only_before + 1, images - only_before, error))
    least = 0.0 if only_after <= 0 else float(betaincinv(only_after, images - only_after + 1, error))
    return 100 * (most - least)


def images_needed(audit: Audit) -> int:
    """About how many images bring the bound to within the tolerance of the loss, at the measured rates of changes."""

    def is_enough(images: int) -> bool:
        before, after = (count * images / audit.images for count in (audit.only_before, audit.only_after))
        bound = loss_bound(before, after, images, audit.confidence)
        return bound - 100 * (before - after) / images <= audit.tolerance

    least, most = audit.images, audit.images
    while not is_enough(most) and most < _LARGEST_AUDIT:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if is_enough(middle) else (middle, most)
    return most


def _is_coarse(audit: Audit) -> bool:
    return audit.bound_points - 100 * (audit.only_before - audit.only_after) / audit.images > audit.tolerance
