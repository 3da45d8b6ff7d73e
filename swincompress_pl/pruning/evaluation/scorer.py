"""The two questions of a search: what a network scores, and whether a candidate scores at least so much.

A `Scorer` answers them: a `HoldOut`, or a function of the user's. `Evaluator` is what a search talks to: it knows as
well which network was scored last, so that none is scored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from swincompress_pl.arguments import shown
from swincompress_pl.evaluation_mode import evaluation_mode as evaluation_mode
from swincompress_pl.pruning.evaluation.ranks import failing_together, from_rank_zero

ROUNDING_POINTS = 1e-9  # a score is a quotient of counts: the floor itself is not below the floor


@dataclass(frozen=True)
class Verdict:
    """The answer about one candidate.

    score: its accuracy in points, an estimate unless `exact`. accepted: at least the floor. images: how many it was
    scored on. exact: on all of them. error_points: the standard error of the score, 0 where it is exact.
    """

    score: float
    accepted: bool
    images: int
    exact: bool
    error_points: float = 0.0


@dataclass
class ScoringCost:
    """What scoring has cost, over all ranks.

    images_scored: images that a network was run on. image_forwards: whole forward passes an image that this took; a
    pass that begins at a later segment counts as its part of the multiply-accumulates. naive_images: what scoring every
    image at each decision and each full score would have taken. decisions: candidates judged.
    """

    images_scored: int = 0
    image_forwards: float = 0.0
    naive_images: int = 0
    decisions: int = 0

    def __add__(self, other: ScoringCost) -> ScoringCost:
        return ScoringCost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScoringCost:
        """What `to_dict` wrote."""
        return cls(**data)


class Scorer(Protocol):
    """What a search asks about its candidates. Networks are left as they were; torch's random numbers are not used."""

    cost: ScoringCost

    @property
    def images(self) -> int:
        """The size of the hold-out, 0 where that is unknown."""
        ...

    def full(self, network: nn.Module) -> float:
        """The accuracy in points, 0 to 100, on the whole hold-out."""
        ...

    def begin_round(self, network: nn.Module, *, unchanged: bool = False) -> float:
        """`full`, remembered as what the round's candidates are compared with. unchanged: the network is the one that
        was last scored in full; that score is used again."""
        ...

    def judge(
        self, network: nn.Module, floor: float, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        """Whether the accuracy on the whole hold-out is at least `floor` points.

        tensors: the parameters, by name, in which the network differs from the one accepted last in this round.
        resolution_points: for scores that are compared with others, the standard error of an accepted candidate's.
        """
        ...

    def accept(self, tensors: Sequence[str]) -> None:
        """The change judged last stays."""
        ...


class FunctionScorer:
    """Scores with a function of the user's, network -> accuracy in points; always exact, the hold-out's size unknown.

    The function has to leave the weights alone. In a distributed run each rank calls it, and rank 0's value counts.
    What it is cannot be seen from outside; an attribute `fingerprint`, a text that changes whenever the function scores
    otherwise, tells it from others wherever scores are kept.
    """

    images = 0

    def __init__(self, evaluate: Callable[[nn.Module], float]) -> None:
        self._evaluate = evaluate
        self._score: float | None = None
        self.cost = ScoringCost()

    @property
    def fingerprint(self) -> str | None:
        """The function's."""
        return fingerprint_of(self._evaluate)

    @failing_together("scoring")
    def full(self, network: nn.Module) -> float:
        with evaluation_mode(network), torch.no_grad():
            value = from_rank_zero(self._evaluate(network))
        self._score = checked_score(value, f"this {type(network).__name__}")
        return self._score

    def begin_round(self, network: nn.Module, *, unchanged: bool = False) -> float:
        return self._score if unchanged and self._score is not None else self.full(network)

    def judge(
        self, network: nn.Module, floor: float, tensors: Sequence[str], *, resolution_points: float | None = None
    ) -> Verdict:
        kept = self._score
        score = self.full(network)
        self._score = kept  # a candidate is not what the round goes on from
        self.cost.decisions += 1
        return Verdict(score=score, accepted=score >= floor - ROUNDING_POINTS, images=0, exact=True)

    def accept(self, tensors: Sequence[str]) -> None:
        """Nothing to remember."""


Evaluate = Callable[[nn.Module], float]
"""The accuracy of a network on a hold-out in points, 0 to 100; it must leave the weights alone."""


def as_scorer(evaluate: Evaluate | Scorer) -> Scorer:
    """A scorer as it is, a function as one that scores everything each time."""
    return cast(Scorer, evaluate) if hasattr(evaluate, "judge") else FunctionScorer(evaluate)


class Evaluator:
    """Asks a scorer for one search, and remembers what is known already.

    The search says when the network has changed since it was last scored (`network_changed`): by training, or by a cut
    that was taken back.
    """

    def __init__(self, evaluate: Evaluate | Scorer) -> None:
        self._scorer = as_scorer(evaluate)
        self._is_latest = False  # the scorer's last full score is of the network as it stands

    @property
    def images(self) -> int:
        """The size of the hold-out, 0 where that is unknown."""
        return self._scorer.images

    @property
    def fingerprint(self) -> object:
        """Tells what scores from others, None where that is unknown."""
        return fingerprint_of(self._scorer)

    @property
    def earlier_fingerprint(self) -> str | None:
        """What version 0.1 said of a hold-out, None where that is too little."""
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
        """From now on candidates are compared with `network`; its score."""
        score = self._scorer.begin_round(network, unchanged=self._is_latest)
        self._is_latest = True
        return score

    def keep(self, tensors: Sequence[str]) -> None:
        """The candidate asked about last is part of what is compared with."""
        self._scorer.accept(tensors)

    def network_changed(self) -> None:
        """The network is another one than that which was last scored in full."""
        self._is_latest = False

    def network_unchanged(self) -> None:
        """The network is the one that the scorer last scored in full, for another search."""
        self._is_latest = True

    def spent(self) -> dict[str, float]:
        """What scoring has cost (`ScoringCost`), the scorer's earlier searches included."""
        return self._scorer.cost.to_dict()

    def spent_since(self, before: Mapping[str, float]) -> dict[str, float]:
        """What scoring has cost since `spent` gave `before`."""
        return {key: value - before[key] for key, value in self.spent().items()}


def as_evaluator(evaluate: Evaluate | Scorer | Evaluator) -> Evaluator:
    """An evaluator as it is, one of anything else that scores."""
    return evaluate if isinstance(evaluate, Evaluator) else Evaluator(evaluate)


def fingerprint_of(scores: object) -> str | None:
    """The text by which a scorer or a function is told from others: its attribute `fingerprint`, None without one."""
    found = getattr(scores, "fingerprint", None)
    if found is not None and (not isinstance(found, str) or not found):
        raise ValueError(f"fingerprint={shown(found)}: it has to be a text, e.g. 'top-1 on my hold-out, version 1'")
    return found


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any type on any device."""
    plain: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return plain


def checked_score(value: object, what: str) -> float:
    """`value` as a float; ValueError when it is no accuracy in points."""
    score = float(value)  # type: ignore[arg-type]  # a zero-dimensional tensor is welcome
    if not 0 <= score <= 100:
        raise ValueError(
            f"the score of {what} is {score}; an accuracy in points, 0 to 100, is expected "
            "(NaN: look for NaN weights or an empty hold-out). The network was left as it was."
        )
    return score
