"""The two questions of a search: what a network scores, and whether a candidate's score reaches a floor.

A `Scorer` answers them, a `HoldOut` or a function of the user. A search asks an `Evaluator`, which also knows which
network was scored last, so that none is scored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from swincompress_pl.arguments import shown
from swincompress_pl.evaluation_mode import evaluation_mode as evaluation_mode
from swincompress_pl.pruning.evaluation.ranks import failing_together, from_rank_zero

ROUNDING_POINTS = 1e-9  # a score is a quotient of counts: the floor itself is not below the floor


@dataclass(frozen=True)
class Verdict:
    """The answer about one candidate.

    Attributes:
        score: Accuracy in points, 0 to 100, an estimate unless `exact`.
        accepted: Whether the accuracy is at least the floor.
        images: Number of images that it was scored on; 0 if a function scores.
        exact: Whether it was scored on the whole hold-out.
        error_points: Standard error of the score in points; 0 if it is exact.
    """

    score: float
    accepted: bool
    images: int
    exact: bool
    error_points: float = 0.0


@dataclass
class ScoringCost:
    """What scoring has cost, over all ranks.

    Attributes:
        images_scored: Number of images that a network was run on.
        image_forwards: Number of forward passes of single images. A pass that begins at a later segment counts as its
            part of the multiply-accumulates.
        naive_images: Number of images if every decision and every full score took the whole hold-out.
        decisions: Number of candidates that were judged.
    """

    images_scored: int = 0
    image_forwards: float = 0.0
    naive_images: int = 0
    decisions: int = 0

    def __add__(self, other: ScoringCost) -> ScoringCost:
        return ScoringCost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def to_dict(self) -> dict[str, float]:
        """Returns the numbers by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScoringCost:
        """What `to_dict` wrote."""
        return cls(**data)


class Scorer(Protocol):
    """What a search asks about its candidates.

    A scorer leaves networks as they were, and does not use torch's random numbers.
    """

    cost: ScoringCost

    @property
    def images(self) -> int:
        """The size of the hold-out; 0 if it is unknown."""
        ...

    def full(self, network: nn.Module) -> float:
        """The accuracy in points, 0 to 100, on the whole hold-out."""
        ...

    def begin_round(self, network: nn.Module, *, unchanged: bool = False) -> float:
        """Scores the network that the candidates of the round are compared with.

        With `unchanged`, it is the network that was last scored in full, and that score is used again.
        """
        ...

    def judge(
        self, network: nn.Module, floor: float, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        """Decides whether the accuracy on the whole hold-out is at least `floor` points.

        `tensors` names the parameters in which the network differs from the one accepted last in this round.
        `resolution_points` is the largest standard error of an accepted candidate's score; None for any.
        """
        ...

    def accept(self, tensors: Sequence[str]) -> None:
        """Keeps the change that was judged last."""
        ...


@runtime_checkable
class KeepsFirst(Protocol):
    """A scorer that may compare with the network that it scored first, such as a `HoldOut` without labels."""

    def first_answers(self) -> list[str]:
        """What that network answered, one text per rank; empty if it is not needed."""
        ...

    def take_up_first(self, stored: Sequence[str]) -> None:
        """Takes up what `first_answers` returned."""
        ...


class FunctionScorer:
    """Scores with a function of the user, network -> accuracy in points.

    Its scores are always exact, and the size of the hold-out is unknown. The function must not change the weights. In
    a distributed run each rank calls it, and rank 0's value counts. An attribute `fingerprint` of the function
    identifies it where scores are kept: a string that changes whenever the function scores in another way.
    """

    images = 0

    def __init__(self, evaluate: Callable[[nn.Module], float]) -> None:
        self._evaluate = evaluate
        self._score: float | None = None
        self.cost = ScoringCost()

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the function; None without one."""
        return fingerprint_of(self._evaluate)

    @failing_together("scoring")
    def full(self, network: nn.Module) -> float:
        """See `Scorer.full`."""
        with evaluation_mode(network), torch.no_grad():
            value = from_rank_zero(self._evaluate(network))
        self._score = checked_score(value, f"this {type(network).__name__}")
        return self._score

    def begin_round(self, network: nn.Module, *, unchanged: bool = False) -> float:
        """See `Scorer.begin_round`."""
        return self._score if unchanged and self._score is not None else self.full(network)

    def judge(
        self, network: nn.Module, floor: float, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        """See `Scorer.judge`."""
        kept = self._score
        score = self.full(network)
        self._score = kept  # the next candidates are not compared with this one
        self.cost.decisions += 1
        return Verdict(score=score, accepted=score >= floor - ROUNDING_POINTS, images=0, exact=True)

    def accept(self, tensors: Sequence[str]) -> None:
        """Does nothing."""


Evaluate = Callable[[nn.Module], float]
"""(network) -> accuracy on a hold-out in points, 0 to 100; it must not change the weights."""


def as_scorer(evaluate: Evaluate | Scorer) -> Scorer:
    """Returns a scorer as it is, and wraps a function in a `FunctionScorer`."""
    if hasattr(evaluate, "judge"):
        return cast(Scorer, evaluate)
    if not callable(evaluate):
        raise TypeError(
            f"what scores is a {type(evaluate).__name__}; give a HoldOut, or a function that takes the network and "
            "returns its accuracy in points"
        )
    return FunctionScorer(evaluate)


class Evaluator:
    """Asks a scorer for one search, and remembers which network was scored last.

    The search calls `network_changed` if the network has changed since then: by training, or because a cut was undone.
    """

    def __init__(self, evaluate: Evaluate | Scorer) -> None:
        self._scorer = as_scorer(evaluate)
        self._is_latest = False  # whether the scorer's last full score is of the present network

    @property
    def scorer(self) -> Scorer:
        """What is asked."""
        return self._scorer

    @property
    def images(self) -> int:
        """The size of the hold-out; 0 if it is unknown."""
        return self._scorer.images

    @property
    def score_kind(self) -> str:
        """What is scored: "accuracy", "agreement" or "kl"."""
        return str(getattr(self._scorer, "score", "accuracy"))

    def first_answers(self) -> list[str]:
        """What the unpruned network answered, where that is what is scored; empty with labels."""
        return self._scorer.first_answers() if isinstance(self._scorer, KeepsFirst) else []

    def take_up_first(self, stored: Sequence[str]) -> None:
        """Takes up what `first_answers` returned; a ValueError if it does not fit what scores."""
        if isinstance(self._scorer, KeepsFirst):
            self._scorer.take_up_first(stored)
        elif stored:
            raise ValueError(
                "the search was begun with a hold-out without labels, and goes on with a function; give the hold-out"
            )

    @property
    def fingerprint(self) -> object:
        """A string that identifies what scores; None if it is unknown."""
        return fingerprint_of(self._scorer)

    @property
    def earlier_fingerprint(self) -> str | None:
        """The fingerprint of version 0.1; None if there was none for this scorer."""
        return getattr(self._scorer, "earlier_fingerprint", None)

    def score(self, network: nn.Module) -> float:
        """The accuracy in points on the whole hold-out."""
        score = self._scorer.full(network)
        self._is_latest = True
        return score

    def is_at_least(
        self, floor: float, network: nn.Module, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        """Whether the candidate `network` has at least `floor` points; see `Scorer.judge`."""
        return self._scorer.judge(network, floor, tensors, resolution_points=resolution_points)

    def compare_with(self, network: nn.Module) -> float:
        """Scores the network that candidates are compared with from now on."""
        score = self._scorer.begin_round(network, unchanged=self._is_latest)
        self._is_latest = True
        return score

    def keep(self, tensors: Sequence[str]) -> None:
        """Keeps the change that was judged last: later candidates contain it."""
        self._scorer.accept(tensors)

    def network_changed(self) -> None:
        """Says that the network is not the one that was last scored in full."""
        self._is_latest = False

    def network_unchanged(self) -> None:
        """Says that the network is the one that the scorer last scored in full, for another search."""
        self._is_latest = True

    def spent(self) -> dict[str, float]:
        """What scoring has cost (`ScoringCost`), including earlier searches with this scorer."""
        return self._scorer.cost.to_dict()

    def spent_since(self, before: Mapping[str, float]) -> dict[str, float]:
        """What scoring has cost since `spent` returned `before`."""
        return {key: value - before[key] for key, value in self.spent().items()}


def as_evaluator(evaluate: Evaluate | Scorer | Evaluator) -> Evaluator:
    """Returns an evaluator as it is, and wraps anything else that scores."""
    return evaluate if isinstance(evaluate, Evaluator) else Evaluator(evaluate)


def fingerprint_of(scores: object) -> str | None:
    """The attribute `fingerprint`, a string that identifies a scorer or a function; None without one."""
    found = getattr(scores, "fingerprint", None)
    if found is not None and (not isinstance(found, str) or not found):
        raise ValueError(f"fingerprint={shown(found)}: it has to be a string, e.g. 'top-1 on my hold-out, version 1'")
    return found


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type on any device."""
    plain: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return plain


def checked_score(value: object, what: str) -> float:
    """`value` as a float; a ValueError if it is not an accuracy in points."""
    score = float(value)  # type: ignore[arg-type]  # a zero-dimensional tensor is welcome
    if not 0 <= score <= 100:
        raise ValueError(
            f"the score of {what} is {score}; an accuracy in points, 0 to 100, is expected "
            "(NaN: look for NaN weights or an empty hold-out). The network was left as it was."
        )
    return score
