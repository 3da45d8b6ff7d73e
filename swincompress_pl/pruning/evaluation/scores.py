"""What a hold-out scores: answers compared with labels, or with the network that was scored first.

| score | of what | decided |
|---|---|---|
| "accuracy" | right answers, in points | on as few images as possible |
| "agreement" | answers that are those of the network scored first, in points | in the same way |
| "kl" | 100 exp(-mean KL(first network, this one)), with the divergence in nats | on all images |

The last two need no labels. A network that agrees with another on all but d points of the images is at most d points
less accurate, whatever the labels are. With "kl" a small tolerance of t points is about t / 100 nats.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from swincompress_pl.pruning.evaluation.sequential_test import Margins, Predictions

SCORES = ("accuracy", "agreement", "kl")
_LARGEST_MARGIN = 1e4


@dataclass(frozen=True)
class Divergences(Predictions):
    """Answers, and the divergence of each from what the first network said, in nats."""

    divergence: Margins


class Accuracy:
    """Compares answers with labels.

    Args:
        labels: The class of each image of this rank.
    """

    name = "accuracy"
    decides_on_part = True  # whether a part of the images is often enough
    counts_answers = True  # whether a point is a hundredth of the images

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels

    @contextmanager
    def scoring(self, rows: Tensor) -> Iterator[None]:
        """A pass over all of these images, which may be the first."""
        yield

    def answers(self, rows: Tensor, logits: Tensor, network: nn.Module) -> Predictions:
        """What these logits, in float on the CPU, answer for the images with the numbers `rows`."""
        labels = self._labels[rows]
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(
                f"label {int(labels.max())} of the hold-out is not among the {logits.shape[1]} classes of "
                f"{type(network).__name__}, 0 to {logits.shape[1] - 1}; score it with the labels that it was trained "
                "with"
            )
        return _compared(logits, labels)

    def total(self, found: Iterable[Predictions]) -> float:
        """What of these answers adds up over batches and ranks."""
        return sum(int(each.correct.sum()) for each in found)

    def points(self, totals: Sequence[float], images: int) -> float:
        """The score of all `images`, 0 to 100, from the totals of all ranks."""
        return 100.0 * sum(totals) / images

    def stored(self) -> str:
        """The answers of the first network as text; empty if they are not needed."""
        return ""

    def fingerprint(self) -> str:
        """Identifies what answers are compared with, beside labels."""
        return ""

    def take_up(self, stored: str) -> None:
        """Takes up what `stored` returned."""
        if stored:
            raise ValueError("the search was begun with a score without labels; give the hold-out the same score=")


class Agreement(Accuracy):
    """Compares answers with those of the first network, which it takes up in the first pass over all images.

    Args:
        count: Number of images of this rank. Parts of a hold-out share one object, and each brings its own images.
    """

    name = "agreement"

    def __init__(self, count: int) -> None:
        self._known = torch.zeros(count, dtype=torch.bool)
        self._first = torch.zeros(count, 0)
        self._heard: list[tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def scoring(self, rows: Tensor) -> Iterator[None]:
        """A pass over all of these images; if it is the first one, and it succeeds, its answers are kept."""
        if bool(self._known[rows].all()):
            yield
            return
        self._heard = []
        try:
            yield
            for each, kept in self._heard:
                self._keep(each, kept)
        finally:
            self._heard = None

    def _keep(self, rows: Tensor, kept: Tensor) -> None:
        if self._first.shape[1] == 0:
            self._first = kept.new_zeros(len(self._known), kept.shape[1])
        self._first[rows], self._known[rows] = kept, True

    def _reference(self, rows: Tensor, logits: Tensor, network: nn.Module) -> Tensor:
        """What the first network said of these images, as `_kept` makes it of logits."""
        if self._heard is not None:
            kept = self._kept(logits)
            self._heard.append((rows, kept))
            return kept
        if not bool(self._known[rows].all()):
            raise RuntimeError(f"score={self.name!r}: no network was scored on all images yet; call full(network)")
        return self._first[rows]

    def _kept(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=1)[:, None]

    def answers(self, rows: Tensor, logits: Tensor, network: nn.Module) -> Predictions:
        """What these logits answer, compared with the first network."""
        classes = self._reference(rows, logits, network)[:, 0]
        if int(classes.max()) >= logits.shape[1]:
            raise ValueError(
                f"{type(network).__name__} has {logits.shape[1]} classes, and the network that was scored first "
                f"answered {int(classes.max())}; compare networks with the same classes"
            )
        return _compared(logits, classes)

    def stored(self) -> str:
        """The answers of the first network as text."""
        assert bool(self._known.all())
        file = io.BytesIO()
        np.save(file, self._first.numpy(), allow_pickle=False)
        return f"{self.name} {base64.b64encode(file.getvalue()).decode()}"

    def fingerprint(self) -> str:
        """Identifies the answers of the first network."""
        return hashlib.sha256(self._first.numpy().tobytes()).hexdigest()

    def take_up(self, stored: str) -> None:
        """Takes up what `stored` returned, of the same images."""
        name, _, content = stored.partition(" ")
        if name != self.name:
            raise ValueError(
                f"score={self.name!r}: the search was begun with {name or 'accuracy'!r}; give the hold-out the same "
                "score="
            )
        try:
            first = torch.from_numpy(np.load(io.BytesIO(base64.b64decode(content)), allow_pickle=False))
        except (ValueError, EOFError, TypeError, OSError) as error:
            raise ValueError(f"the answers of the unpruned network are damaged: {error}; begin a new search") from error
        fits = first.ndim == 2 and len(first) == len(self._known)
        if not fits or (len(first) and first.dtype != self._kept(torch.zeros(1, 2)).dtype):
            raise ValueError(
                f"the answers of the unpruned network have the shape {tuple(first.shape)}, and the hold-out has "
                f"{len(self._known)} on this rank; give the hold-out that the search began with, or begin a new search"
            )
        self._first = first
        self._known[:] = True


class Divergence(Agreement):
    """Measures how far the softmax is from that of the first network, whose logits it keeps."""

    name = "kl"
    decides_on_part = counts_answers = False

    def _kept(self, logits: Tensor) -> Tensor:
        return logits

    def answers(self, rows: Tensor, logits: Tensor, network: nn.Module) -> Divergences:
        """What these logits say, compared with the first network."""
        first = self._reference(rows, logits, network)
        if first.shape != logits.shape:
            raise ValueError(
                f"{type(network).__name__} has {logits.shape[1]} classes, and the network that was scored first "
                f"{first.shape[1]}; compare networks with the same classes"
            )
        same = _compared(logits, first.argmax(dim=1))
        before, after = first.double().log_softmax(dim=1), logits.double().log_softmax(dim=1)
        terms = torch.where(before.exp() > 0, before.exp() * (before - after), 0.0)
        return Divergences(same.correct, same.margin, terms.sum(dim=1).clamp(min=0.0).numpy())

    def total(self, found: Iterable[Predictions]) -> float:
        """The sum of the divergences, in nats."""
        return math.fsum(float(each.divergence.sum()) for each in found if isinstance(each, Divergences))

    def points(self, totals: Sequence[float], images: int) -> float:
        """100 exp(-mean divergence), 0 to 100."""
        return 100.0 * math.exp(-math.fsum(totals) / images)


def score_of(name: str, labels: Tensor | None, count: int) -> Accuracy:
    """The score of that name for `count` images of this rank; `labels` count for "accuracy" only."""
    if name == "accuracy":
        if labels is None:
            raise ValueError(
                "score='accuracy' needs labels; give labels, or score='agreement' or 'kl', which compare with the "
                "network that is scored first"
            )
        return Accuracy(labels)
    return Agreement(count) if name == "agreement" else Divergence(count)


def score_label(name: str) -> str:
    """What a score of that name is called in a summary."""
    return {"agreement": "agreement on the hold-out", "kl": "100 exp(-KL) on the hold-out"}.get(
        name, "score on the hold-out"
    )


def bound_facts(name: str, points: float | None) -> list[tuple[str, str]]:
    """What an agreement, in points, says about the accuracy, as pairs of a label and a text."""
    if name != "agreement" or points is None:
        return []
    changed = 100.0 - points
    return [("accuracy lost", f"at most {changed:.2f} points on these images, the part of the answers that changed")]


def _compared(logits: Tensor, classes: Tensor) -> Predictions:
    """Whether the largest logit is that of the class, and by how much it exceeds the largest other one."""
    true = logits.gather(1, classes[:, None])[:, 0]
    others = logits.scatter(1, classes[:, None], -math.inf).max(dim=1).values
    margin = (true - others).nan_to_num(0.0).clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN)
    return Predictions((logits.argmax(dim=1) == classes).numpy(), margin.double().numpy())


def check_logits(logits: object, count: int, network: nn.Module) -> None:
    """Raises ValueError if these are no logits (count, classes)."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(network).__name__} gave {found} for {count} images; logits of shape ({count}, classes), 2 classes "
            "or more, are expected. Give HoldOut a predict(network, images) that makes them"
        )
