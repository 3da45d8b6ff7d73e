"""Measures parts of a fit: a few batches of an epoch, a search on a few targets, the exchange to integers."""

from __future__ import annotations

import copy
import dataclasses
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.callbacks.searched_network import searched_network
from swincompress_pl.pruning.space import local_space

# The first batches of a loader wait for its workers and for the allocators, so they are not counted.
_WARM_UP = 3
# A search is measured on this number of its targets, spread evenly over the depth of the network.
_TARGETS = 6
# A whole search that takes no longer is measured as a whole.
_WHOLE_SEARCH_S = 60.0
# A fit of one epoch without validation. It keeps its validation data, which are the hold-out of a search.
_NO_VALIDATION: Mapping[str, Any] = {"max_epochs": 1, "check_val_every_n_epoch": 2, "val_check_interval": 1.0}

Search = AdaptiveIterativePruning | PrimeSVT
MakeTrainer = Callable[..., Trainer]
"""Makes a trainer with the settings of the config, except for those given by name."""
Progress = Callable[[str], object]
"""Is told what is measured next, such as "validation, 20 batches"."""


@dataclass(frozen=True, kw_only=True)
class EpochTime:
    """The durations of an epoch's training and of one pass of validation, from the medians of a few batches.

    Attributes:
        training_s: Seconds for all training batches.
        validation_s: Seconds for all validation batches; 0 without any.
        training_batches: Number of batches in an epoch.
        validation_batches: Number of batches in a pass of validation.
    """

    training_s: float
    validation_s: float
    training_batches: int
    validation_batches: int


@dataclass(frozen=True, kw_only=True)
class SearchTime:
    """The duration of a search, or of one round of it, from a search on a few targets.

    Attributes:
        fixed_s: Seconds that do not depend on the number of targets, for reading and scoring the whole hold-out.
        target_s: Seconds per target.
        targets: Number of targets of the whole search.
        measured: Number of targets that were tried.
    """

    fixed_s: float
    target_s: float
    targets: int
    measured: int

    @property
    def total_s(self) -> float:
        """The seconds for all targets."""
        return self.fixed_s + self.target_s * self.targets


class _Clock(Callback):
    """Says what is measured, notes when batches end, and stops the fit after enough of them."""

    def __init__(self, batches: int, on_part: Progress, form: str = "") -> None:
        self._batches = batches
        self._on_part, self._form = on_part, form
        self.training: list[float] = []
        self.validation: list[float] = []
        self.full_training = self.full_validation = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.full_training = _finite(trainer.num_training_batches, "train")
        self._say("training", self.full_training)
        self.training.append(_now())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.training.append(_now())
        if batch_idx + 1 >= self._batches:
            raise _Enough

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.full_validation = sum(_finite(count, "val") for count in _as_list(trainer.num_val_batches))
        self._say("validation", self.full_validation)
        self.validation.append(_now())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.validation.append(_now())
        if len(self.validation) > self._batches:
            raise _Enough

    def _say(self, what: str, full: int) -> None:
        count = min(self._batches, full)
        self._on_part(f"{what}{self._form}, {count} {'batch' if count == 1 else 'batches'}")


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a fit when everything was measured."""


def measure_epoch(
    make_trainer: MakeTrainer,
    module: LightningModule,
    data: LightningDataModule | None,
    *,
    batches: int,
    on_part: Progress,
    callbacks: Sequence[Callback] = (),
    form: str = "",
) -> EpochTime:
    """Trains and validates a copy of `module` on `batches` batches each; `form` tells `on_part` what kind it is."""
    clock = _Clock(batches, on_part, form)
    module = copy.deepcopy(module)
    with _stopped_early():
        make_trainer(callbacks=[*callbacks, clock], **_NO_VALIDATION).fit(module, datamodule=copy.deepcopy(data))
    with _stopped_early():
        make_trainer(callbacks=[clock]).validate(module, datamodule=copy.deepcopy(data), verbose=False)
    training, validation = _per_batch(clock.training), _per_batch(clock.validation)
    return EpochTime(
        training_s=training * clock.full_training,
        validation_s=validation * clock.full_validation,
        training_batches=clock.full_training,
        validation_batches=clock.full_validation,
    )


def measure_exchange(
    make_trainer: MakeTrainer,
    module: LightningModule,
    data: LightningDataModule | None,
    quantizer: QuantizationAwareTraining,
    *,
    batches: int,
    on_part: Progress,
) -> tuple[float, EpochTime]:
    """Measures the seconds of the exchange to integers, and an epoch of the quantized network."""
    now = _from_the_start(quantizer)
    spent: list[float] = []
    _timed(now, "_begin_epoch", spent)
    on_part(f"the exchange to integers on {quantizer.calibration_images} images")
    epoch = measure_epoch(
        make_trainer, module, data, batches=batches, on_part=on_part, callbacks=[now], form=" in integers"
    )
    return max(spent), epoch


def measure_search(
    make_trainer: MakeTrainer,
    module: LightningModule,
    data: LightningDataModule | None,
    search: Search,
    *,
    on_part: Progress,
) -> SearchTime:
    """Searches on a few targets of a copy of `module`, and on all of them if that is quick.

    A search on a few targets stays farther above the tolerance than a whole one, so its decisions need fewer images.
    """
    found = _measure_search(make_trainer, module, data, search, most=_TARGETS, on_part=on_part)
    if found.measured < found.targets and found.total_s <= _WHOLE_SEARCH_S:
        found = _measure_search(make_trainer, module, data, search, most=found.targets, on_part=on_part)
    return found


def _measure_search(
    make_trainer: MakeTrainer,
    module: LightningModule,
    data: LightningDataModule | None,
    search: Search,
    *,
    most: int,
    on_part: Progress,
) -> SearchTime:
    now, module = _from_the_start(search), copy.deepcopy(module)
    network = searched_network(module, search.model_attribute)
    names = [target.name for target in local_space(now._space(network)).targets(network)]
    chosen, steps, spent = _restricted(now, names, most), list[float](), list[float]()
    for hook in ("on_step", "on_progress"):
        if hasattr(now, hook):
            setattr(now, hook, lambda *_: steps.append(_now()))
    _timed(now, "_begin_epoch", spent)
    on_part(f"a search on {chosen} of {len(names)} targets")
    with _stopped_early():
        make_trainer(callbacks=[now, _Clock(1, lambda _: None)], **_NO_VALIDATION).fit(
            module, datamodule=copy.deepcopy(data)
        )
    # There is one interval less than there are steps.
    trying_s = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1) if len(steps) > 1 else 0.0
    return SearchTime(
        fixed_s=max(0.0, spent[0] - trying_s), target_s=trying_s / chosen, targets=len(names), measured=chosen
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The largest memory of this process so far: on a GPU what torch allocated there, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


Compressing = TypeVar("Compressing", bound=AdaptiveIterativePruning | PrimeSVT | QuantizationAwareTraining)


def _from_the_start(callback: Compressing) -> Compressing:
    """A copy of `callback` that does its work before the first epoch."""
    now = copy.deepcopy(callback)
    now.start_epoch = 0
    if isinstance(now, QuantizationAwareTraining):
        now.freeze_epoch = None
    return now


def _restricted(search: Search, names: Sequence[str], most: int) -> int:
    """Restricts `search` to one round on `most` of the targets `names`; returns on how many."""
    chosen = names
    if len(names) > most:
        chosen = [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]
    if isinstance(search, PrimeSVT):
        search.evaluation_cache = None
        # A few layers alone cannot save what is asked of all.
        search.config = dataclasses.replace(search.config, layers=tuple(chosen), min_memory_saving=0.0)
    else:
        search.config = dataclasses.replace(search.config, layers=tuple(chosen), max_rounds=1, target=None)
    return len(chosen)


def _timed(owner: Any, name: str, spent: list[float]) -> None:
    """Makes the method `name` of `owner` note in `spent` how many seconds each call took."""
    method = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        started = _now()
        result = method(*arguments)
        spent.append(_now() - started)
        return result

    setattr(owner, name, timed)


@contextmanager
def _stopped_early() -> Iterator[None]:
    with suppress(_Enough):
        yield


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _per_batch(times: Sequence[float]) -> float:
    """The median of the intervals between `times`, without the first ones if there are enough; 0 without any."""
    intervals = [after - before for before, after in pairwise(times)]
    later = intervals[_WARM_UP:] if len(intervals) > 2 * _WARM_UP else intervals[1:] or intervals
    return statistics.median(later) if later else 0.0


def _finite(count: float, name: str) -> int:
    if not math.isfinite(count):
        raise ValueError(
            f"the length of an epoch is not known (the {name} loader has no len()); give --trainer.limit_{name}_batches"
        )
    return int(count)


def _as_list(counts: Any) -> list[float]:
    return list(counts) if isinstance(counts, list | tuple) else [counts]
