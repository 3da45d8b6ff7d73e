"""What a search inside a trainer scores networks with: the hold-out's predictions, or a metric that the module logs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.pruning import HoldOut
from swincompress_pl.pruning.evaluation.ranks import sum_over_ranks, world_size
from swincompress_pl.pruning.evaluation.scorer import FunctionScorer, Scorer

_CPU_BATCH, _GPU_BATCH = 64, 256  # a decision is taken after whole batches: not larger than the device needs

Predict = Callable[[nn.Module, Tensor], Tensor]


def holdout_loaders(trainer: Trainer, callback_name: str) -> list[Iterable[Any]]:
    """The datamodule's `holdout_dataloader()`, or else the trainer's validation data up to its `limit_val_batches`.

    Raises ValueError where there is neither.
    """
    source = getattr(trainer.datamodule, "holdout_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
    if callable(source):
        return _as_list(source())
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # Lightning asks for them at the first epoch that validates, or a sanity check before (none after a resume).
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    if trainer.val_dataloaders is None:
        raise ValueError(
            f"{callback_name} has nothing to score on: give the datamodule a holdout_dataloader(), or the fit "
            "validation data (val_dataloader, and limit_val_batches above 0)"
        )
    loaders = _as_list(trainer.val_dataloaders)
    limits = trainer.num_val_batches if isinstance(trainer.num_val_batches, list) else [math.inf] * len(loaders)
    return [
        _Limited(each, int(limit)) if limit < _length(each) else each
        for each, limit in zip(loaders, limits, strict=True)
    ]


class _Limited:
    """The first `count` batches of `loader`."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.count)


def _as_list(loaders: Any) -> list[Iterable[Any]]:
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _length(loader: Iterable[Any]) -> float:
    try:
        return len(loader)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return math.inf


def holdout_scorer(
    trainer: Trainer, loaders: list[Iterable[Any]], predict: Predict, max_images: int | None, max_size_bytes: int
) -> HoldOut:
    """A `HoldOut` of the loaders' images, on the trainer's device and in its precision."""

    def predict_in_precision(network: nn.Module, images: Tensor) -> Tensor:
        with trainer.precision_plugin.val_step_context():
            return predict(network, images)

    sharded = world_size() > 1 and all(_sampler_over_ranks(each) is not None for each in loaders)
    return HoldOut.from_batches(
        batches_on_device(trainer, [_without_padding(each) for each in loaders]),
        predict=predict_in_precision,
        max_images=max_images,
        max_size_bytes=max_size_bytes,
        sharded=sharded,
        batch_size=_CPU_BATCH if trainer.strategy.root_device.type == "cpu" else _GPU_BATCH,
    )


def _sampler_over_ranks(loader: Iterable[Any]) -> DistributedSampler[Any] | None:
    """The sampler that gives each rank images of its own, as Lightning puts it into validation data under DDP."""
    loader = loader.loader if isinstance(loader, _Limited) else loader
    if not isinstance(loader, DataLoader):
        return None
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _without_padding(loader: Iterable[Any]) -> Iterable[Any]:
    """The batches without the images that a `DistributedSampler` repeats at the end to give every rank as many."""
    sampler = _sampler_over_ranks(loader)
    if sampler is None or sampler.drop_last:
        yield from loader
        return
    left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]  # it has one
    for batch in loader:
        if isinstance(batch, list | tuple) and all(isinstance(part, Tensor) for part in batch[:2]):
            batch = [part[:left] if isinstance(part, Tensor) else part for part in batch]
            left -= len(batch[0])
        if left >= 0:
            yield batch


def batches_on_device(trainer: Trainer, loaders: Iterable[Iterable[Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches as the trainer hands them to a validation step: its device, its precision, the module's hooks."""
    for loader in loaders:
        for batch in loader:
            batch = trainer.precision_plugin.convert_input(batch)
            yield _images_and_labels(trainer.strategy.batch_to_device(batch))


def training_batches(trainer: Trainer, most_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for gradients: the datamodule's `calibration_dataloader(images)`, or else of the training data."""
    source = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
    loaders = _as_list(source(64 * most_batches) if callable(source) else trainer.train_dataloader)
    for loader in loaders:
        if isinstance(loader, DataLoader) and loader.persistent_workers:
            # A second iterator of such a loader is its first one, begun anew: the trainer's epoch would lose batches.
            loader = copy.copy(loader)
            loader._iterator = None  # type: ignore[attr-defined]  # a DataLoader's
        yield from batches_on_device(trainer, [loader])


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise TypeError(
        f"the hold-out gave a {type(batch).__name__}; AdaptiveIterativePruning scores batches (images, labels, ...). "
        "Give the datamodule a holdout_dataloader() (and, for a criterion that needs gradients, a "
        "calibration_dataloader(images)) that yields such pairs, or use monitor= with a metric that your "
        "validation_step logs"
    )


def metric_scorer(trainer: Trainer, module: LightningModule, monitor: str, loaders: list[Iterable[Any]]) -> Scorer:
    """Scores by what `module.validation_step` logs as `monitor`, a fraction between 0 and 1, over the whole hold-out.

    Raises ValueError at once, after a batch, where the module does not log it (listing what it logs), or there are no
    images.
    """
    validation = _Validation(trainer, module, monitor, loaders)
    validation.try_out()
    return FunctionScorer(validation.score)


class _Validation:
    """A validation epoch of the module that leaves no trace: not in the loggers, the trainer or the metrics."""

    def __init__(self, trainer: Trainer, module: LightningModule, monitor: str, loaders: list[Iterable[Any]]) -> None:
        self.trainer, self.module, self.monitor, self.loaders = trainer, module, monitor, loaders

    def try_out(self) -> None:
        """Run a batch, and see whether the metric is logged."""
        with _collecting(self.module) as logged:
            if not self._run(logged, most_batches=1):
                raise ValueError("the hold-out is empty; give it images to score on")
            self._check_logged(logged)

    def score(self, network: nn.Module) -> float:
        """`monitor` in points, over all images of all ranks."""
        with _collecting(self.module) as logged:
            self._run(logged)
            self._check_logged(logged)
            value = logged.value(self.monitor)
        if value > 1.0:
            raise ValueError(
                f"monitor={self.monitor!r} is {value}: a fraction between 0 and 1 is expected, so that the tolerance "
                "in points has a meaning; log an accuracy as torchmetrics gives it"
            )
        return 100.0 * value

    def _run(self, logged: _Logged, most_batches: int | None = None) -> int:
        """Gives how many batches there were."""
        trainer, module, seen = self.trainer, self.module, 0
        module.on_validation_epoch_start()
        for loader_index, loader in enumerate(self.loaders):
            for index, batch in enumerate(islice(loader, most_batches)):
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                logged.batch = batch
                with trainer.precision_plugin.val_step_context():
                    module.validation_step(*self._arguments(batch, index, loader_index))
                seen += 1
        logged.batch = None
        module.on_validation_epoch_end()
        return seen

    def _arguments(self, batch: Any, index: int, loader_index: int) -> tuple[Any, ...]:
        """What the module's validation_step takes of (batch, batch_idx, dataloader_idx)."""
        step, several = self.module.validation_step, len(self.loaders) > 1
        if is_param_in_hook_signature(step, "dataloader_idx", explicit=not several, min_args=3 if several else None):
            return batch, index, loader_index
        return (batch, index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)

    def _check_logged(self, logged: _Logged) -> None:
        if self.monitor not in logged.entries:
            raise ValueError(
                f"monitor={self.monitor!r} is not logged by {type(self.module).__name__}'s validation; it logs "
                f"{', '.join(logged.entries) or 'nothing'}"
            )


class _Logged:
    """What a module logged: {name: [(value, images), ...]}, or a `Metric` that has seen it all."""

    def __init__(self) -> None:
        self.entries: dict[str, list[tuple[Tensor, int]] | Metric] = {}
        self.batch: Any = None  # the one at hand, None at the end of the epoch

    def log(
        self, name: str, value: Any, *_: Any, batch_size: int | None = None, reduce_fx: Any = "mean", **__: Any
    ) -> None:
        """Stands for `LightningModule.log`."""
        if isinstance(value, Metric):
            self.entries[name] = value
            return
        if reduce_fx not in ("mean", torch.mean):
            raise ValueError(f"{name} is logged with reduce_fx={reduce_fx!r}; only a mean can be followed by pruning")
        if batch_size is None:
            batch_size = 1 if self.batch is None else extract_batch_size(self.batch)
        entries = self.entries.setdefault(name, [])
        assert isinstance(entries, list)
        entries.append((torch.as_tensor(value).detach().double().mean(), batch_size))

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, **options: Any) -> None:
        """Stands for `LightningModule.log_dict`."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    def value(self, name: str) -> float:
        """The mean over the images of all ranks."""
        entries = self.entries[name]
        if isinstance(entries, Metric):
            return float(entries.compute())  # torchmetrics sums over the ranks itself
        total, weight = sum_over_ranks(
            [sum(float(value) * count for value, count in entries), float(sum(count for _, count in entries))]
        )
        return total / weight


@contextmanager
def _collecting(module: LightningModule) -> Iterator[_Logged]:
    """While it lasts, what `module` logs is collected and not logged; metrics that saw something are reset after it."""
    logged = _Logged()
    updates = {metric: metric.update_count for metric in module.modules() if isinstance(metric, Metric)}
    module.log, module.log_dict = logged.log, logged.log_dict  # type: ignore[method-assign,assignment]
    try:
        yield logged
    finally:
        del module.log, module.log_dict
        for metric, count in updates.items():
            if metric.update_count != count:
                metric.reset()


@contextmanager
def validating(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The trainer in the validating stage and the module in eval mode for a while, so that the hooks and what stands
    beside the network do what they do in validation."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        with evaluation_mode(module):
            yield
    finally:
        trainer.state.stage = stage


def input_shape(trainer: Trainer, scorer: Scorer, callback_name: str) -> tuple[int, ...] | None:
    """Of one image with its batch axis; with a monitor, of the first image of the hold-out."""
    if isinstance(scorer, HoldOut):
        return (1, *scorer.image_shape)
    try:
        images, _ = next(batches_on_device(trainer, holdout_loaders(trainer, callback_name)))
    except (TypeError, StopIteration):
        return None  # batches of another form: MACs are not counted
    return (1, *images.shape[1:])
