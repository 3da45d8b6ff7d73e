"""The same search scored naively and by `HoldOut`: are the decisions the same, and how many images did they take?"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, SearchState, prune
from swincompress_pl.pruning.adaptive.search import SearchSession
from swincompress_pl.pruning.evaluation.scorer import FunctionScorer, Scorer

from .batches import MemoryData
from .jobs import Job
from .subjects import Subject
from .training import fit, gradients_from, search_options


class NaiveScoring:
    """Every decision on every image of the hold-out; `images` counts them."""

    def __init__(self, data: MemoryData) -> None:
        self.data, self.images = data, 0

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> float:
        right = 0
        for images, labels in self.data.batches("holdout"):
            right += int((network(images).argmax(1) == labels).sum())
            self.images += len(labels)
        return 100.0 * right / self.data.images("holdout")


def scoring(subject: Subject, job: Job) -> dict[str, Any]:
    """A whole search on the given network, or (job.recovery) one round on a network that was fine-tuned before, on
    images other than the hold-out, as a round inside a fit finds it."""
    data, module = subject.data(), subject.classifier()
    if job.recovery:
        epochs = max(1, subject.recipe.start_epoch)
        fit(replace(subject, recipe=replace(subject.recipe, epochs=epochs)), module, data, [])
    network = module.net.to(subject.place.device).eval()
    naive = NaiveScoring(data)
    by_function, seconds_naive = _search(copy.deepcopy(network), FunctionScorer(naive), subject, job, data)
    holdout = HoldOut.from_batches(data.holdout_dataloader())
    by_holdout, seconds = _search(network, holdout, subject, job, data)
    one, other = _decisions(by_function), _decisions(by_holdout)
    differing = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    cost = holdout.cost.to_dict()
    return {
        "holdout_images": data.images("holdout"),
        "equal": one == other,
        "decisions": len(other),
        "decisions_naive": len(one),
        "equal_until": differing,
        "naive_images": naive.images,
        "scoring": cost,
        "fewer_images": naive.images / cost["images_scored"],
        "fewer_forwards": naive.images / cost["image_forwards"],
        "rounds": by_holdout.rounds,
        "score": by_holdout.score,
        "score_naive": by_function.score,
        "seconds": seconds,
        "seconds_naive": seconds_naive,
        "lists": {"naive": one, "holdout": other} if one != other else {"holdout": other},
    }


def _search(
    network: nn.Module, scorer: Scorer, subject: Subject, job: Job, data: MemoryData
) -> tuple[SearchState, float]:
    config = AdaptivePruningConfig(**search_options(subject, job, network))
    gradients, started = gradients_from(data), time.perf_counter()
    if job.recovery:
        session = SearchSession(network, scorer, config, input_shape=subject.input_shape, gradients=gradients)
        state = session.round().state
    else:
        state = prune(network, scorer, config, input_shape=subject.input_shape, gradients=gradients).state
    return state, time.perf_counter() - started


def _decisions(state: SearchState) -> list[list[Any]]:
    return [[step.target, step.units_after, step.accepted] for step in state.steps]
