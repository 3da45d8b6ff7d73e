"""Images held out of the training set, and the accuracy of networks on them.

    holdout = HoldOut(images, labels)                         # or HoldOut.from_batches(loader, max_images=10_000)
    score = holdout.begin_round(network)                      # points, 0 to 100, on every image
    with mask_units(network, group, units):
        verdict = holdout.judge(network, score - 1.0, [s.tensor for s in group.slices])

`judge` answers from as few images as the question needs (`sequential_test.py`), and begins each pass at the first
segment that the candidate changes (`prefix_cache.py`). What is scored is in `scores.py`: right answers, or, without
labels, agreement with the network that is scored first.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from swincompress_pl.arguments import choice, flag, integer, number
from swincompress_pl.pruning.evaluation.images import check_images, over_ranks, read_images
from swincompress_pl.pruning.evaluation.prefix_cache import PrefixCache
from swincompress_pl.pruning.evaluation.ranks import failing_together, from_all_ranks, gather_results, rank, world_size
from swincompress_pl.pruning.evaluation.scorer import (
    ROUNDING_POINTS,
    FunctionScorer,
    Scorer,
    ScoringCost,
    Verdict,
    evaluation_mode,
    fingerprint_of,
    tensor_bytes,
)
from swincompress_pl.pruning.evaluation.scores import SCORES, check_logits, score_of
from swincompress_pl.pruning.evaluation.sequential_test import (
    Indices,
    Predictions,
    Standing,
    Tally,
    Trial,
    add_tallies,
    deviations_for,
    look_parts,
    make_order,
    mixed,
)

__all__ = ["FunctionScorer", "HoldOut", "Predict", "Scorer", "ScoringCost", "Verdict"]

Predict = Callable[[nn.Module, Tensor], Tensor]
"""(network, images) -> logits (N, classes): moves the images to the network's device and runs it in its precision."""

NETWORK_ALONE = "network(images)"  # the fingerprint of a predict that returns the network's output as it is


class HoldOut:
    """Images and labels in memory that score networks: what `prune` and `primesvt` take as `evaluate`.

    A decision is the one that all N images would give, except for at most about 1 - `confidence` of those where the
    candidate is close to the floor. This assumes that answers with a larger margin change more rarely. A change that
    flips a few answers whatever their margin, and leaves the others alone, can stay unnoticed.

    Without labels, the answers are compared with those of the network that is scored first, in a search the unpruned
    one, whose score is then 100. With "agreement" a point is a hundredth of the answers, and the accuracy that is lost,
    whatever the labels are, is at most the disagreement. With "kl" the score is 100 exp(-mean KL(first || this)), so a
    small tolerance of t points is about t / 100 nats; every decision takes all images then.

    Slicing the network ends a round: call `begin_round` after it. In a distributed run all ranks have to make the same
    calls.

    Args:
        images: The images (N, ...), as `predict` takes them.
        labels: The classes (N,), integers from 0. None if there are none, for the scores "agreement" and "kl"; with
            these, labels only keep the classes in proportion where the images are divided.
        score: What is scored: "accuracy", "agreement" or "kl".
        predict: (network, images) -> logits (N, classes). None runs the network on the images, moved to its device.
        batch_size: Images per pass, 1 or more.
        confidence: How sure a decision on part of the images has to be, 0.5 to 1; 1.0 scores until it is certain.
        seed: Decides the order of the images, 0 or more.
        cache_size_bytes: Most bytes of activations that are kept between candidates; 0 for none.
        sharded: Whether each rank of a distributed run has images of its own. Otherwise all ranks have the same images,
            and each scores its share.

    Attributes:
        images: The number of images of all ranks.
        score: What is scored.
        cost: What scoring has cost so far.

    Raises:
        ValueError: If an argument is outside its range, there are no images, or images and labels do not fit.
        RankFailedError: If another process of a distributed run failed.
    """

    _measured_images = 1  # of the pass that measures what each segment costs

    @failing_together("taking up the hold-out")
    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        score: Literal["accuracy", "agreement", "kl"] = "accuracy",
        predict: Predict | None = None,
        batch_size: int = 64,
        confidence: float = 0.99,
        seed: int = 0,
        cache_size_bytes: int = 1 << 30,
        sharded: bool = False,
    ) -> None:
        batch_size = integer("batch_size", batch_size, least=1)
        wanted = "0.5 to 1, e.g. 0.99; 1.0 decides by certainty only"
        confidence = number("confidence", confidence, lambda part: 0.5 <= part <= 1, wanted)
        seed = integer("seed", seed, least=0)
        cache_size_bytes = integer("cache_size_bytes", cache_size_bytes, least=0, wanted="0 (no cache) or more")
        sharded = flag("sharded", sharded)
        self.score = choice("score", score, SCORES)
        self._has_labels = labels is not None
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.long)
        check_images(images, labels)
        if not sharded and world_size() > 1:
            images, labels = images[rank() :: world_size()], labels[rank() :: world_size()]
        self.images, self._images = over_ranks(images)
        self._labels = labels.cpu().long()  # zeros if there are none
        self._rows = torch.arange(len(self._labels))  # of `_images`, which the parts of a hold-out share
        self._score = score_of(self.score, self._labels if self._has_labels else None, len(self._labels))
        self._predict = predict or _run
        self._batch_size, self._seed, self._cache_size_bytes = batch_size, seed, cache_size_bytes
        self._confidence = confidence
        self._parts = look_parts()
        self._deviations = deviations_for(confidence, len(self._parts) - 1)  # the last look is exact
        self._begin()

    def _begin(self) -> None:
        """Begins with nothing scored."""
        self.cost = ScoringCost()
        self._last_full: Predictions | None = None
        self._last_score = 0.0
        self._standing: Standing | None = None
        self._cache: PrefixCache | None = None
        self._trial: Trial | None = None

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Any],
        *,
        max_images: int | None = None,
        max_size_bytes: int = 1 << 30,
        sharded: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> HoldOut:
        """Makes a hold-out of the images of a loader, which is read once.

        Args:
            batches: Batches (images, labels, ...), such as a DataLoader; without labels (images,) or images.
            max_images: Number of images to keep over all ranks, chosen by `seed` with the classes in proportion; None
                for all.
            max_size_bytes: Most bytes of the kept images on one rank. For a hold-out that does not fit into memory, let
                a function score.
            sharded: As for `HoldOut`.
            seed: Decides which images are kept, and their order; 0 or more.
            **options: Other arguments of `HoldOut`.

        Returns:
            The hold-out.

        Raises:
            ValueError: If an argument is outside its range, there are no images, they take too many bytes, or images
                and labels do not fit.
            TypeError: If a batch is not a list or tuple that begins with two tensors.
            RankFailedError: If another process of a distributed run failed.
        """
        with failing_together("reading the hold-out"):
            images, labels = read_images(
                batches,
                max_images=max_images,
                max_size_bytes=max_size_bytes,
                sharded=sharded,
                seed=seed,
                needs_labels=options.get("score", "accuracy") == "accuracy",
            )
            return cls(images, labels, sharded=sharded, seed=seed, **options)

    @failing_together("splitting the hold-out")
    def split(self, part: float, *, seed: int = 0) -> tuple[Self, Self]:
        """Divides the images in two, with the classes in proportion; without labels, at random.

        The parts share the images and, without labels, the answers of the network that is scored first. Everything else
        of them is separate, and nothing of it is scored yet. The same call gives the same parts. In a distributed run
        each rank divides its own images.

        Args:
            part: What the second part has of the images, above 0 and below 1. Each part gets one image or more.
            seed: Decides which images these are, 0 or more.

        Returns:
            The two parts, such as one that decides and one that audits.

        Raises:
            ValueError: If an argument is outside its range, or there is only one image.
            RankFailedError: If another process of a distributed run failed.
        """
        part = number("part", part, lambda part: 0 < part < 1, "above 0 and below 1, e.g. 0.3")
        rng = np.random.default_rng(integer("seed", seed, least=0))
        counts = from_all_ranks(len(self._labels))
        total, before, mine = sum(counts), sum(counts[: rank()]), counts[rank()]
        if total < 2:
            raise ValueError("the hold-out has one image, which cannot be split; give it more")
        wanted = min(max(round(part * total), 1), total - 1)
        share = wanted * (before + mine) // total - wanted * before // total
        order = mixed(np.arange(mine), self._labels.numpy(), rng)
        first, second = np.sort(order[share:]), np.sort(order[:share])
        return self._part(first, total - wanted), self._part(second, wanted)

    def _part(self, numbers: Indices, images: int) -> Self:
        """A hold-out of the images of this rank with these numbers; `images` is the number over all ranks."""
        part = copy.copy(self)
        part.__dict__.pop("_data_digest", None)
        chosen = torch.from_numpy(numbers)
        part._rows, part._labels, part.images = self._rows[chosen], self._labels[chosen], images
        part._begin()
        return part

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each image of this rank was answered right by the network that was scored in full last, (N,).

        Raises:
            RuntimeError: If none was.
        """
        if self._last_full is None:
            raise RuntimeError("right: no network was scored on all images yet; call full(network)")
        return self._last_full.correct

    @property
    def own_images(self) -> int:
        """The number of images that this rank scores."""
        return len(self._rows)

    @property
    def counts_answers(self) -> bool:
        """Whether a point of the score is a hundredth of the images."""
        return self._score.counts_answers

    def identity(self) -> str:
        """Returns a string that tells this rank's labels, in their order, from others; without labels, its images."""
        digest = hashlib.sha256(self._labels.numpy().tobytes()).hexdigest()
        return f"{len(self._labels)}-{digest if self._has_labels else self._data_digest}"

    def first_answers(self) -> list[str]:
        """Returns what the network that was scored first answered, as one text per rank; empty with "accuracy"."""
        return from_all_ranks(self._score.stored()) if self.score != "accuracy" else []

    def take_up_first(self, stored: Sequence[str]) -> None:
        """Takes up what `first_answers` returned for the same images.

        Args:
            stored: One text per rank.

        Raises:
            ValueError: If it is of another score, of other images, or of another number of processes.
        """
        if len(stored) not in (0, world_size()):
            raise ValueError(
                f"score={self.score!r}: the number of processes was {len(stored)} when the search began and is "
                f"{world_size()} now; go on with as many as it began with"
            )
        self._score.take_up(stored[rank()] if stored else "")

    @property
    def fingerprint(self) -> str | None:
        """A string that identifies this rank's images and labels, and how they decide.

        None if `predict` has no attribute `fingerprint`, a string that identifies the function.
        """
        predict = "" if self._predict is _run else fingerprint_of(self._predict)
        if predict is None:
            return None
        shape = (len(self._rows), *self._images.shape[1:])
        about: tuple[object, ...] = (shape, self._images.dtype, self._confidence, self._seed, predict)
        if self.score != "accuracy":
            about = (*about, self.score, self._score.fingerprint())
        return hashlib.sha256(f"{about} {self._data_digest}".encode()).hexdigest()

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.sha256(self._labels.numpy().tobytes())
        for row in self._rows.tolist():  # one by one: a copy of all of them may not fit
            digest.update(tensor_bytes(self._images[row]))
        return digest.hexdigest()

    @property
    def earlier_fingerprint(self) -> str | None:
        """The fingerprint of version 0.1, made of all labels and of the first and the last image."""
        if self._predict is not _run and fingerprint_of(self._predict) != NETWORK_ALONE:
            return None
        if self.score != "accuracy" or len(self._rows) < len(self._images):
            return None
        digest = hashlib.sha256(repr(tuple(self._images.shape)).encode())
        digest.update(self._labels.numpy().tobytes())
        for image in (self._images[:1], self._images[-1:]):
            digest.update(image.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image, without a batch axis."""
        return tuple(self._images.shape[1:])

    @failing_together("scoring")
    def full(self, network: nn.Module) -> float:
        """Scores a network on all images.

        Args:
            network: The network; it is left as it was.

        Returns:
            The score in points, 0 to 100.

        Raises:
            ValueError: If the output is not logits (N, classes) without NaN, or has no class of some label.
            RankFailedError: If another process of a distributed run failed.
        """
        score = self._score_all(network)
        self.cost.naive_images += self.images
        return score

    @failing_together("scoring")
    def begin_round(self, network: nn.Module, *, unchanged: bool = False) -> float:
        """Scores a network on all images; candidates are compared with it until the next round.

        Args:
            network: The network that candidates will be made from.
            unchanged: Whether it is the network that `full` scored last; if so, its answers are used again.

        Returns:
            The score in points, 0 to 100.

        Raises:
            ValueError: As for `full`.
            RankFailedError: If another process of a distributed run failed.
        """
        if not unchanged or self._last_full is None:
            self._score_all(network)
        assert self._last_full is not None
        order = make_order(self._last_full, self._labels.numpy(), batch_size=self._batch_size, seed=self._seed)
        self._standing, self._trial = Standing(order, self._last_full), None
        self._cache = PrefixCache(network, size_bytes=self._cache_size_bytes)
        if len(self._labels):
            with evaluation_mode(network), torch.no_grad():
                few = torch.arange(min(self._measured_images, len(self._labels)))
                self._cache.measure(partial(self._predict, network, self._images_at(few)))
        return self._last_score

    @failing_together("scoring")
    def judge(
        self, network: nn.Module, floor: float, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        """Decides whether the score on all images is at least `floor`, on as few images as possible.

        Args:
            network: The candidate.
            floor: The least score in points.
            tensors: Names of the parameters in which the candidate differs from the network that was accepted last in
                this round. If it is empty, it may differ anywhere.
            resolution_points: Largest standard error of the score of an accepted candidate, in points; images are added
                until it is reached. None for scores that are not compared with others.

        Returns:
            The decision and the score.

        Raises:
            RuntimeError: If no round has begun.
            ValueError: As for `full`; or if `floor` is NaN or a name is unknown.
            RankFailedError: If another process of a distributed run failed.
        """
        if self._standing is None or self._cache is None:
            raise RuntimeError("judge: there is nothing to compare with; call begin_round(network) first")
        needed = _needed(floor, self.images)
        depth = self._cache.depth(tensors) if network is self._cache.network else 0
        trial = Trial(self._standing)
        with evaluation_mode(network), torch.no_grad():
            if self._score.decides_on_part:
                verdict = self._judge_in_parts(network, trial, depth, needed, resolution_points)
            else:
                verdict = self._judge_on_all(network, trial, depth, floor)
        self._trial = trial
        return verdict

    def _judge_in_parts(
        self, network: nn.Module, trial: Trial, depth: int, needed: int, resolution_points: float | None
    ) -> Verdict:
        """Decides by right answers, of which there have to be `needed`."""
        forwards, accepted = 0.0, None
        for part in self._parts:
            found = gather_results(partial(self._score_part, network, trial, part, depth))
            tally = add_tallies([each for each, _ in found])
            forwards += math.fsum(each for _, each in found)
            if accepted is None:  # once made, a decision stays
                accepted = from_all_ranks(tally.decide(needed, self._deviations))[0]
            error_points = 100.0 * math.sqrt(tally.variance) / self.images
            resolved = accepted is False or resolution_points is None or error_points <= resolution_points
            if accepted is not None and resolved:
                break
        assert accepted is not None  # with every image seen it is certain
        self._spend(tally.seen, forwards)
        score = min(100.0, max(0.0, 100.0 * tally.estimate / self.images))
        exact = tally.seen == self.images
        if exact:
            accepted = tally.correct >= needed
        return Verdict(score=score, accepted=accepted, images=tally.seen, exact=exact, error_points=error_points)

    def _judge_on_all(self, network: nn.Module, trial: Trial, depth: int, floor: float) -> Verdict:
        """Decides by the score of all images."""

        def score() -> tuple[float, float]:
            _, forwards = self._score_part(network, trial, 1.0, depth)
            return self._score.total(trial.found.values()), forwards

        found = gather_results(score)
        self._spend(self.images, math.fsum(each for _, each in found))
        points = self._score.points([total for total, _ in found], self.images)
        accepted = points >= floor - ROUNDING_POINTS
        return Verdict(score=points, accepted=accepted, images=self.images, exact=True)

    def _spend(self, seen: int, forwards: float) -> None:
        self.cost += ScoringCost(images_scored=seen, image_forwards=forwards, naive_images=self.images, decisions=1)

    def accept(self, tensors: Sequence[str]) -> None:
        """Keeps the change that was judged last: later candidates of the round contain it.

        Args:
            tensors: Names of the parameters that it changes, as for `judge`.

        Raises:
            RuntimeError: If no candidate was judged since the last one was accepted.
        """
        if self._trial is None or self._standing is None or self._cache is None:
            raise RuntimeError("accept: no candidate was judged since the last one was accepted; call judge first")
        self._cache.drop_behind(self._cache.depth(tensors))
        self._standing.accept(self._trial)
        self._trial = None

    def _score_part(self, network: nn.Module, trial: Trial, part: float, depth: int) -> tuple[Tally, float]:
        """Scores batches until `part` of this rank's images are seen; returns the tally and the passes it took."""
        assert self._cache is not None
        assert self._standing is not None
        forwards, wanted = 0.0, math.ceil(part * len(self._labels))
        while trial.seen < wanted:
            batch = trial.next_batch()
            assert batch is not None  # all batches together are all images
            images = torch.from_numpy(self._standing.order.batches[batch])
            answer = partial(self._answer, network, images)
            found, cost = self._cache.run(batch, depth, answer) if network is self._cache.network else (answer(), 1.0)
            forwards += cost * len(images)
            trial.add(batch, found)
        return trial.tally(), forwards

    def _score_all(self, network: nn.Module) -> float:
        """Scores this rank's images in their own order, and remembers the answers."""
        found: list[Predictions] = []

        def score() -> float:
            for images in torch.arange(len(self._labels)).split(self._batch_size):
                if len(images):
                    found.append(self._answer(network, images))
            return self._score.total(found)

        with evaluation_mode(network), torch.no_grad(), self._score.scoring(self._rows):
            totals = gather_results(score)
        self._last_full = Predictions(
            np.concatenate([np.zeros(0, np.bool_), *(each.correct for each in found)]),
            np.concatenate([np.zeros(0), *(each.margin for each in found)]),
        )
        self._last_score = self._score.points(totals, self.images)
        self.cost += ScoringCost(images_scored=self.images, image_forwards=float(self.images))
        return self._last_score

    def _images_at(self, numbers: Tensor) -> Tensor:
        return self._images[self._rows[numbers].to(self._images.device)]

    def _answer(self, network: nn.Module, images: Tensor) -> Predictions:
        """The answers of a network for the images with these numbers."""
        logits = self._predict(network, self._images_at(images))
        check_logits(logits, len(images), network)
        logits = logits.float().cpu()
        broken = logits.isnan().any(dim=1)
        if bool(broken.any()):
            raise ValueError(
                f"{type(network).__name__} gives NaN logits for image {int(images[broken][0])} of the hold-out; look "
                "for NaN weights, or an overflow in half precision"
            )
        return self._score.answers(self._rows[images], logits, network)


def _run(network: nn.Module, images: Tensor) -> Tensor:
    device = next((parameter.device for parameter in network.parameters()), images.device)
    logits: Tensor = network(images.to(device, non_blocking=True))
    return logits


def _needed(floor: float, images: int) -> int:
    """The least number of right answers whose score is not below the floor; `images` + 1 if all are too few."""
    if math.isnan(floor):
        raise ValueError("floor=nan: an accuracy in points is expected; was the baseline scored?")
    needed = math.floor(min(max(floor, 0.0), 100.0) * images / 100)
    needed = max(0, needed - 1)  # the quotient may have been rounded up
    while needed <= images and 100.0 * needed / images < floor - ROUNDING_POINTS:
        needed += 1
    return needed
