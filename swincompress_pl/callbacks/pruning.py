"""Adaptive iterative pruning between the epochs of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from swincompress_pl.arguments import integer
from swincompress_pl.callbacks.progress import search_progress
from swincompress_pl.callbacks.resumed_arguments import ResumedArguments
from swincompress_pl.callbacks.search import Outcome, SearchCallback, config_of, log_search
from swincompress_pl.callbacks.searched_network import CoupledScales
from swincompress_pl.pruning import AdaptivePruningConfig, Criterion, SearchSession, SearchState, Step
from swincompress_pl.pruning.adaptive.limits import LIMITS, take_up_limits
from swincompress_pl.pruning.adaptive.search import RoundOutcome, finish_search
from swincompress_pl.pruning.evaluation.scorer import Scorer
from swincompress_pl.pruning.space import SpaceConfig
from swincompress_pl.pruning.structure.apply import AppliedPlan


class AdaptiveIterativePruning(SearchCallback):
    """Prunes `module.<model_attribute>` between epochs, as far as the accuracy on a hold-out allows.

    Before each chosen epoch one round of the search runs: every group or layer is tried in turn, what costs no more
    than `tolerance` goes, the optimizer's state is cut with it, and the epoch trains what is left. A round stands
    before its epoch, so that the epoch's checkpoint and validation see the network after its recovery, and a kill in
    the middle of a round loses that round only.

    tolerance: accuracy that may be lost in points, above 0 and at most 100, against the network before the first round.
    granularity: "structured" (whole heads, channels, ...; removed physically), "weight", n of m like "2:4", or "block"
        (masks: buffers `weight_mask` beside weights that stay zero).
    first_tolerance, block_shape, step, min_step, max_sparsity, round_to, order, ranking, overshoot, shrink, kinds,
        layers, criterion, target, target_of, max_rounds, time_budget_s: how the search goes, see
        `pruning.AdaptivePruningConfig`.
    start_epoch, every_n_epochs: rounds run before epochs start_epoch, start_epoch + every_n_epochs, ...; 0 is for a
        network with trained weights. Override `should_prune` for another policy.
    monitor: score by a metric that the module's validation logs, a fraction between 0 and 1, over the whole hold-out;
        default: by top-1 of what the module's validation_step predicts, on as few images as a decision needs.
    max_images: score on a subset of so many images, balanced over the classes; None for all.
    holdout_size_bytes: the hold-out is kept in the device's memory; a larger one is refused (default 4 GiB).
    gradient_batches: for criteria that need gradients, taken from `calibration_dataloader`.
    calibration_dataloader: a loader, or a function of the number of images that gives one, with batches of the form
        that validation_step takes; default: the datamodule's `calibration_dataloader(images)`, or the training data.
    model_attribute: where the LightningModule holds the network: "net", or a path like "model.backbone", "nets.0".
    config: all settings of the search at once, in the place of the arguments from `tolerance` to `time_budget_s`.

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data. The module's own
    validation_step is run on it, with its hooks and after its transfer, so that images are seen and answers counted as
    the module has it: normalization on the device, a head outside of the network, several crops. The step leaves no
    trace (metrics, loggers, attributes); `training_step` is never called. Logs pruning/score, pruning/baseline,
    pruning/parameters, pruning/sparsity (of the prunable weights), pruning/active_targets, pruning/images_scored and
    pruning/macs to every logger. The search and the states
    of the random number generators are in the checkpoint: a resumed fit goes on with the same architecture, search and
    random numbers.

    Once the network is quantized (`QuantizationAwareTraining` in the same fit, or before it) the search goes on: it
    cuts or masks the float weights, the scales of what stays are kept as they are, and what is scored is the rounded
    network. The tolerance is against the network before the first round: a search begun before the quantization keeps
    its float baseline, so that what quantization loses counts; one begun after it has a quantized baseline.

    One device or DDP; FSDP and DeepSpeed, EMA and SWA are refused by name. Compiled networks (`torch.compile`) are
    compiled again after a shrink.

    Example: `Trainer(callbacks=[AdaptiveIterativePruning(tolerance=1.0, start_epoch=5, every_n_epochs=2, target=0.4)])`
    """

    def __init__(
        self,
        *,
        tolerance: float = 1.0,
        first_tolerance: float | None = None,
        granularity: str = "structured",
        block_shape: tuple[int, int] = (8, 8),
        step: float = 0.05,
        min_step: float = 0.0125,
        max_sparsity: float = 0.9,
        round_to: int = 8,
        order: Literal["fixed", "size", "sensitivity"] = "fixed",
        ranking: Literal["local", "global"] = "local",
        overshoot: Literal["rollback", "keep"] = "rollback",
        shrink: Literal["round", "end"] = "round",
        kinds: Sequence[str] = ("heads", "mlp"),
        layers: Sequence[str] | None = None,
        criterion: str | Criterion = "magnitude",
        target: float | None = None,
        target_of: Literal["macs", "parameters", "bytes"] = "macs",
        max_rounds: int | None = None,
        time_budget_s: float | None = None,
        config: AdaptivePruningConfig | None = None,
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        monitor: str | None = None,
        max_images: int | None = None,
        holdout_size_bytes: int = 4 << 30,
        gradient_batches: int = 8,
        calibration_dataloader: Any = None,
        model_attribute: str = "net",
    ) -> None:
        given = dict(locals())
        super().__init__(
            start_epoch=start_epoch,
            monitor=monitor,
            max_images=max_images,
            holdout_size_bytes=holdout_size_bytes,
            gradient_batches=gradient_batches,
            calibration_dataloader=calibration_dataloader,
            model_attribute=model_attribute,
        )
        self.every_n_epochs = integer("every_n_epochs", every_n_epochs, least=1)
        self.config = config_of(AdaptivePruningConfig, config, given)
        self.search_state: SearchState | None = None

    callback_name = "AdaptiveIterativePruning"
    config: AdaptivePruningConfig
    resumed_arguments = ResumedArguments(
        settled=(
            "granularity", "block_shape", "order", "ranking", "shrink", "kinds", "layers", "monitor", "max_images",
            "model_attribute",
        ),
        free=(*LIMITS, "criterion", "start_epoch", "every_n_epochs", "gradient_batches"),
        because="its search has begun",
    )  # fmt: skip

    # Policy: override these.

    def should_prune(self, epoch: int) -> bool:
        """Whether a round runs before `epoch` (the search may be over already)."""
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every_n_epochs == 0

    def on_step(self, trainer: Trainer, step: Step) -> None:
        """Called after each tried step, for a display of one's own; does nothing."""

    # The search.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when the fit ends before a search that slices only at its own end."""
        state = self.search_state
        if self.config.shrink == "end" and state is not None and state.stopped is None:
            rank_zero_warn(
                "shrink='end': the search did not end in this fit, so what it took is masked and not sliced. Give "
                "max_rounds or a target that is reached, or slice a float network with "
                "pruning.adaptive.search.finish_search(network, callback.config)"
            )

    def _space(self, network: nn.Module) -> SpaceConfig:
        return self.config

    def _is_over(self) -> bool:
        return self.search_state is not None and self.search_state.stopped is not None

    def _forget(self) -> None:
        self.search_state = None

    def _stored(self) -> dict[str, Any]:
        return {"search": None if self.search_state is None else self.search_state.to_dict()}

    def _restore(self, stored: dict[str, Any]) -> None:
        search = stored["search"]
        self.search_state = None if search is None else SearchState.from_dict(search)
        if self.search_state is not None:
            take_up_limits(self.search_state, stored.get("arguments", {}), self.config)

    def _arguments(self) -> dict[str, Any]:
        arguments = {**super()._arguments(), "every_n_epochs": self.every_n_epochs}
        if self.config.granularity != "block":
            del arguments["block_shape"]
        return arguments

    def _find(
        self,
        trainer: Trainer,
        module: LightningModule,
        scorer: Scorer,
        shape: tuple[int, ...] | None,
        coupled: CoupledScales,
    ) -> RoundOutcome:
        session = SearchSession(
            self._network(module),
            scorer,
            self.config,
            input_shape=shape,
            gradients=lambda network: self._gradients(trainer, module, network),
            state=self.search_state,
        )
        active = sum(entry.locked is None for entry in session.state.targets.values())
        with search_progress(trainer, f"pruning before epoch {trainer.current_epoch}", active) as report_progress:

            def on_step(step: Step) -> None:
                report_progress(str(step), active)
                self.on_step(trainer, step)

            return session.round(on_step=on_step, coupled=coupled)

    def _finish(self, network: nn.Module, outcome: Outcome) -> AppliedPlan | None:
        assert isinstance(outcome, RoundOutcome)
        return None if outcome.state.stopped is None else finish_search(network, self.config)

    def _take(self, outcome: Outcome) -> None:
        assert isinstance(outcome, RoundOutcome)
        self.search_state = outcome.state

    def _log(self, module: LightningModule, outcome: Outcome) -> None:
        assert isinstance(outcome, RoundOutcome)
        state = outcome.state
        last = state.steps[-1] if state.steps else None
        parameters = state.baseline_parameters if last is None else last.parameters
        values = {
            "score": state.baseline_score if state.score is None else state.score,
            "baseline": state.baseline_score,
            "parameters": float(parameters),
            "sparsity": (state.baseline_parameters - parameters) / state.baseline_prunable,
            "active_targets": float(sum(entry.locked is None for entry in state.targets.values())),
            "images_scored": float(state.scoring.get("images_scored", 0)),
        }
        if last is not None and last.macs is not None:
            values["macs"] = float(last.macs)
        log_search(module, values)
        accepted = f"{sum(s.accepted for s in outcome.steps)} of {len(outcome.steps)} steps kept"
        if not outcome.steps:
            accepted = "it stands below the tolerance, so nothing was tried"
        rank_zero_info(
            f"pruning round {state.rounds}: {values['score']:.2f} points, unpruned {state.baseline_score:.2f}; "
            f"{values['sparsity']:.1%} of the prunable weights removed; {accepted}"
            + (f"; the search ends: {state.stopped}" if state.stopped else "")
        )
