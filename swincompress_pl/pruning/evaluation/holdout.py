"""Images held out of the training set, and the accuracy of networks on them.

    holdout = HoldOut(images, labels)                         # or HoldOut.from_batches(loader, max_images=10_000)
    score = holdout.begin_round(network)                      # points, 0 to 100, on every image
    with mask_units(network, group, units):
        verdict = holdout.judge(network, score - 1.0, [s.tensor for s in group.slices])

`judge` answers from as few images as the question needs (`sequential_test.py`), and begins each pass at the first
segment that the candidate changes (`prefix_cache.py`).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swincompress_pl.arguments import flag, integer, number, optional
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
from swincompress_pl.pruning.evaluation.sequential_test import (
    Predictions,
    Standing,
    Tally,
    Trial,
    add_tallies,
    deviations_for,
    look_parts,
    make_order,
)

__all__ = ["FunctionScorer", "HoldOut", "Predict", "Scorer", "ScoringCost", "Verdict"]

Predict = Callable[[nn.Module, Tensor], Tensor]
"""(network, images) -> logits (N, classes): moves the images to the network's device and runs it in its precision."""

NETWORK_ALONE = "network(images)"  # the fingerprint of a predict that returns the network's output as it is
_LARGEST_MARGIN = 1e4
_GOLDEN = (math.sqrt(5) - 1) / 2


class HoldOut:
    """Images and labels in memory that score networks: what `prune` and `primesvt` take as `evaluate`.

    A decision is the one that all N images would give, except for at most about 1 - `confidence` of those where the
    candidate is close to the floor. This assumes that answers with a larger margin change more rarely. A change that
    flips a few answers whatever their margin, and leaves the others alone, can stay unnoticed.

    Slicing the network ends a round: call `begin_round` after it. In a distributed run all ranks have to make the same
    calls.

    Args:
        images: The images (N, ...), as `predict` takes them.
        labels: The classes (N,), integers from 0.
        predict: (network, images) -> logits (N, classes). None runs the network on the images, moved to its device.
        batch_size: Images per pass, 1 or more.
        confidence: How sure a decision on part of the images has to be, 0.5 to 1; 1.0 scores until it is certain.
        seed: Decides the order of the images, 0 or more.
        cache_size_bytes: Most bytes of activations that are kept between candidates; 0 for none.
        sharded: Whether each rank of a distributed run has images of its own. Otherwise all ranks have the same images,
            and each scores its share.

    Attributes:
        images: The number of images of all ranks.
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
        labels: Tensor,
        *,
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
        _check_images(images, labels)
        if not sharded and world_size() > 1:
            images, labels = images[rank() :: world_size()], labels[rank() :: world_size()]
        self.images, self._images = _over_ranks(images)
        self._labels = labels.cpu().long()
        self._predict = predict or _run
        self._batch_size, self._seed, self._cache_size_bytes = batch_size, seed, cache_size_bytes
        self._confidence = confidence
        self._parts = look_parts()
        self._deviations = deviations_for(confidence, len(self._parts) - 1)  # the last look is exact
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
            batches: Batches (images, labels, ...), such as a DataLoader.
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
                batches, max_images=max_images, max_size_bytes=max_size_bytes, sharded=sharded, seed=seed
            )
            return cls(images, labels, sharded=sharded, seed=seed, **options)

    @property
    def fingerprint(self) -> str | None:
        """A string that identifies this rank's images and labels, and how they decide.

        None if `predict` has no attribute `fingerprint`, a string that identifies the function.
        """
        predict = "" if self._predict is _run else fingerprint_of(self._predict)
        if predict is None:
            return None
        about = (tuple(self._images.shape), self._images.dtype, self._confidence, self._seed, predict)
        return hashlib.sha256(f"{about} {self._data_digest}".encode()).hexdigest()

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.sha256(self._labels.numpy().tobytes())
        for image in self._images:  # one by one: a copy of all of them may not fit
            digest.update(tensor_bytes(image))
        return digest.hexdigest()

    @property
    def earlier_fingerprint(self) -> str | None:
        """The fingerprint of version 0.1, made of all labels and of the first and the last image."""
        if self._predict is not _run and fingerprint_of(self._predict) != NETWORK_ALONE:
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
            The accuracy in points, 0 to 100.

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
            The accuracy in points, 0 to 100.

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
                self._cache.measure(partial(self._predict, network, self._images[: self._measured_images]))
        return self._last_score

    @failing_together("scoring")
    def judge(
        self, network: nn.Module, floor: float, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        """Decides whether the accuracy on all images is at least `floor`, on as few images as possible.

        Args:
            network: The candidate.
            floor: The least accuracy in points.
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
        trial, forwards, accepted = Trial(self._standing), 0.0, None
        with evaluation_mode(network), torch.no_grad():
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
        self._trial = trial
        self.cost += ScoringCost(
            images_scored=tally.seen, image_forwards=forwards, naive_images=self.images, decisions=1
        )
        score = min(100.0, max(0.0, 100.0 * tally.estimate / self.images))
        exact = tally.seen == self.images
        if exact:
            accepted = tally.correct >= needed
        return Verdict(score=score, accepted=accepted, images=tally.seen, exact=exact, error_points=error_points)

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

        def score() -> int:
            for images in torch.arange(len(self._labels)).split(self._batch_size):
                if len(images):
                    found.append(self._answer(network, images))
            return sum(int(each.correct.sum()) for each in found)

        with evaluation_mode(network), torch.no_grad():
            correct = sum(gather_results(score))
        self._last_full = Predictions(
            np.concatenate([np.zeros(0, np.bool_), *(each.correct for each in found)]),
            np.concatenate([np.zeros(0), *(each.margin for each in found)]),
        )
        self._last_score = 100.0 * correct / self.images
        self.cost += ScoringCost(images_scored=self.images, image_forwards=float(self.images))
        return self._last_score

    def _answer(self, network: nn.Module, images: Tensor) -> Predictions:
        """The answers of a network for the images with these numbers."""
        labels = self._labels[images]
        logits = self._predict(network, self._images[images.to(self._images.device)])
        _check_logits(logits, labels, network)
        logits = logits.float().cpu()
        broken = logits.isnan().any(dim=1)
        if bool(broken.any()):
            raise ValueError(
                f"{type(network).__name__} gives NaN logits for image {int(images[broken][0])} of the hold-out; look "
                "for NaN weights, or an overflow in half precision"
            )
        true = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -math.inf).max(dim=1).values
        margin = (true - others).nan_to_num(0.0).clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN)
        return Predictions((logits.argmax(dim=1) == labels).numpy(), margin.double().numpy())


class TooLargeError(ValueError):
    """The images take more than `max_size_bytes`.

    Attributes:
        image_size_bytes: Bytes of one image.
        max_images: Number of images over all ranks that do not; 0 if not even one does.
    """

    def __init__(self, max_size_bytes: int, image_size_bytes: int, ranks: int) -> None:
        self.image_size_bytes, self.max_images = image_size_bytes, ranks * (max_size_bytes // image_size_bytes)
        fewer = f"keep max_images={self.max_images}, " if self.max_images else ""
        super().__init__(
            f"the hold-out takes more than max_size_bytes={max_size_bytes}, {image_size_bytes} per image; {fewer}allow "
            "more bytes, or use FunctionScorer(evaluate) with a function that reads the images again each time"
        )


def read_images(
    batches: Iterable[Any], *, max_images: int | None, max_size_bytes: int, sharded: bool, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(images, labels) of this rank, as `HoldOut.from_batches` keeps them; empty if no batch has any."""
    most = optional(integer, "max_images", max_images, least=1, wanted="None (all) or 1 or more")
    max_size_bytes = integer("max_size_bytes", max_size_bytes, least=1)
    seed, sharded = integer("seed", seed, least=0), flag("sharded", sharded)
    if sharded and most is not None:
        most = most // world_size() + (rank() < most % world_size())
    return _collect(batches, most, max_size_bytes, seed, ranks=world_size() if sharded else 1)


def _over_ranks(images: Tensor) -> tuple[int, Tensor]:
    """The number of images of all ranks, and the images of this one; without any, an empty tensor of the right shape.

    Raises ValueError on all ranks if none has an image, or two have images of different shapes.
    """
    found = from_all_ranks((len(images), tuple(images.shape[1:])))
    shapes = {shape: number for number, (count, shape) in reversed(list(enumerate(found))) if count}
    if not shapes:
        raise ValueError("the hold-out is empty; give it images to score on")
    if len(shapes) > 1:
        told = " and ".join(f"{shape} (rank {number})" for shape, number in sorted(shapes.items(), key=lambda s: s[1]))
        raise ValueError(f"the ranks' hold-outs have images of different shapes, {told}; bring them to one")
    (shape,) = shapes
    return sum(count for count, _ in found), images if len(images) else images.new_zeros((0, *shape))


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


def _check_images(images: Tensor, labels: Tensor) -> None:
    if images.ndim < 1 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}: one label for each "
            "image is expected"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of type {labels.dtype}: integers are expected, the class of each image")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} of the hold-out is negative; classes count from 0")


def _check_logits(logits: object, labels: Tensor, network: nn.Module) -> None:
    name = type(network).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{name} gave {found} for {len(labels)} images; logits of shape ({len(labels)}, classes), 2 classes or "
            "more, are expected. Give HoldOut a predict(network, images) that makes them"
        )
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"label {int(labels.max())} of the hold-out is not among the {logits.shape[1]} classes of {name}, 0 to "
            f"{logits.shape[1] - 1}; score it with the labels that it was trained with"
        )


def _collect(
    batches: Iterable[Any], most: int | None, max_size_bytes: int, seed: int, *, ranks: int
) -> tuple[Tensor, Tensor]:
    """The images and labels of `batches`, or `most` of them with the classes in proportion, in their own order.

    `ranks` is the number of ranks that have as many images of their own, for the error.
    """
    kept: list[tuple[float, int, Tensor, int]] = []  # a heap of (-key, place, image, label): the largest key on top
    keys: dict[int, float] = {}
    size_bytes = 0
    rng = np.random.default_rng(seed)
    for place, (image, label) in enumerate(_rows(batches)):
        # Steps of the golden ratio spread evenly: the smallest keys are the same part of each class.
        keys[label] = (keys[label] + _GOLDEN) % 1.0 if label in keys else float(rng.random())
        if most is None or len(kept) < most:
            heapq.heappush(kept, (-keys[label], place, image.clone(), label))
            size_bytes += image.nbytes
        elif most and -kept[0][0] > keys[label]:
            heapq.heapreplace(kept, (-keys[label], place, image.clone(), label))
        if size_bytes > max_size_bytes:
            raise TooLargeError(max_size_bytes, image.nbytes, ranks)
    if not kept:
        return torch.zeros(0), torch.zeros(0, dtype=torch.long)
    kept.sort(key=lambda entry: entry[1])
    return torch.stack([image for _, _, image, _ in kept]), torch.tensor([label for *_, label in kept])


def _rows(batches: Iterable[Any]) -> Iterator[tuple[Tensor, int]]:
    for batch in batches:
        if not (
            isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2])
        ):
            raise TypeError(
                f"the hold-out has a batch of type {type(batch).__name__}; tensors (images, labels, ...) are expected"
            )
        images, labels = batch[0], batch[1]
        _check_images(images, labels)
        yield from zip(images, labels.tolist(), strict=True)
