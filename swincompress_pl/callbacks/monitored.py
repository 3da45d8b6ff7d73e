"""Refuses to score by a metric that shrinks as a network gets better: a search would keep what makes it worse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lightning import Trainer

_REMEDY = (
    "a search keeps what scores more; monitor a metric that grows, such as the accuracy, a fraction between 0 and 1"
)
# Words that say of which images a metric is, or how it was averaged: not what it measures.
_WHERE = re.compile(
    "train|training|val|valid|validation|test|holdout|dataloader|idx|epoch|step|avg|average|mean|total|sum|macro|micro|"
    "weighted"
)
_SHRINKING = re.compile(
    r"\w*loss|losses|errors?|err|cost|nll|perplexity|ppl|entropy|crossentropy|xent|xe|ce|bce|kl|kld|divergence|mse|rmse|"
    "msle|mae|mape|smape|brier|ece|mce|wer|cer|eer|fpr|fnr|fid|lpips|distance|residual"
)


def refuse_shrinking_name(monitor: str) -> None:
    """Raises a ValueError for a metric whose name says that less of it is better, such as "val/loss"."""
    words = [word for word in _words(monitor) if not _WHERE.fullmatch(word)]
    telling = [word for word in words[-1:] if _SHRINKING.fullmatch(word)]
    telling += [word for word in words[:1] if word in ("loss", "losses")]  # "loss/classifier"
    if telling:
        raise ValueError(
            f"monitor={monitor!r} shrinks as a network gets better, as its name says ({telling[0]!r}), but {_REMEDY}. "
            "If it does grow, log it under another name"
        )


def refuse_minimized(monitor: str, trainer: Trainer) -> None:
    """Raises a ValueError if a callback or a scheduler of the fit takes less of the metric for better."""
    for name in _minimizing(monitor, trainer):
        raise ValueError(
            f"monitor={monitor!r} is also monitored by {name} with mode='min', for which less is better, but {_REMEDY}."
            f" If more of {monitor!r} is better, give {name} mode='max' (its default is 'min')"
        )


def _minimizing(monitor: str, trainer: Trainer) -> Iterator[str]:
    """Yields the names of the callbacks and schedulers that monitor this metric with mode="min"."""
    watchers: list[tuple[Any, Any]] = [
        (each, getattr(each, "monitor", None))
        for each in trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    ]
    watchers += [(config.scheduler, config.monitor) for config in trainer.lr_scheduler_configs]
    for watcher, watched in watchers:
        ranks = getattr(watcher, "save_top_k", 1) not in (-1, 0)  # a checkpoint callback that does not, needs no mode
        if watched == monitor and ranks and getattr(watcher, "mode", None) == "min":
            yield type(watcher).__name__


def _words(name: str) -> list[str]:
    """The words of a metric's name in lower case, without numbers: "val/topErr_1" has "val", "top" and "err"."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
