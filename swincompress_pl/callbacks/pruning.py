"""Adaptive iterative pruning between the epochs of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ..models.manifest import restore_on_load, save_to_checkpoint
from ..pruning import (
    Gradients,
    RoundOutcome,
    RoundRobinConfig,
    Scorer,
    SearchState,
    Step,
    begin_search,
    collect_gradients,
    finish_search,
    keep_masks,
    revert,
    run_round,
    share_buffers,
    slice_optimizers,
)
from .progress import search_progress
from .resume import RandomNumbers, rng_states, seeded
from .scoring import holdout_loaders, holdout_scorer, input_shape, metric_scorer, training_batches, validating
from .searched import ScalesFollower, pruned_tensors, refuse_masked_integers, scored_network, searched_network
from .surroundings import refuse_neighbours, refuse_optimizers, refuse_sharing, refuse_strategy, wrap_anew

_STATE_VERSION = 2
_WHO = "AdaptiveIterativePruning"


class AdaptiveIterativePruning(Callback):
    """Prunes `module.<model_attribute>` between epochs, as far as the accuracy on a hold-out allows.

    Before each chosen epoch one round of the search runs: every group or layer is tried in turn, what costs no more
    than `tolerance` goes, the optimizer's state is cut with it, and the epoch trains what is left. A round stands
    before its epoch, so that the epoch's checkpoint and validation see the network after its recovery, and a kill in
    the middle of a round loses that round only.

    tolerance: accuracy that may be lost in points, above 0 and at most 100, against the network before the first round.
    granularity: "structured" (whole heads, channels, ...; removed physically), "weight", n of m like "2:4", or "block"
        (masks: buffers `weight_mask` beside weights that stay zero).
    start_epoch, every_n_epochs: rounds run before epochs start_epoch, start_epoch + every_n_epochs, ...; 0 is for a
        network with trained weights. Override `should_prune` for another policy.
    monitor: score by a metric that the module's validation_step logs, a fraction between 0 and 1, over the whole
        hold-out; default: by top-1 of the network's logits, on as few images as a decision needs.
    max_images: score on a subset of so many images, balanced over the classes; None for all.
    holdout_size_bytes: the hold-out is kept in the device's memory; a larger one is refused (default 4 GiB).
    gradient_batches: for criteria that need gradients, taken from the datamodule's `calibration_dataloader` or the
        training data.
    model_attribute: the attribute of the LightningModule that holds the network.
    search: any other field of `swincompress_pl.pruning.RoundRobinConfig`: step, round_to, target, max_rounds, ...

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data; its batches are
    (images, labels, ...). Logs pruning/score, pruning/baseline, pruning/parameters, pruning/sparsity (of the prunable
    weights), pruning/active_targets, pruning/images_scored and pruning/macs to every logger. The search and the states
    of the random number generators are in the checkpoint: a resumed fit goes on with the same architecture, search and
    random numbers.

    Once the network is quantized (`QuantizationAwareTraining` in the same fit, or before it) the search goes on: it
    cuts or masks the float weights, the scales of what stays are kept as they are, and what is scored is the rounded
    network. The tolerance is against the network before the first round: a search begun before the quantization keeps
    its float baseline, so that what quantization loses counts; one begun after it has a quantized baseline.

    One device or DDP; FSDP and DeepSpeed, EMA and SWA are refused by name. Compiled networks (`torch.compile`) are
    compiled anew after a shrink.

    Example: `Trainer(callbacks=[AdaptiveIterativePruning(tolerance=1.0, start_epoch=5, every_n_epochs=2, target=0.4)])`
    """

    def __init__(
        self,
        *,
        tolerance: float,
        granularity: str = "structured",
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        monitor: str | None = None,
        max_images: int | None = None,
        holdout_size_bytes: int = 4 << 30,
        gradient_batches: int = 8,
        model_attribute: str = "net",
        **search: Any,
    ) -> None:
        _check_arguments(start_epoch, every_n_epochs, monitor, max_images, holdout_size_bytes, gradient_batches, search)
        self.config = RoundRobinConfig(tolerance=tolerance, granularity=granularity, **search)
        self.start_epoch = start_epoch
        self.every_n_epochs = every_n_epochs
        self.monitor = monitor
        self.max_images = max_images
        self.holdout_size_bytes = holdout_size_bytes
        self.gradient_batches = gradient_batches
        self.model_attribute = model_attribute
        self.search_state: SearchState | None = None
        self._last_epoch = -1
        self._scorer: Scorer | None = None
        self._masks: Any = None
        self._rng = RandomNumbers()

    keeps_masks = True  # so CompressionMixin need not

    @property
    def state_key(self) -> str:
        """One key for subclasses too: a checkpoint of one goes on with the other."""
        return _WHO

    # Policy: override these.

    def should_prune(self, epoch: int) -> bool:
        """Whether a round runs before `epoch` (the search may be over already)."""
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
            refuse_strategy(trainer, _WHO)
            refuse_neighbours(trainer, _WHO)
            refuse_masked_integers(trainer, pl_module, self.model_attribute, self.monitor, self.config.kinds)
            network = self._network(pl_module)
            refuse_sharing(pl_module, network, pruned_tensors(network, self.config), self.model_attribute)
            if trainer.current_epoch == 0:  # a fresh fit; a resumed one loads its state after this hook
                self.search_state, self._last_epoch = None, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is something to score on, before the first epoch is spent; have masks kept."""
        self._rng.on_train_start(trainer)
        self._keep_masks(trainer, pl_module)
        if not self._is_over():
            self._refuse_optimizers(trainer, pl_module)
            with isolate_rng(), validating(trainer, pl_module), torch.no_grad():
                self._scorer = self._make_scorer(trainer, pl_module)
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.start_epoch:
            rank_zero_warn(
                f"start_epoch={self.start_epoch} is not reached in max_epochs={trainer.max_epochs}: nothing is pruned."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run a round if there is one before this epoch."""
        self._rng.on_train_epoch_start(trainer)
        epoch = trainer.current_epoch
        if self._is_over() or epoch <= self._last_epoch or not self.should_prune(epoch):
            return
        # The search must not move the random numbers that shuffling, dropout and augmentation draw.
        with isolate_rng():
            outcome = self._run_round(trainer, pl_module)
        self.search_state = outcome.state
        self._last_epoch = epoch
        self._log(pl_module, outcome)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when the fit ends before a search that slices only at its own end."""
        state = self.search_state
        if self.config.shrink == "end" and state is not None and state.stopped is None:
            rank_zero_warn(
                "shrink='end': the search did not end in this fit, so what it took is masked and not sliced. Give "
                "max_rounds or a target that is reached, or slice a float network with pruning.finish_search"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the hold-out and of the optimizers."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same: Lightning tears nothing down after an exception."""
        self._let_go()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the manifest with which the architecture is rebuilt."""
        save_to_checkpoint(pl_module, checkpoint, self.model_attribute)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the random numbers where the checkpoint left them."""
        mine = checkpoint["callbacks"].get(self.state_key)
        if mine is not None and mine.get("version") == _STATE_VERSION:
            self._rng.resume(trainer, mine["rng"])

    def state_dict(self) -> dict[str, Any]:
        """The search so far and the random numbers' states: plain data and tensors."""
        search = None if self.search_state is None else self.search_state.to_dict()
        return {"version": _STATE_VERSION, "last_epoch": self._last_epoch, "search": search, "rng": rng_states()}

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

    def _let_go(self) -> None:
        self._scorer = None
        if self._masks is not None:
            self._masks.remove()
            self._masks = None

    def _refuse_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        if self.config.granularity == "structured":
            network = self._network(module)
            refuse_optimizers(trainer.optimizers, network, pruned_tensors(network, self.config))

    def _keep_masks(self, trainer: Trainer, module: LightningModule) -> None:
        if self._masks is not None:
            self._masks.remove()
        self._masks = keep_masks(trainer.optimizers, self._network(module))

    def _network(self, module: LightningModule) -> nn.Module:
        return searched_network(module, self.model_attribute)

    def _is_over(self) -> bool:
        return self.search_state is not None and self.search_state.stopped is not None

    def _run_round(self, trainer: Trainer, module: LightningModule) -> RoundOutcome:
        network = self._network(module)
        follower = ScalesFollower(module, self.model_attribute)
        self._refuse_optimizers(trainer, module)  # they have no state before the first step
        share_buffers(network)
        with validating(trainer, module), torch.no_grad():
            scorer = self._scorer
            assert scorer is not None  # made when training started
            shape = input_shape(trainer, scorer, _WHO)
            fresh = self.search_state is None
            state = self.search_state or begin_search(
                network, scorer, self.config, input_shape=shape, gradients=lambda n: self._gradients(trainer, module, n)
            )
            active = sum(entry.locked is None for entry in state.targets.values())
            with search_progress(trainer, f"pruning before epoch {trainer.current_epoch}", active) as tell:

                def progress(step: Step) -> None:
                    tell(step)
                    self.on_step(trainer, step)

                outcome = run_round(
                    network,
                    scorer,
                    self.config,
                    state,
                    input_shape=shape,
                    gradients=lambda n: self._gradients(trainer, module, n),
                    unchanged=fresh,
                    progress=progress,
                    follower=follower,
                )
        self._follow(trainer, module, outcome, follower)
        return outcome

    def _follow(
        self, trainer: Trainer, module: LightningModule, outcome: RoundOutcome, follower: ScalesFollower
    ) -> None:
        """Optimizers, masks, compiled code and DDP go on with what the round made of the network."""
        network = self._network(module)
        try:
            slice_optimizers(trainer.optimizers, follower.with_scales(outcome.applied))
        except BaseException:
            revert(network, outcome.change)
            follower.uncut()
            raise
        sliced = bool(outcome.applied.tensors)
        if outcome.state.stopped is not None:
            finished = finish_search(network, self.config)
            follower.cut(finished)
            slice_optimizers(trainer.optimizers, follower.with_scales(finished))
            sliced = sliced or bool(finished.tensors)
        self._keep_masks(trainer, module)
        if sliced:
            # Compiled code knows the old shapes; without a reset each shrink counts against the recompile limit.
            torch.compiler.reset()
        if sliced or outcome.change.registered:
            wrap_anew(trainer)

    def _make_scorer(self, trainer: Trainer, module: LightningModule) -> Scorer:
        loaders = holdout_loaders(trainer, _WHO)
        if self.monitor is not None:
            return metric_scorer(trainer, module, self.monitor, loaders)
        return holdout_scorer(
            trainer,
            loaders,
            lambda network, images: self._predict(module, network, images),
            self.max_images,
            self.holdout_size_bytes,
        )

    def _predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
        return self.predict(module, scored_network(module, self.model_attribute, network), images)

    def _gradients(self, trainer: Trainer, module: LightningModule, network: nn.Module) -> Gradients:
        with torch.enable_grad(), seeded(trainer.current_epoch):
            return collect_gradients(
                network,
                training_batches(trainer, self.gradient_batches),
                max_batches=self.gradient_batches,
                predict=lambda images: self._predict(module, network, images),
            )

    def _log(self, module: LightningModule, outcome: RoundOutcome) -> None:
        state = outcome.state
        last = state.steps[-1] if state.steps else None
        parameters = state.baseline_parameters if last is None else last.parameters
        values = {
            "pruning/score": state.baseline_score if state.score is None else state.score,
            "pruning/baseline": state.baseline_score,
            "pruning/parameters": float(parameters),
            "pruning/sparsity": (state.baseline_parameters - parameters) / state.baseline_prunable,
            "pruning/active_targets": float(sum(entry.locked is None for entry in state.targets.values())),
            "pruning/images_scored": float(state.scoring.get("images_scored", 0)),
        }
        if last is not None and last.macs is not None:
            values["pruning/macs"] = float(last.macs)
        # All ranks have the same values; the reduction only tells Lightning so, that every rank may monitor them.
        module.log_dict(values, sync_dist=True, reduce_fx="max")
        accepted = f"{sum(s.accepted for s in outcome.steps)} of {len(outcome.steps)} steps kept"
        if not outcome.steps:
            accepted = "it stands below the tolerance, so nothing was tried"
        rank_zero_info(
            f"pruning round {state.rounds}: {values['pruning/score']:.2f} points, unpruned {state.baseline_score:.2f}; "
            f"{values['pruning/sparsity']:.1%} of the prunable weights removed; {accepted}"
            + (f"; the search ends: {state.stopped}" if state.stopped else "")
        )


def _check_arguments(
    start_epoch: int,
    every_n_epochs: int,
    monitor: str | None,
    max_images: int | None,
    holdout_size_bytes: int,
    gradient_batches: int,
    search: Mapping[str, Any],
) -> None:
    if start_epoch < 0:
        raise ValueError(f"start_epoch={start_epoch}: it has to be 0 or more")
    if every_n_epochs < 1:
        raise ValueError(f"every_n_epochs={every_n_epochs}: it has to be 1 or more")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images}: it has to be None (all) or 1 or more")
    if monitor is not None and max_images is not None:
        raise ValueError(
            f"max_images={max_images}: a monitor ({monitor!r}) is computed over the whole hold-out; leave one of the "
            "two out, or limit the hold-out itself"
        )
    if holdout_size_bytes < 1:
        raise ValueError(f"holdout_size_bytes={holdout_size_bytes}: it has to be 1 or more, e.g. 4 << 30")
    if gradient_batches < 1:
        raise ValueError(f"gradient_batches={gradient_batches}: it has to be 1 or more")
    own = ("tolerance", "granularity")
    options = [f.name for f in dataclasses.fields(RoundRobinConfig) if f.name not in own]
    unknown = sorted(set(search) - set(options))
    if unknown:
        raise TypeError(
            f"AdaptiveIterativePruning has no option {', '.join(unknown)}; the search's are {', '.join(options)}"
        )
