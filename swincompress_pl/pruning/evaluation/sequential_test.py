"""Decides whether the accuracy on a whole hold-out reaches a floor, from as few of its images as possible.

The network that a round begins with, the reference, was scored on every image. A candidate's answers differ on few
images, mostly where the reference had a small margin (true logit minus the best other one). So the images are put
into strata by this margin, and a candidate is scored on a few of each. From these it is estimated how many unseen
answers change from right to wrong or back. The estimate is stratified sampling from a finite population (Cochran,
Sampling Techniques, 3rd ed., 5.3 and 5.5). The test looks several times, and the allowed error is shared among the
looks (Bonferroni). Everything here is counting with NumPy; nothing runs a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import pdtrc

Indices = npt.NDArray[np.int64]
Margins = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Chosen on replayed searches on CIFAR-10 with a Swin: with few strata, the doubt about each rarely matters.
_STRATA = 5
_FIRST_LOOK = 1 / 32  # part of the hold-out in the pilot, which every candidate sees
_LEAST_PILOT = 8  # images of a stratum in the pilot
_LOOK_GROWTH = 1.3
_PRIOR_IMAGES = 64.0  # weight of the rate that the margins predict, in images
_DOUBT = 1e-3  # assumed rate of changed answers where none was seen
_LEAST_DOUBT = 1e-8  # the same for a candidate that shifts nothing: what was not seen is never certain
_TAIL_PART = 0.1  # part of the seen images, those with the largest shifts, from which the tail is estimated
# The tail is not estimated from fewer images (as a number of equally weighted ones, after Kish). If a twentieth of the
# images behaves in another way, 192 images miss it with a probability of 0.95 ** 192 = 5e-5, but 64 images with 4 %.
_TAIL_SEEN = 192
_FEW_CHANGES = 0.25  # expected number of changes among the unseen below which they are counted one by one
_TAIL_CAUTION = 4.0  # the tail is assumed to be this many times as long as it looks
_LEAST_MARGIN = 1e-6


@dataclass(frozen=True)
class Predictions:
    """A network's answers for images, in their order: whether each is right, and its margin."""

    correct: Flags
    margin: Margins

    def at(self, images: Indices) -> Predictions:
        """The predictions for some of the images."""
        return Predictions(self.correct[images], self.margin[images])


@dataclass(frozen=True)
class Order:
    """The hold-out divided into batches, which candidates of a round are scored on whole and in order.

    Attributes:
        stratum: The stratum of each image, 0 for the smallest margins.
        batches: The images of each batch.
        pilot: Number of batches that come first for every candidate, drawn from all strata in proportion.
        pure: For each stratum, the numbers of its own batches in the order in which they are used.
    """

    stratum: Indices
    batches: tuple[Indices, ...]
    pilot: int
    pure: tuple[tuple[int, ...], ...]


def make_order(reference: Predictions, labels: Indices, *, batch_size: int, seed: int) -> Order:
    """Makes strata by the absolute margin; the order inside a stratum is random, with the classes in proportion.

    The same arguments give the same order. The strata are the half with the largest margins, the next quarter, and so
    on, as long as the smallest holds two batches.
    """
    count = len(labels)
    by_margin = np.argsort(np.abs(reference.margin), kind="stable")
    strata = min(_STRATA, max(1, (count // (2 * batch_size)).bit_length()))
    cuts = [count >> halvings for halvings in range(strata - 1, 0, -1)]
    rng = np.random.default_rng(seed)
    stratum = np.zeros(count, dtype=np.int64)
    first: list[Indices] = []
    rest: list[Indices] = []
    for number, members in enumerate(np.split(by_margin, cuts)):
        stratum[members] = number
        order = mixed(members, labels, rng)
        share = min(len(order), max(_LEAST_PILOT, math.ceil(len(order) * _FIRST_LOOK)))
        first.append(order[:share])
        rest.append(order[share:])
    batches = _cut(np.concatenate(first), batch_size)
    pilot, pure = len(batches), []
    for images in rest:
        own = _cut(images, batch_size)
        pure.append(tuple(range(len(batches), len(batches) + len(own))))
        batches += own
    return Order(stratum, tuple(batches), pilot, tuple(pure))


def mixed(images: Indices, labels: Indices, rng: np.random.Generator) -> Indices:
    """`images` in a random order of which every beginning has the classes in about their proportion."""
    shuffled = rng.permutation(images)
    place = np.empty(len(shuffled))
    for label in np.unique(labels[shuffled]):
        (found,) = np.nonzero(labels[shuffled] == label)
        place[found] = (np.arange(len(found)) + rng.random(len(found))) / len(found)
    return shuffled[np.argsort(place, kind="stable")]


def _cut(images: Indices, batch_size: int) -> list[Indices]:
    return [images[start : start + batch_size] for start in range(0, len(images), batch_size)]


@dataclass(frozen=True)
class Tally:
    """What is known of a candidate: counts, and the estimate for all images. Tallies of separate shards add up.

    Attributes:
        images: Number of all images.
        seen: Number of images that were scored.
        correct: Number of right answers among those.
        estimate: Estimated number of right answers among all images.
        variance: Variance of the estimate.
        settled: Number of right answers among all images if no unseen answer changes.
        unseen_changes: Expected number of unseen answers that change.
    """

    images: int
    seen: int
    correct: int
    estimate: float
    variance: float
    settled: int
    unseen_changes: float

    def decide(self, needed: int, deviations: float) -> bool | None:
        """Whether at least `needed` of all images are right; None while that is undecided.

        It is certain once the unseen images cannot change the answer. Otherwise it is decided once `needed`, or for a
        rejection `needed` - 1, is at least `deviations` standard deviations away from the estimate. If hardly any
        answer changes, the normal distribution fits badly, and a count of exactly `needed` would never be decided. Then
        the answer stands once the number of changes that would turn it is, as a Poisson count, no likelier than such a
        deviation.
        """
        if self.correct >= needed:
            return True
        if self.correct + self.images - self.seen < needed:
            return False
        turning = self.settled - needed + 1 if self.settled >= needed else needed - self.settled
        unlikely = float(pdtrc(turning - 1, self.unseen_changes)) < NormalDist().cdf(-deviations)
        if self.unseen_changes <= _FEW_CHANGES and unlikely:
            return self.settled >= needed
        width = deviations * math.sqrt(self.variance)
        if self.estimate - width >= needed:
            return True
        if self.estimate + width <= needed - 1:
            return False
        return None


def add_tallies(tallies: Sequence[Tally]) -> Tally:
    """The tally of all shards together."""
    return Tally(
        sum(t.images for t in tallies),
        sum(t.seen for t in tallies),
        sum(t.correct for t in tallies),
        math.fsum(t.estimate for t in tallies),
        math.fsum(t.variance for t in tallies),
        sum(t.settled for t in tallies),
        math.fsum(t.unseen_changes for t in tallies),
    )


def look_parts() -> list[float]:
    """The parts of the images after which the test looks: from the pilot up to all."""
    parts = [_FIRST_LOOK]
    while parts[-1] * _LOOK_GROWTH < 1:
        parts.append(parts[-1] * _LOOK_GROWTH)
    return [*parts, 1.0]


def deviations_for(confidence: float, number_of_looks: int) -> float:
    """Standard deviations that a decision needs at each look, for an error of 1 - `confidence` over all looks."""
    if confidence >= 1:
        return math.inf
    # of the lower tail: 1 minus a probability below 1e-16 would be 1
    return -NormalDist().inv_cdf((1 - confidence) / max(1, number_of_looks))


@dataclass(frozen=True)
class Link:
    """One accepted network compared with the one accepted before it, in one stratum.

    Attributes:
        seen: Number of images on which they were compared, the first ones in the order.
        changes: Gain in right answers there.
        flips: Number of changed answers there.
        rate: Estimated rate of changed answers.
    """

    seen: int
    changes: int
    flips: int
    rate: float


class Standing:
    """What is known of the present network of a round, on one shard.

    `latest` has the newest known answer for each image. At first all are of the reference. An accepted candidate
    replaces those of the images that it was scored on, which are always the first ones of each stratum. So the present
    accuracy is the reference's, plus the changes of each link of `chains`. They are known for the first `seen` images
    of a stratum, and estimated from those for the rest (double sampling, Cochran 12.2, with one phase per link).
    """

    def __init__(self, order: Order, reference: Predictions) -> None:
        self.order = order
        self.latest = Predictions(reference.correct.copy(), reference.margin.copy())
        self.correct = int(reference.correct.sum())
        self.chains: list[list[Link]] = [[] for _ in order.pure]

    def accept(self, trial: Trial) -> None:
        """Makes the candidate of `trial` the present network."""
        self.chains = [trial.chain(stratum) for stratum in range(len(self.chains))]
        for batch, found in trial.found.items():
            images = self.order.batches[batch]
            self.latest.correct[images] = found.correct
            self.latest.margin[images] = found.margin


class Trial:
    """One candidate on one shard: which batches to score next, and what the scored ones tell."""

    def __init__(self, standing: Standing) -> None:
        self._standing, self._order = standing, standing.order
        self.found: dict[int, Predictions] = {}
        self._sizes = np.bincount(self._order.stratum, minlength=len(self._order.pure))
        self._seen = np.zeros_like(self._sizes)
        self._changes = np.zeros_like(self._sizes)  # net: became right minus became wrong
        self._flips = np.zeros_like(self._sizes)
        self._shifts: list[Margins] = []
        self._rates = np.ones(len(self._sizes))
        self._unseen = np.ones(len(self._order.stratum), dtype=np.bool_)
        self._next = [0] * len(self._order.pure)
        self._pilots = 0

    @property
    def seen(self) -> int:
        """The number of images that were scored."""
        return int(self._seen.sum())

    def next_batch(self) -> int | None:
        """The number of the batch that narrows the estimate most for its size; None if all were scored."""
        if self._pilots < self._order.pilot:
            self._pilots += 1
            return self._pilots - 1
        gains = [self._gain(stratum) for stratum in range(len(self._sizes))]
        best = max(range(len(gains)), key=gains.__getitem__, default=0)
        if not gains or gains[best] < 0:
            return None
        self._next[best] += 1
        return self._order.pure[best][self._next[best] - 1]

    def _gain(self, stratum: int) -> float:
        """The variance per image that the next batches of a stratum take away, as far ahead as is best.

        It is -1 if no batch is left. Up to the next link of the chain only the candidate's own part of the variance
        shrinks; beyond it the link's part shrinks as well.
        """
        ahead = self._order.pure[stratum][self._next[stratum] :]
        if not ahead:
            return -1.0
        size, seen = int(self._sizes[stratum]), int(self._seen[stratum])
        links = self._standing.chains[stratum]
        own = float(self._rates[stratum])
        step = len(self._order.batches[ahead[0]])
        stops = {min(stop + step, size) for stop in (seen, *(link.seen for link in links))}

        def variance(at: int) -> float:
            return _spread(size, at) * own + sum(_spread(size, max(at, link.seen)) * link.rate for link in links)

        return max((variance(seen) - variance(stop)) / (stop - seen) for stop in stops if stop > seen)

    def add(self, batch: int, found: Predictions) -> None:
        """Adds the candidate's answers for the images of `batch`."""
        self.found[batch] = found
        images = self._order.batches[batch]
        stratum, count = self._order.stratum[images], len(self._sizes)
        before = self._standing.latest.at(images)
        change = found.correct.astype(np.int64) - before.correct
        self._seen += np.bincount(stratum, minlength=count)
        self._changes += np.bincount(stratum, change, count).astype(np.int64)
        self._flips += np.bincount(stratum, np.abs(change), count).astype(np.int64)
        self._shifts.append((found.margin - before.margin) * -np.sign(before.margin))
        self._unseen[images] = False

    def chain(self, stratum: int) -> list[Link]:
        """The links from the round's reference to the candidate, each seen on fewer images than the one before it.

        Links that were seen on no more images than the candidate are merged into its own, because it was compared
        directly with what came before them.
        """
        seen = int(self._seen[stratum])
        before = [link for link in self._standing.chains[stratum] if link.seen > seen]
        passed = self._standing.chains[stratum][len(before) :]
        changes = int(self._changes[stratum]) + sum(link.changes for link in passed)
        flips = sum(link.flips for link in passed)
        rate = float(self._rates[stratum]) + flips / (seen + _PRIOR_IMAGES)
        return [*before, Link(seen, changes, int(self._flips[stratum]) + flips, rate)]

    def tally(self) -> Tally:
        """The estimate from what was scored so far; exact, with variance 0, if that is everything."""
        correct = sum(int(found.correct.sum()) for found in self.found.values())
        if self.found:
            self._estimate_rates()
        estimate, variance = float(self._standing.correct), 0.0
        settled, unseen_changes = self._standing.correct, 0.0
        for stratum, size in enumerate(self._sizes.tolist()):
            for link in self.chain(stratum):
                estimate += link.changes * size / max(link.seen, 1)
                variance += _spread(size, link.seen) * link.rate
                settled += link.changes
                unseen_changes += (size - link.seen) * link.rate
        return Tally(int(self._sizes.sum()), self.seen, correct, estimate, variance, settled, unseen_changes)

    def _estimate_rates(self) -> None:
        """Estimates the rate of changed answers in each stratum: the counted one, drawn towards a predicted one.

        An unseen image of margin m is expected to change as often as seen images, of all strata, shifted towards the
        other answer by m or more. Beyond the largest seen shift it is expected to change once in a thousand times. It
        changes more rarely if Chebyshev's inequality, mean(shift^2) / m^2, or the tail of the shifts (`_tail_beyond`)
        says so. The prediction counts as much as `_PRIOR_IMAGES` scored images.
        """
        images = np.concatenate([self._order.batches[batch] for batch in self.found])
        shifts = np.concatenate(self._shifts)
        weights = (self._sizes / np.maximum(self._seen, 1))[self._order.stratum[images]]
        weights /= weights.sum()
        ascending = np.argsort(shifts, kind="stable")
        above = np.append(np.cumsum(weights[ascending][::-1])[::-1], 0.0)
        margins = np.maximum(np.abs(self._standing.latest.margin), _LEAST_MARGIN)
        tail = above[np.searchsorted(shifts[ascending], margins)]
        beyond = float(weights @ shifts**2) / margins**2 + _LEAST_DOUBT
        if 1 / float(weights @ weights) >= _TAIL_SEEN:
            # the longer of two tails: weighted, few images of the large strata dominate; unweighted, they do not
            alike = np.full(len(shifts), 1 / len(shifts))
            tails = (_tail_beyond(shifts, share, margins) for share in (weights, alike))
            beyond = np.minimum(beyond, np.maximum(*tails) + _LEAST_DOUBT)
        beyond = np.minimum(_DOUBT, beyond)
        expected = np.maximum(tail, beyond) * self._unseen
        prior = np.bincount(self._order.stratum, expected, len(self._sizes)) / np.maximum(self._sizes - self._seen, 1)
        self._rates = (self._flips + _PRIOR_IMAGES * prior) / (self._seen + _PRIOR_IMAGES)


def _tail_beyond(shifts: Margins, weights: Margins, margins: Margins) -> Margins:
    """How often a shift exceeds each of `margins`, by an exponential tail fitted to the largest of `shifts`.

    This is the peaks-over-threshold method: excesses over a high threshold are about exponential unless the tail is
    heavier (Pickands, Annals of Statistics 3, 1975). The mean excess is taken `_TAIL_CAUTION` times as large as it is.
    """
    largest = np.argsort(-shifts, kind="stable")[: math.ceil(len(shifts) * _TAIL_PART)]
    threshold, part = shifts[largest[-1]], weights[largest]
    length = _TAIL_CAUTION * float(part @ (shifts[largest] - threshold)) / float(part.sum())
    excess = np.maximum(margins - threshold, 0.0)
    if length <= 0:
        return np.where(excess > 0, 0.0, 1.0)
    return np.asarray(part.sum() * np.exp(-excess / length))


def _spread(size: int, seen: int) -> float:
    """The variance of the estimated number of changes among the unseen, in units of a single image's variance."""
    return (size - seen) * size / max(seen, 0.5)
