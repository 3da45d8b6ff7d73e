"""Adaptive iterative pruning between the epochs of a fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ..models.manifest import network_of, restore_on_load, save_to_checkpoint
from ..pruning import (
    RoundOutcome,
    RoundRobinConfig,
    SearchState,
    Step,
    begin_search,
    prunable_groups,
    revert_plan,
    run_round,
    slice_optimizers,
)
from ..quant import QuantizedNetwork

GRANULARITIES = ("structured",)
_STATE_VERSION = 1


class AdaptiveIterativePruning(Callback):
    """Prunes `module.<model_attribute>` between epochs, as far as the accuracy on a hold-out allows.

    At the end of each chosen epoch one round of the search runs: every group of heads and MLP channels is tried in
    turn, what costs no more than `tolerance` is removed physically, the optimizer's state is cut with it, and training
    goes on.

    tolerance: accuracy that may be lost in points, above 0 and at most 100, against the network before the first round.
    granularity: "structured" (whole heads and channels).
    start_epoch, every_n_epochs: rounds run at the end of epochs start_epoch, start_epoch + every_n_epochs, ...;
        override `should_prune` for another policy.
    max_images: score on the first so many images of the hold-out, None for all.
    cache_size_bytes: a hold-out up to this size is read once a round and not once a step (default 1 GiB), 0 for never.
    model_attribute: the attribute of the LightningModule that holds the network.
    search: any other field of `swincompress_pl.pruning.RoundRobinConfig`: step, round_to, target, max_rounds, ...

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data; its batches are
    (images, labels, ...). Logs pruning/score, pruning/baseline, pruning/parameters, pruning/sparsity,
    pruning/active_groups and pruning/macs. The state is in the checkpoint: a resumed fit goes on with the same
    architecture and the same search. The search ends when the network is quantized. One device only; compiled networks
    (`torch.compile`) are compiled anew.

    Example: `Trainer(callbacks=[AdaptiveIterativePruning(tolerance=1.0, start_epoch=5, every_n_epochs=2, target=0.4)])`
    """

    def __init__(
        self,
        *,
        tolerance: float,
        granularity: str = "structured",
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        max_images: int | None = None,
        cache_size_bytes: int = 1 << 30,
        model_attribute: str = "net",
        **search: Any,
    ) -> None:
        _check_arguments(granularity, start_epoch, every_n_epochs, max_images, cache_size_bytes, search)
        self.config = RoundRobinConfig(tolerance=tolerance, **search)
        self.start_epoch = start_epoch
        self.every_n_epochs = every_n_epochs
        self.max_images = max_images
        self.cache_size_bytes = cache_size_bytes
        self.model_attribute = model_attribute
        self.search_state: SearchState | None = None
        self._last_epoch = -1

    # Policy: override these.

    def should_prune(self, epoch: int) -> bool:
        """Whether a round runs at the end of `epoch` (the search may be over already)."""
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every_n_epochs == 0

    def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
        """The logits (N, classes) that are scored; override it where the network alone does not see ready images."""
        logits: Tensor = network(images)
        return logits

    def on_step(self, trainer: Trainer, step: Step) -> None:
        """Called after each tried step, for a display of one's own; does nothing."""

    # Hooks.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have a checkpoint's architecture rebuilt before its weights load, and refuse what cannot work."""
        restore_on_load(pl_module, self.model_attribute)
        if stage == "fit":
            _refuse_surroundings(trainer)
            network = network_of(pl_module, self.model_attribute)
            if not isinstance(network, QuantizedNetwork):
                prunable_groups(network, self.config)
            _refuse_outside_sharing(pl_module, network, self.model_attribute)
            if trainer.current_epoch == 0:  # a fresh fit; a resumed one loads its state after this hook
                self.search_state, self._last_epoch = None, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is something to score on, before the first epoch is spent."""
        self._holdout(trainer)
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.start_epoch:
            rank_zero_warn(
                f"start_epoch={self.start_epoch} is not reached in max_epochs={trainer.max_epochs}: nothing is pruned."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run a round if this epoch has one."""
        epoch = trainer.current_epoch
        if self._is_over(pl_module) or epoch <= self._last_epoch or not self.should_prune(epoch):
            return
        # The search must not move the random numbers that shuffling, dropout and augmentation draw.
        with isolate_rng():
            outcome = self._run_round(trainer, pl_module)
        self.search_state = outcome.state
        self._last_epoch = epoch
        self._log(pl_module, outcome)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the manifest with which the architecture is rebuilt."""
        save_to_checkpoint(pl_module, checkpoint, self.model_attribute)

    def state_dict(self) -> dict[str, Any]:
        """The search so far, plain data."""
        search = None if self.search_state is None else self.search_state.to_dict()
        return {"version": _STATE_VERSION, "last_epoch": self._last_epoch, "search": search}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the search that `state_dict` wrote."""
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the pruning callback's state has version {state_dict.get('version')!r}, {_STATE_VERSION} is expected"
            )
        self._last_epoch = int(state_dict["last_epoch"])
        search = state_dict["search"]
        self.search_state = None if search is None else SearchState.from_dict(search)

    # Mechanism.

    def _is_over(self, module: LightningModule) -> bool:
        """The search has stopped, or quantization has begun, whose scales belong to the present widths."""
        state = self.search_state
        if isinstance(network_of(module, self.model_attribute), QuantizedNetwork):
            if state is not None and state.stopped is None:
                state.stopped = "the network is quantized"
                rank_zero_info("pruning ends: the network is quantized, with scales for its present widths")
            return True
        return state is not None and state.stopped is not None

    def _run_round(self, trainer: Trainer, module: LightningModule) -> RoundOutcome:
        network = network_of(module, self.model_attribute)
        holdout = _Holdout(self._holdout(trainer), self.max_images, self.cache_size_bytes)
        tell = _Progress(trainer.current_epoch)

        def evaluate(candidate: nn.Module) -> float:
            return self._accuracy(trainer, module, candidate, holdout)

        def progress(step: Step) -> None:
            tell(step)
            self.on_step(trainer, step)

        with _validating(trainer), torch.no_grad():
            shape = _input_shape(trainer, holdout)
            state = self.search_state
            if state is None:
                state = begin_search(network, evaluate, self.config, input_shape=shape)
            outcome = run_round(network, evaluate, self.config, state, input_shape=shape, progress=progress)
        try:
            slice_optimizers(trainer.optimizers, outcome.applied)
        except BaseException:
            revert_plan(network, outcome.applied)
            raise
        if outcome.applied.tensors:
            # Compiled code knows the old shapes; without a reset each shrink counts against the recompile limit.
            torch.compiler.reset()
        return outcome

    def _accuracy(self, trainer: Trainer, module: LightningModule, network: nn.Module, holdout: Iterable[Any]) -> float:
        correct, seen = 0, 0
        for images, labels in _on_device(trainer, holdout):
            with trainer.precision_plugin.val_step_context():
                logits = self.predict(module, network, images)
            correct += int((logits.argmax(dim=-1) == labels).sum())
            seen += len(labels)
        if seen == 0:
            raise ValueError("the hold-out is empty; give AdaptiveIterativePruning images to score on")
        return 100.0 * correct / seen

    def _holdout(self, trainer: Trainer) -> list[Iterable[Any]]:
        source = getattr(trainer.datamodule, "holdout_dataloader", None)  # type: ignore[attr-defined]  # set by the trainer
        loaders = source() if callable(source) else trainer.val_dataloaders
        if loaders is None:
            raise ValueError(
                "AdaptiveIterativePruning has nothing to score on: give the datamodule a holdout_dataloader(), or the "
                "fit validation data (val_dataloader, and limit_val_batches above 0)"
            )
        if isinstance(loaders, Mapping):
            return list(loaders.values())
        return list(loaders) if isinstance(loaders, list | tuple) else [loaders]

    def _log(self, module: LightningModule, outcome: RoundOutcome) -> None:
        state = outcome.state
        network = network_of(module, self.model_attribute)
        parameters = sum(p.numel() for p in network.parameters())
        last = outcome.steps[-1] if outcome.steps else None
        values = {
            "pruning/score": state.baseline_score if state.score is None else state.score,
            "pruning/baseline": state.baseline_score,
            "pruning/parameters": float(parameters),
            "pruning/sparsity": 1 - parameters / state.baseline_parameters,
            "pruning/active_groups": float(sum(g.locked is None for g in state.groups.values())),
        }
        if last is not None and last.macs is not None:
            values["pruning/macs"] = float(last.macs)
        module.log_dict(values)
        rank_zero_info(
            f"pruning round {state.rounds}: {values['pruning/score']:.2f} points, unpruned {state.baseline_score:.2f}; "
            f"{values['pruning/sparsity']:.1%} of the parameters removed, {sum(s.accepted for s in outcome.steps)} of "
            f"{len(outcome.steps)} steps kept" + (f"; the search ends: {state.stopped}" if state.stopped else "")
        )


def _check_arguments(
    granularity: str,
    start_epoch: int,
    every_n_epochs: int,
    max_images: int | None,
    cache_size_bytes: int,
    search: Mapping[str, Any],
) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity={granularity!r} is not available; there is {', '.join(map(repr, GRANULARITIES))}"
        )
    if start_epoch < 0:
        raise ValueError(f"start_epoch={start_epoch}: it has to be 0 or more")
    if every_n_epochs < 1:
        raise ValueError(f"every_n_epochs={every_n_epochs}: it has to be 1 or more")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images}: it has to be None (all) or 1 or more")
    if cache_size_bytes < 0:
        raise ValueError(f"cache_size_bytes={cache_size_bytes}: it has to be 0 (no cache) or more")
    options = [f.name for f in dataclasses.fields(RoundRobinConfig) if f.name != "tolerance"]
    unknown = sorted(set(search) - set(options))
    if unknown:
        raise TypeError(
            f"AdaptiveIterativePruning has no option {', '.join(unknown)}; the search's are {', '.join(options)}"
        )


def _refuse_surroundings(trainer: Trainer) -> None:
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            "AdaptiveIterativePruning cannot shrink a model in the middle of a fit under "
            f"{type(trainer.strategy).__name__}, which holds copies or shards of its parameters. Prune first on one "
            "device (Trainer(devices=1)), then fit the pruned checkpoint with your strategy and without this callback"
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{type(other).__name__} keeps a copy of the model whose sizes do not follow a shrink; take it out of "
                "this fit and average in a later one, after pruning"
            )
        if isinstance(other, ModelPruning):
            raise ValueError(
                f"{type(other).__name__} replaces weights by masked ones, which cannot be sliced; use it or "
                "AdaptiveIterativePruning, not both"
            )


def _refuse_outside_sharing(module: LightningModule, network: nn.Module, model_attribute: str) -> None:
    """A parameter of the network that another part of the LightningModule holds as its own would keep its old shape."""
    inside = {id(m) for m in network.modules()}
    own = {id(p): name for name, p in network.named_parameters()}
    for path, other in module.named_modules():
        if id(other) in inside:
            continue
        for name, parameter in other._parameters.items():
            if id(parameter) in own:
                raise ValueError(
                    f"{path}.{name} is shared with {model_attribute}.{own[id(parameter)]}; a shrink would leave it "
                    "behind. Give it its own nn.Parameter"
                )


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    """The trainer in the validating stage for a while, so that the batch hooks do what they do in validation."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


class _Holdout:
    """The batches of `loaders`, up to `max_images` images; kept in memory after the first pass if they fit."""

    def __init__(self, loaders: Iterable[Iterable[Any]], max_images: int | None, cache_size_bytes: int) -> None:
        self._loaders, self._max_images, self._cache_size_bytes = list(loaders), max_images, cache_size_bytes
        self._cache: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._cache is not None:
            yield from self._cache
            return
        kept: list[tuple[Tensor, Tensor]] = []
        size_bytes = 0
        for images, labels in self._read():
            size_bytes += images.nbytes + labels.nbytes
            if size_bytes <= self._cache_size_bytes:
                kept.append((images, labels))
            else:
                kept.clear()
            yield images, labels
        if size_bytes <= self._cache_size_bytes:
            self._cache = kept

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self._max_images
        for loader in self._loaders:
            for batch in loader:
                images, labels = _images_and_labels(batch)
                if left is not None:
                    images, labels = images[:left], labels[:left]
                    left -= len(labels)
                yield images, labels
                if left == 0:
                    return


class _Progress:
    """A line now and then while a round runs; lines nest with every progress bar."""

    def __init__(self, epoch: int, every_s: float = 10.0) -> None:
        self._epoch, self._every_s, self._tried, self._last = epoch, every_s, 0, time.monotonic()

    def __call__(self, step: Step) -> None:
        self._tried += 1
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            verdict = "kept" if step.accepted else "undone"
            rank_zero_info(
                f"pruning after epoch {self._epoch}: {self._tried} groups tried; {step.group} to {step.units_after} "
                f"{step.kind}: {step.score:.2f} points, {verdict}"
            )


def _on_device(trainer: Trainer, holdout: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches as the trainer hands them to a validation step: its device, its precision, the module's hooks."""
    for batch in holdout:
        batch = trainer.precision_plugin.convert_input(batch)
        yield _images_and_labels(trainer.strategy.batch_to_device(batch))


def _input_shape(trainer: Trainer, holdout: Iterable[Any]) -> tuple[int, ...]:
    for images, _ in _on_device(trainer, holdout):
        return (1, *images.shape[1:])
    raise ValueError("the hold-out is empty; give AdaptiveIterativePruning images to score on")


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise TypeError(
        f"the hold-out gave a {type(batch).__name__}; AdaptiveIterativePruning scores batches (images, labels, ...). "
        "Give the datamodule a holdout_dataloader() that yields such pairs"
    )
