"""Runs the module's own validation for its answers, on batches as the trainer passes them, and without a trace.

`training_step` is never called, because it makes optimizer steps under manual optimization.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from swincompress_pl.callbacks.loaders import leaves
from swincompress_pl.checkpoint.holder import held_by
from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.interrupts import put_back_after
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, sum_over_ranks


@contextmanager
def validating(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Puts the trainer in the validating stage and the module in eval mode, inside the context.

    So hooks, and modules beside the network, do what they do in validation.
    """
    stage = trainer.state.stage
    trainer.validating = True
    try:
        with evaluation_mode(module):
            yield
    finally:
        trainer.state.stage = stage


def on_device(trainer: Trainer, batch: Any, loader_index: int = 0) -> Any:
    """A batch as a step gets it: in the trainer's precision, on its device, and after the module's hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader_index)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader_index)


class ModuleValidation:
    """`module.validation_step` and the hooks around it.

    Args:
        trainer: The trainer of the fit.
        module: The module whose validation runs.
        model_attribute: Where the module holds the network.
        several_loaders: Whether the step and its hooks get the index of a batch's loader.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, model_attribute: str, *, several_loaders: bool = False
    ) -> None:
        self.trainer, self.module, self.model_attribute = trainer, module, model_attribute
        self.several_loaders = several_loaders
        self.has_step = is_overridden("validation_step", module)
        self.has_forward = is_overridden("forward", module)

    @contextmanager
    def without_trace(self) -> Iterator[Logged]:
        """Collects what the module logs, and keeps the rest of its state.

        Nothing reaches the loggers. Metrics, buffers and plain attributes of the module, and of the modules beside the
        network, are afterwards as they were.
        """
        logged = Logged(self.several_loaders)
        module = self.module
        network = held_by(module, self.model_attribute)
        with _state_kept(module, network), _metrics_kept(self.trainer), _loggers_silent(self.trainer):
            module.log, module.log_dict = logged.log, logged.log_dict  # type: ignore[method-assign,assignment]
            try:
                yield logged
            finally:
                del module.log, module.log_dict

    def begin(self) -> None:
        """Runs the hooks before the first batch."""
        self.module.on_validation_start()
        self.module.on_validation_epoch_start()

    def begin_beside_training(self) -> None:
        """Runs these hooks in a fit that may never validate, and ignores their errors.

        If the step needs what they would have made, it raises an error of its own.
        """
        with suppress(Exception):
            self.begin()

    def step(self, batch: Any, index: int, loader_index: int) -> Any:
        """Runs one step and the hook before it, on a batch as `on_device` returns it.

        For a module without a validation step, its `forward` runs on the batch's first images, or else the network.
        """
        if not self.has_step:
            return self._forward(batch)
        self.module.on_validation_batch_start(*self._hook_arguments(batch, index, loader_index))
        arguments = self._arguments(batch, index, loader_index)
        with self.trainer.precision_plugin.val_step_context():
            return self.module.validation_step(*arguments)

    def _forward(self, batch: Any) -> Any:
        images = next((leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim >= 3), None)
        if images is None:
            raise ValueError(
                f"{type(self.module).__name__} has no validation_step, and its batches ({type(batch).__name__}) have "
                "no images (N, C, H, W) to run it on; give it a validation_step"
            )
        run = self.module if self.has_forward else held_by(self.module, self.model_attribute)
        with self.trainer.precision_plugin.val_step_context():
            return run(images)

    def epoch(self, loaders: Iterable[Iterable[Any]], logged: Logged, most_batches: int | None = None) -> None:
        """Runs a whole validation, or `most_batches` of each loader. A rank without a batch is a ValueError."""
        seen = 0
        self.begin()
        for loader_index, loader in enumerate(loaders):
            for index, raw in enumerate(islice(loader, most_batches)):
                batch = on_device(self.trainer, raw, loader_index)
                logged.batch, logged.loader_index = batch, loader_index
                output = self.step(batch, index, loader_index)
                self.module.on_validation_batch_end(output, *self._hook_arguments(batch, index, loader_index))
                seen += 1
        logged.batch = None
        _refuse_empty(from_all_ranks(seen))
        logged.fill(self.trainer)
        self.module.on_validation_epoch_end()
        self.module.on_validation_end()

    def _hook_arguments(self, batch: Any, index: int, loader_index: int) -> tuple[Any, ...]:
        return (batch, index, loader_index) if self.several_loaders else (batch, index)

    def _arguments(self, batch: Any, index: int, loader_index: int) -> tuple[Any, ...]:
        """What the module's validation_step takes of (batch, batch_idx, dataloader_idx)."""
        step, several = self.module.validation_step, self.several_loaders
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            raise ValueError(
                f"{type(self.module).__name__}.validation_step takes dataloader_iter, so it cannot be given the "
                "batches that a search scores on; take (batch, batch_idx)"
            )
        if is_param_in_hook_signature(step, "dataloader_idx", explicit=not several, min_args=3 if several else None):
            return batch, index, loader_index
        return (batch, index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)


class Logged:
    """What a module logged: {name: [(value, number of images), ...]}, or a `Metric` that has seen all batches."""

    def __init__(self, several_loaders: bool) -> None:
        self.entries: dict[str, list[tuple[Tensor, int]] | Metric] = {}
        self.batch: Any = None  # the present one, None at the end of the epoch
        self.loader_index = 0
        self._several_loaders = several_loaders
        self._no_mean: dict[str, Any] = {}  # names that are logged with another reduction than the mean

    def log(
        self,
        name: str,
        value: Any,
        *_: Any,
        batch_size: int | None = None,
        reduce_fx: Any = "mean",
        add_dataloader_idx: bool = True,
        **__: Any,
    ) -> None:
        """Takes the place of `LightningModule.log`."""
        self._log(name, value, batch_size, reduce_fx)
        if self._several_loaders and add_dataloader_idx and self.batch is not None:
            self._log(f"{name}/dataloader_idx_{self.loader_index}", value, batch_size, reduce_fx)

    def _log(self, name: str, value: Any, batch_size: int | None, reduce_fx: Any) -> None:
        if isinstance(value, Metric):
            self.entries[name] = value
            return
        if reduce_fx not in ("mean", torch.mean):
            self._no_mean[name] = reduce_fx
        if batch_size is None:
            batch_size = 1 if self.batch is None else extract_batch_size(self.batch)
        entries = self.entries.setdefault(name, [])
        if isinstance(entries, Metric):
            raise ValueError(f"{name} is logged as a torchmetrics Metric and as a number; log one of them")
        entries.append((torch.as_tensor(value).detach().double(), batch_size))

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, **options: Any) -> None:
        """Takes the place of `LightningModule.log_dict`."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    def value(self, name: str) -> float:
        """The mean over the images of all ranks; a ValueError if the values are not single numbers."""
        entries = self.entries[name]
        if isinstance(entries, Metric):
            return self._single(name, entries.compute())  # torchmetrics sums over the ranks itself
        if name in self._no_mean:
            raise ValueError(
                f"monitor={name!r} is logged with reduce_fx={self._no_mean[name]!r}, but pruning can only follow a mean"
            )
        total, weight = sum_over_ranks(
            [
                sum(self._single(name, value) * count for value, count in entries),
                float(sum(count for _, count in entries)),
            ]
        )
        return total / weight

    def _single(self, name: str, value: Any) -> float:
        value = torch.as_tensor(value)
        if value.numel() != 1:
            raise ValueError(
                f"monitor={name!r} has the shape {tuple(value.shape)}, a value per class perhaps; a single number is "
                "needed: monitor one that is averaged (torchmetrics: average='macro')"
            )
        return float(value)

    def fill(self, trainer: Trainer) -> None:
        """Puts what all ranks have logged into `trainer.callback_metrics`, as Lightning does before validation ends."""
        known = trainer._logger_connector._callback_metrics
        first, *others = from_all_ranks({name: self._kind(name) for name in self.entries})  # in rank 0's order
        for name, kind in first.items():
            if kind is None or any(each.get(name) != kind for each in others):
                continue
            entries = self.entries[name]
            if isinstance(entries, Metric):
                known[name] = torch.as_tensor(entries.compute())
            else:
                known[name] = torch.tensor(self.value(name), dtype=torch.float32)

    def _kind(self, name: str) -> str | None:
        """The kind of what was logged by this name; None if it has no mean over the images."""
        entries = self.entries[name]
        if isinstance(entries, Metric):
            return "metric"
        return "numbers" if name not in self._no_mean and all(v.numel() == 1 for v, _ in entries) else None


def _refuse_empty(batches: Sequence[int]) -> None:
    """Raises a ValueError if a rank has no batch, given their numbers: it has logged nothing to take a mean of."""
    if not any(batches):
        raise ValueError("the hold-out is empty; give it images to score on")
    if not all(batches):
        raise ValueError(
            f"rank {batches.index(0)} has no images of the hold-out, so a metric over all ranks cannot be computed; "
            "give every rank a batch, or leave monitor= out"
        )


@contextmanager
def _metrics_kept(trainer: Trainer) -> Iterator[None]:
    """Restores `trainer.callback_metrics` after the context."""
    connector = trainer._logger_connector
    kept = connector._callback_metrics
    connector._callback_metrics = dict(kept)
    try:
        yield
    finally:
        connector._callback_metrics = kept


@contextmanager
def _loggers_silent(trainer: Trainer) -> Iterator[None]:
    """Replaces the loggers by dummies inside the context, for modules that write to `self.logger.experiment`."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def _state_kept(module: LightningModule, network: nn.Module) -> Iterator[None]:
    """Restores the state of `module` besides its parameters after the context: metrics, buffers, numbers, lists.

    The network is left out, because it is in eval mode, and is what a search changes.
    """
    inside = {id(part) for part in network.modules()}
    remembered = [_remembered(part) for part in module.modules() if id(part) not in inside]

    def put_back() -> None:
        for each in remembered:
            each()

    with put_back_after(put_back):
        yield


def _remembered(part: nn.Module) -> Callable[[], None]:
    """Returns a function that restores `part` to its present state."""
    own = vars(part)
    names = _metric_state(part) if isinstance(part, Metric) else {name for name in own if not name.startswith("_")}
    undo = [_kept(own[name]) for name in sorted(names & own.keys())]
    values = {name: own[name] for name in names & own.keys()}
    modules, buffers = dict(part._modules), dict(part._buffers)
    undo += [_kept(buffer) for buffer in buffers.values()]

    def put_back() -> None:
        for each in undo:
            each()
        if not isinstance(part, Metric):
            for name in [name for name in own if not name.startswith("_") and name not in values]:
                del own[name]
        own.update(values)
        for mine, kept in ((part._modules, modules), (part._buffers, buffers)):
            for name in mine.keys() - kept.keys():
                del mine[name]
            mine.update(kept)  # type: ignore[arg-type]  # each its own kind

    return put_back


def _metric_state(metric: Metric) -> set[str]:
    return {*metric._defaults, "_update_count", "_computed", "_forward_cache", "_cache", "_is_synced", "_update_called"}


def _kept(value: Any) -> Callable[[], None]:
    """Returns a function that restores a value, and what it holds, after changes in place."""
    if isinstance(value, Tensor) and not value.requires_grad:
        copied, version = value.detach().clone(), _version(value)

        def restore_tensor() -> None:
            if _version(value) != version:
                value.copy_(copied)

        return restore_tensor
    if isinstance(value, Metric):  # in a plain dictionary, say
        return _remembered(value)
    if _is_plain_holder(value):
        return _kept(vars(value))
    if not isinstance(value, list | dict | set | deque):
        return lambda: None
    inner = [_kept(each) for each in (value.values() if isinstance(value, dict) else value)]
    before = copy.copy(value)

    def restore_collection() -> None:
        for each in inner:
            each()
        value.clear()
        value.extend(before) if isinstance(value, list | deque) else value.update(before)

    return restore_collection


def _is_plain_holder(value: Any) -> bool:
    """Whether `value` is an object that holds nothing but data, such as an average with its sum and count."""
    data = getattr(value, "__dict__", None)
    if isinstance(value, type | nn.Module) or callable(value) or not isinstance(data, dict) or not data:
        return False
    return all(part is None or isinstance(part, int | float | str | Tensor | list | dict) for part in data.values())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
