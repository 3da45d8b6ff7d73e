"""What the callback itself costs, without the passes that score: as a part of an epoch's training."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.pruning import HoldOut
from swincompress_pl.pruning.structure import weight_masks

from .jobs import Job
from .subjects import Subject, trainer
from .training import search_options

_EPOCHS = 4
_BATCHES = 6  # of an epoch; the rest is extrapolated
_HOOKS = ("setup", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "teardown")


class Stopwatch:
    """Time spent inside wrapped functions; calls from one into another, or from within `but_not_in`, do not count."""

    def __init__(self, device: str, but_not_in: Stopwatch | None = None) -> None:
        self.seconds = 0.0
        self._inside = False
        self._device = device
        self._outer = but_not_in

    def now(self) -> float:
        """Seconds, with the device's work done."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside or (self._outer is not None and self._outer._inside):
                return function(*args, **kwargs)
            self._inside, started = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - started
                self._inside = False

        return call

    @contextmanager
    def on(self, owner: Any, names: Sequence[str]) -> Iterator[None]:
        """The attributes `names` of a class, an object or a module are timed for a while."""
        with ExitStack() as stack:
            for name in names:
                own = name in vars(owner)
                found = inspect.getattr_static(owner, name)
                if isinstance(found, classmethod):
                    timed: Any = classmethod(self.timed(found.__func__))
                else:
                    timed = self.timed(getattr(owner, name))
                setattr(owner, name, timed)
                stack.callback(setattr, owner, name, found) if own else stack.callback(delattr, owner, name)
            yield


class _Epochs(Callback):
    """The time of the training steps alone, and of the callback in each epoch so far."""

    def __init__(self, watches: dict[str, Stopwatch], now: Callable[[], float]) -> None:
        self.watches, self.now = watches, now
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:  # the first step of an epoch warms caches after a shrink
            self.started = self.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == _BATCHES - 1:
            spent = {name: watch.seconds for name, watch in self.watches.items()}
            self.epochs.append({"batch": (self.now() - self.started) / (_BATCHES - 1), **spent})


def overhead(subject: Subject, job: Job) -> dict[str, Any]:
    """A round before each of some short epochs; the time of an epoch is that of a batch times the number of batches.

    callback: hooks, and the masks' upkeep after each step. scorer: inside HoldOut. building: reading the hold-out,
    once. The own time is callback - scorer - building, where the upkeep of the unseen steps is added in proportion.
    """
    data, module = subject.data(), subject.classifier()
    batches = len(data.train_dataloader())
    watches = {name: Stopwatch(subject.place.device) for name in ("callback", "scorer", "building")}
    watches["masks"] = Stopwatch(subject.place.device, but_not_in=watches["callback"])
    epochs = _Epochs(watches, watches["callback"].now)
    pruning = AdaptiveIterativePruning(max_rounds=_EPOCHS, **search_options(subject, job, module.net))
    with ExitStack() as stack:
        stack.enter_context(watches["callback"].on(pruning, _HOOKS))
        stack.enter_context(watches["masks"].on(weight_masks, ["enforce_masks"]))
        stack.enter_context(watches["scorer"].on(HoldOut, ["full", "begin_round", "judge", "accept"]))
        stack.enter_context(watches["building"].on(HoldOut, ["from_batches"]))
        trainer(_EPOCHS, [epochs, pruning], subject.place, limit_train_batches=_BATCHES).fit(module, datamodule=data)
    rows = [_epoch(before, now, batches) for before, now in zip([{}, *epochs.epochs], epochs.epochs, strict=False)]
    assert pruning.search_state is not None
    return {
        "epochs": rows,
        "batches_timed": _BATCHES,
        "batches_an_epoch": batches,
        "batch_size": subject.recipe.batch_size,
        "targets": len(pruning.search_state.targets),
        "threads": torch.get_num_threads(),
        "share_mean": sum(row["share"] for row in rows) / len(rows),
        "share_max": max(row["share"] for row in rows),
    }


def _epoch(before: dict[str, float], now: dict[str, float], batches: int) -> dict[str, float]:
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in now.items() if name != "batch"}
    training = now["batch"] * batches
    own = spent["callback"] - spent["scorer"] - spent["building"] + spent["masks"] * batches / _BATCHES
    return {"training_s": training, "own_s": own, **{f"{k}_s": v for k, v in spent.items()}, "share": own / training}
