"""Is the accuracy over a whole hold-out at least so high? Answered from as few of its images as the question allows.

The network that a round begins with, the reference, was scored on every image. A candidate differs from it in few
images, and those lie where the reference was close to tipping. So the images are put into strata by the reference's
margin (true logit minus the best other one), a candidate is scored on a few of each, and what is estimated is how many
of the unseen images change from right to wrong or back. The estimate is stratified sampling from a finite population
(Cochran, Sampling Techniques, 3rd ed., 5.3 and 5.5); the test is looked at a few times with the allowed error shared
out among the looks (Bonferroni). Everything here is counting with NumPy; nothing runs a network.
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

# Chosen on replayed searches over CIFAR-10 with a Swin: few strata, so that the doubt about each counts seldom.
_STRATA = 5
_FIRST_LOOK = 1 / 32  # part of the hold-out in the pilot, which every candidate sees
_LEAST_PILOT = 8  # images of a stratum in the pilot
_LOOK_GROWTH = 1.3
_PRIOR_IMAGES = 64.0  # weight of what the margins let expect, in images
_DOUBT = 1e-3  # rate of changed answers that is reckoned with where none was seen
_LEAST_DOUBT = 1e-8  # the same for a candidate that shifts nothing: what was not seen is never settled
_TAIL_PART = 0.1  # of the seen images, the largest shifts, which the tail beyond them is read from
# Before so many are seen (reckoned as equally weighted ones, Kish), nothing is read from it: a twentieth of the images
# that behaves otherwise escapes 192 with a probability of 0.95 ** 192 = 5e-5, but 64 with 4 %.
_TAIL_SEEN = 192
_FEW_CHANGES = 0.25  # expected among the unseen, below which changes are counted one by one
_TAIL_CAUTION = 4.0  # the tail is taken to be so many times as long as it looks
_LEAST_MARGIN = 1e-6


@dataclass(frozen=True)
class Predictions:
    """What a network says about images, in their order: right or wrong, and by which margin."""

    correct: Flags
    margin: Margins

    def at(self, images: Indices) -> Predictions:
        """The predictions for some of the images."""
        return Predictions(self.correct[images], self.margin[images])


@dataclass(frozen=True)
class Order:
    """The hold-out cut into batches that candidates are scored on, whole and in order, for as long as a round lasts.

    stratum: the stratum of each image, 0 for the smallest margins. batches: the images of each batch.
    pilot: how many of the batches come first for every candidate, drawn from all strata in proportion.
    pure: for each stratum the numbers of its own batches, in the order in which they are used.
    """

    stratum: Indices
    batches: tuple[Indices, ...]
    pilot: int
    pure: tuple[tuple[int, ...], ...]


def make_order(reference: Predictions, labels: Indices, *, batch_size: int, seed: int) -> Order:
    """Strata by the absolute margin; within a stratum random, with the classes in proportion throughout.

    The same arguments give the same order. The strata are halves: the half with the largest margins, the next quarter,
    and so on, as far as the smallest still holds two batches.
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
        mixed = _mixed(members, labels, rng)
        share = min(len(mixed), max(_LEAST_PILOT, math.ceil(len(mixed) * _FIRST_LOOK)))
        first.append(mixed[:share])
        rest.append(mixed[share:])
    batches = _cut(np.concatenate(first), batch_size)
    pilot, pure = len(batches), []
    for images in rest:
        own = _cut(images, batch_size)
        pure.append(tuple(range(len(batches), len(batches) + len(own))))
        batches += own
    return Order(stratum, tuple(batches), pilot, tuple(pure))


def _mixed(images: Indices, labels: Indices, rng: np.random.Generator) -> Indices:
    """`images` in random order, such that every beginning of it has the classes in about their proportion."""
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
    """What is known of a candidate: counts and the estimate for all images. Tallies of separate shards add up.

    images, seen, correct: how many there are, were scored, and were right among those. estimate: right ones among all.
    variance: of the estimate. settled: right ones among all if no answer changed where it was not looked at.
    unseen_changes: how many answers are expected to change there.
    """

    images: int
    seen: int
    correct: int
    estimate: float
    variance: float
    settled: int
    unseen_changes: float

    def decide(self, needed: int, deviations: float) -> bool | None:
        """Whether at least `needed` of all images are right; None while that is open.

        Certain when what is unseen cannot change the answer; else when `needed` lies `deviations` standard deviations
        from the estimate, and the answer's side of the integers next to it. Where hardly any answer changes, the normal
        distribution is a bad guide and a count of exactly `needed` would never be settled: there the answer stands when
        as many changes as would turn it are no likelier, as a Poisson count, than such a deviation.
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
    """After which parts of the images the answer is looked at: from the pilot up to all."""
    parts = [_FIRST_LOOK]
    while parts[-1] * _LOOK_GROWTH < 1:
        parts.append(parts[-1] * _LOOK_GROWTH)
    return [*parts, 1.0]


def deviations_for(confidence: float, number_of_looks: int) -> float:
    """Standard deviations that a decision at one look has to keep, for an error of 1 - `confidence` over all looks."""
    if confidence >= 1:
        return math.inf
    # of the lower tail: 1 minus a probability below 1e-16 would be 1
    return -NormalDist().inv_cdf((1 - confidence) / max(1, number_of_looks))


@dataclass(frozen=True)
class Link:
    """One accepted network against the one accepted before it, in one stratum.

    seen: on how many images, the first ones in the order. changes: more right answers there. flips: changed answers.
    rate: of changed answers, as it was estimated.
    """

    seen: int
    changes: int
    flips: int
    rate: float


class Standing:
    """What is known of the network as it stands in a round, on one shard.

    latest: the newest answer known for each image. All are of the reference at first; an accepted candidate brings its
    own for the images that it was scored on, always the first ones of each stratum. So the accuracy now is the
    reference's, plus for each link of `chains` the changes that it brought, which are known for the first `seen` images
    of a stratum and estimated from them for the rest (double sampling, Cochran 12.2, a phase for each link).
    """

    def __init__(self, order: Order, reference: Predictions) -> None:
        self.order = order
        self.latest = Predictions(reference.correct.copy(), reference.margin.copy())
        self.correct = int(reference.correct.sum())
        self.chains: list[list[Link]] = [[] for _ in order.pure]

    def accept(self, trial: Trial) -> None:
        """The candidate of `trial` is the network from now on."""
        self.chains = [trial.chain(stratum) for stratum in range(len(self.chains))]
        for batch, found in trial.found.items():
            images = self.order.batches[batch]
            self.latest.correct[images] = found.correct
            self.latest.margin[images] = found.margin


class Trial:
    """One candidate on one shard: which batches to score next, and what the scored ones say."""

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
        """How many images were scored."""
        return int(self._seen.sum())

    def next_batch(self) -> int | None:
        """The number of the batch that narrows the estimate most for its size; None when all were scored."""
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
        """The variance that the next batches of a stratum take away, an image, as far ahead as is best; -1: none left.

        Up to the next link of the chain only the candidate's own part shrinks, beyond it the link's as well.
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
        """What the candidate says about the images of `batch`."""
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

        Links that the candidate was scored as far as are its own: it was seen directly against what came before them.
        """
        seen = int(self._seen[stratum])
        before = [link for link in self._standing.chains[stratum] if link.seen > seen]
        passed = self._standing.chains[stratum][len(before) :]
        changes = int(self._changes[stratum]) + sum(link.changes for link in passed)
        flips = sum(link.flips for link in passed)
        rate = float(self._rates[stratum]) + flips / (seen + _PRIOR_IMAGES)
        return [*before, Link(seen, changes, int(self._flips[stratum]) + flips, rate)]

    def tally(self) -> Tally:
        """The estimate from what was scored so far: exact, with variance 0, when that is everything."""
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
        """The rate of changed answers in each stratum: what was counted, drawn towards what the margins let expect.

        An unseen image of margin m is expected to change as often as the seen images, of all strata, shifted towards
        the other answer by m or more. Beyond what was seen it may change once in a thousand, or less often where the
        shifts are so small that Chebyshev's inequality, mean(shift^2) / m^2, says so, or their tail (`_tail_beyond`).
        The expected rate counts as much as `_PRIOR_IMAGES` scored images.
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
            # the longer of two tails: with weights few images of the large strata say nearly all, without they say less
            alike = np.full(len(shifts), 1 / len(shifts))
            tails = (_tail_beyond(shifts, share, margins) for share in (weights, alike))
            beyond = np.minimum(beyond, np.maximum(*tails) + _LEAST_DOUBT)
        beyond = np.minimum(_DOUBT, beyond)
        expected = np.maximum(tail, beyond) * self._unseen
        prior = np.bincount(self._order.stratum, expected, len(self._sizes)) / np.maximum(self._sizes - self._seen, 1)
        self._rates = (self._flips + _PRIOR_IMAGES * prior) / (self._seen + _PRIOR_IMAGES)


def _tail_beyond(shifts: Margins, weights: Margins, margins: Margins) -> Margins:
    """How often a shift passes each of `margins`, by an exponential tail through the largest of `shifts`.

    Peaks over a threshold: excesses over a high one are about exponential where the tail is no heavier (Pickands,
    Annals of Statistics 3, 1975). The mean excess is taken `_TAIL_CAUTION` times as large as it is.
    """
    largest = np.argsort(-shifts, kind="stable")[: math.ceil(len(shifts) * _TAIL_PART)]
    threshold, part = shifts[largest[-1]], weights[largest]
    length = _TAIL_CAUTION * float(part @ (shifts[largest] - threshold)) / float(part.sum())
    excess = np.maximum(margins - threshold, 0.0)
    if length <= 0:
        return np.where(excess > 0, 0.0, 1.0)
    return np.asarray(part.sum() * np.exp(-excess / length))


def _spread(size: int, seen: int) -> float:
    """Variance of the estimated number of changes among the unseen, in units of a single image's variance."""
    return (size - seen) * size / max(seen, 0.5)
