"""What a search inside a trainer scores networks with: the hold-out's predictions, or a metric that the module logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

from ..pruning import FunctionScorer, HoldOut, Scorer, sum_over_ranks, world_size

_CPU_BATCH, _GPU_BATCH = 64, 256  # a decision is taken after whole batches: not larger than the device needs

Predict = Callable[[nn.Module, Tensor], Tensor]


def holdout_loaders(trainer: Trainer, who: str) -> list[Iterable[Any]]:
    """The datamodule's `holdout_dataloader()`, or else the trainer's validation data; ValueError without either."""
    source = getattr(trainer.datamodule, "holdout_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
    loaders = source() if callable(source) else trainer.val_dataloaders
    if loaders is None:
        raise ValueError(
            f"{who} has nothing to score on: give the datamodule a holdout_dataloader(), or the fit validation data "
            "(val_dataloader, and limit_val_batches above 0)"
        )
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def holdout_scorer(
    trainer: Trainer, loaders: list[Iterable[Any]], predict: Predict, max_images: int | None, max_size_bytes: int
) -> HoldOut:
    """A `HoldOut` of the loaders' images, on the trainer's device and in its precision."""

    def predict_in_precision(network: nn.Module, images: Tensor) -> Tensor:
        with trainer.precision_plugin.val_step_context():
            return predict(network, images)

    sharded = world_size() > 1 and all(
        isinstance(loader, DataLoader) and isinstance(loader.sampler, DistributedSampler) for loader in loaders
    )
    return HoldOut.from_batches(
        batches_on_device(trainer, loaders),
        predict=predict_in_precision,
        max_images=max_images,
        max_size_bytes=max_size_bytes,
        sharded=sharded,
        batch_size=_CPU_BATCH if trainer.strategy.root_device.type == "cpu" else _GPU_BATCH,
    )


def batches_on_device(trainer: Trainer, loaders: Iterable[Iterable[Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches as the trainer hands them to a validation step: its device, its precision, the module's hooks."""
    for loader in loaders:
        for batch in loader:
            batch = trainer.precision_plugin.convert_input(batch)
            yield _images_and_labels(trainer.strategy.batch_to_device(batch))


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise TypeError(
        f"the hold-out gave a {type(batch).__name__}; AdaptiveIterativePruning scores batches (images, labels, ...). "
        "Give the datamodule a holdout_dataloader() that yields such pairs, or use monitor= with a metric that your "
        "validation_step logs"
    )


def metric_scorer(trainer: Trainer, module: LightningModule, monitor: str, loaders: list[Iterable[Any]]) -> Scorer:
    """Scores by what `module.validation_step` logs as `monitor`, a fraction between 0 and 1, over the whole hold-out.

    Raises ValueError, listing what was logged, where the module does not log it.
    """

    def evaluate(network: nn.Module) -> float:
        with _collecting(module) as (logged, sizes):
            module.on_validation_epoch_start()
            for loader_index, loader in enumerate(loaders):
                for index, batch in enumerate(loader):
                    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                    sizes[:] = [extract_batch_size(batch)]
                    with trainer.precision_plugin.val_step_context():
                        module.validation_step(*((batch, index, loader_index) if len(loaders) > 1 else (batch, index)))
            module.on_validation_epoch_end()
            value = _value(logged, monitor, module)
        if not value <= 1.0:
            raise ValueError(
                f"monitor={monitor!r} is {value}: a fraction between 0 and 1 is expected, so that the tolerance in "
                "points has a meaning; log an accuracy as torchmetrics gives it"
            )
        return 100.0 * value

    return FunctionScorer(evaluate)


@contextmanager
def _collecting(module: LightningModule) -> Iterator[tuple[dict[str, list[tuple[Any, int]]], list[int]]]:
    """While it lasts, what `module` logs is collected, {name: [(value, images), ...]}, and not logged.

    Gives that and a list whose only entry is the size of the batch at hand, for values logged without a batch_size.
    """
    logged: dict[str, list[tuple[Any, int]]] = {}
    sizes = [1]

    def collect(name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        if isinstance(value, Metric):
            logged[name] = [(value, 1)]
        else:
            logged.setdefault(name, []).append((torch.as_tensor(value).detach().float().mean(), batch_size or sizes[0]))

    def collect_all(values: Mapping[str, Any], *_: Any, **options: Any) -> None:
        for name, value in values.items():
            collect(name, value, **options)

    module.log, module.log_dict = collect, collect_all  # type: ignore[method-assign,assignment]
    try:
        yield logged, sizes
    finally:
        del module.log, module.log_dict
        for entries in logged.values():
            if isinstance(entries[0][0], Metric):
                entries[0][0].reset()


def _value(logged: Mapping[str, list[tuple[Any, int]]], monitor: str, module: LightningModule) -> float:
    if monitor not in logged:
        raise ValueError(
            f"monitor={monitor!r} is not logged by {type(module).__name__}'s validation; it logs "
            f"{', '.join(logged) or 'nothing'}"
        )
    entries = logged[monitor]
    if isinstance(entries[0][0], Metric):
        return float(entries[0][0].compute())  # torchmetrics sums over the ranks itself
    total, weight = sum_over_ranks(
        [sum(float(value) * count for value, count in entries), float(sum(count for _, count in entries))]
    )
    return total / weight
