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
from swincompress_pl.pruning.space import SpaceConfig, needs_calibration
from swincompress_pl.pruning.structure.apply import AppliedPlan


class AdaptiveIterativePruning(SearchCallback):
    """Prunes a network between the epochs of a fit, as far as the accuracy on a hold-out allows.

    One round of the search (after Cai and Liu, DOI 10.13700/j.bh.1001-5965.2024.0222) runs before each chosen epoch. It
    tries to narrow each group or layer in turn, and keeps what costs no more than `tolerance`. The optimizer's state is
    cut with the weights, and the epoch trains what is left. So the epoch's validation and checkpoint see the network
    after its recovery, and a kill during a round loses that round only.

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data. The module's own
    `validation_step` runs on it, with its hooks and after its transfer to the device. So images and answers are those
    of the module, also with normalization on the device, a head outside the network or several crops. The step leaves
    no trace in metrics, loggers or attributes, and `training_step` is never called for scoring.

    The callback logs pruning/score, pruning/baseline, pruning/parameters, pruning/sparsity (of the prunable weights),
    pruning/active_targets, pruning/images_scored and, once a step was tried, pruning/macs. With an audit it also logs
    pruning/audit_lost and pruning/optimism, in points. A checkpoint holds the search and the states of the random
    number generators: a resumed fit goes on with the same architecture and search, and in a single process with the
    same random numbers.

    Once `QuantizationAwareTraining` has quantized the network, in the same fit or before it, the search goes on. It
    cuts or masks the float weights, keeps the scales of what stays, and scores the rounded network. A search that began
    before the quantization keeps its float baseline, so that what quantization loses counts against the tolerance. One
    that began after it has a quantized baseline.

    It runs on one device or under DDP. FSDP, DeepSpeed, EMA and SWA are refused by name. A compiled network
    (`torch.compile`) is compiled again after a shrink.

    Example:
        `Trainer(callbacks=[AdaptiveIterativePruning(tolerance=1.0, start_epoch=5, every_n_epochs=2, target=0.4)])`

    Args:
        tolerance: Accuracy that may be lost against the network before the first round, in points, above 0 and at most
            100.
        audit: Part of the hold-out that decides nothing until the end of a round, 0 to below 1. If the round lost more
            than the tolerance on it, the latest steps are given back. 0 for none. Not with `monitor`.
        first_tolerance: Tolerance to begin with, in points, at most `tolerance`. Whenever every target is locked, it
            doubles, up to `tolerance`. None begins with `tolerance`.
        granularity: What is removed. "structured" cuts whole units (heads, channels, ...) out of the tensors. "weight",
            n of m such as "2:4", "block" and "filter" mask weights: these stay zero, beside buffers `weight_mask`.
        block_shape: Rows and columns of a block, for the granularity "block".
        step: Part of a target's original units that its first step removes, above 0 and at most 1. Each rejection
            halves it.
        min_step: A target whose step falls below it is locked; above 0 and at most `step`.
        max_sparsity: Part of a target's original units that may go, above 0 and below 1.
        round_to: Widths other than numbers of heads become multiples of it, 1 or more; of "qk" and "v", that of all
            heads together. Only for "structured".
        order: Order of the targets. "fixed" is the network's own, "size" begins with the most weights, and
            "sensitivity" with the least loss of accuracy, which is measured once before the first round.
        ranking: "local" narrows one target after the other; "global" removes the lowest scores of all targets together.
        overshoot: "rollback" undoes a step beyond the tolerance; "keep" keeps it and locks the target.
        shrink: "round" cuts at the end of each round; "end" masks until the search is over. Only for "structured".
        kinds: Kinds of groups to prune: "heads", "mlp", "head_dim", "embed", and in spiking networks also "conv", "qk"
            and "v".
        layers: Patterns (as of `fnmatch`) of the names to prune; None for all.
        criterion: What decides which units or weights go first: a name in `pruning.CRITERIA`,
            "second_order" (the error that compensation leaves), or a function as `pruning.Criterion` describes it.
        compensation: What makes up for what goes, in the layers that read it. "none" leaves them as they are, "bias"
            adds what went on average, and "ridge" solves their weights and biases again, from calibration images.
        target: Part of the cost after whose removal the search ends, above 0 and below 1; None for no such end.
        target_of: The cost that `target` refers to: "macs", "parameters" or "bytes".
        max_rounds: Number of rounds after which the search ends, 1 or more; None for no such end.
        time_budget_s: Seconds of searching after which the search ends, above 0; None for no such end.
        config: All of the settings above at once, in place of the arguments from `tolerance` to `time_budget_s`.
        start_epoch: Epoch before which the first round runs, 0 or more. 0 is for a network with trained weights.
        every_n_epochs: Number of epochs from one round to the next, 1 or more. Override `should_prune` for another
            schedule.
        monitor: Name of a metric that the module's validation logs, to score by over the whole hold-out. It has to be a
            fraction between 0 and 1 that grows as the network gets better, such as an accuracy. None scores by the
            top-1 accuracy of what `validation_step` predicts, on as few images as a decision needs.
        score: What is scored without `monitor`. "accuracy" compares with the labels. "agreement" and "kl" compare with
            the unpruned network; see `pruning.HoldOut`.
        max_images: Number of images to score on, 1 or more, with the classes in proportion; None for all. Not
            with `monitor`.
        holdout_size_bytes: Largest size of the hold-out, which is kept in each device's memory, in bytes; a larger one
            is refused. The default is 4 GiB.
        gradient_batches: Number of batches for criteria that need gradients, and for `compensation`, 1 or more.
        calibration_dataloader: Source of these batches, in the form that `validation_step` takes: a loader, or a
            function that takes a number of images and returns a loader. None stands for the datamodule's
            `calibration_dataloader(images)`, or else the training data.
        model_attribute: Where the LightningModule holds the network: "net", or a path such as "model.backbone" or
            "nets.0".

    Attributes:
        config: The settings of the search.
        search_state: The search so far; None before its first round.

    Raises:
        ValueError: If an argument is out of range or contradicts another one, or `monitor` has the name of a loss or an
            error; when the fit begins, if the network, its optimizer, the data, the strategy, the precision or another
            callback does not go with pruning, if `monitor` is not between 0 and 1, or if another callback or a
            scheduler monitors the same name with mode="min".
        TypeError: If `config` and an argument that it replaces are both given.
        AttributeError: When the fit begins, if the module has no network at `model_attribute`.
        UnsupportedNetworkError: When the fit begins, if no adapter covers the network.
    """

    def __init__(
        self,
        *,
        tolerance: float = 1.0,
        audit: float = 0.0,
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
        compensation: Literal["none", "bias", "ridge", "second_order"] = "none",
        target: float | None = None,
        target_of: Literal["macs", "parameters", "bytes"] = "macs",
        max_rounds: int | None = None,
        time_budget_s: float | None = None,
        config: AdaptivePruningConfig | None = None,
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        monitor: str | None = None,
        score: Literal["accuracy", "agreement", "kl"] = "accuracy",
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
            score=score,
            max_images=max_images,
            holdout_size_bytes=holdout_size_bytes,
            gradient_batches=gradient_batches,
            calibration_dataloader=calibration_dataloader,
            model_attribute=model_attribute,
        )
        self.every_n_epochs = integer("every_n_epochs", every_n_epochs, least=1)
        self.config = config_of(AdaptivePruningConfig, config, given)
        self._refuse_unsplittable()
        self.search_state: SearchState | None = None

    callback_name = "AdaptiveIterativePruning"
    config: AdaptivePruningConfig
    resumed_arguments = ResumedArguments(
        settled=(
            "audit", "granularity", "block_shape", "order", "ranking", "shrink", "kinds", "layers", "monitor", "score",
            "max_images", "model_attribute",
        ),
        free=(*LIMITS, "criterion", "compensation", "start_epoch", "every_n_epochs", "gradient_batches"),
        because="its search has begun",
    )  # fmt: skip

    # Policy: override these.

    def should_prune(self, epoch: int) -> bool:
        """Decides whether a round runs before an epoch. Override it for another schedule.

        Args:
            epoch: The epoch, counted from 0.

        Returns:
            Whether it does; once the search is over, the answer has no effect.
        """
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every_n_epochs == 0

    def on_step(self, trainer: Trainer, step: Step) -> None:
        """Does nothing; is called after each tried step, for a display of your own.

        Args:
            trainer: The trainer of the fit.
            step: What was tried, and whether it was kept.
        """

    # The search.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if the fit ends before a search that slices only at its own end."""
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
            calibration=self._calibration_images(trainer, module) if needs_calibration(self.config) else None,
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
        audit = state.audits[-1] if state.audits else None
        if audit is not None:
            values |= {"audit_lost": audit.lost_points, "optimism": audit.optimism_points}
        log_search(module, values)
        accepted = f"{sum(s.accepted for s in outcome.steps)} of {len(outcome.steps)} steps kept"
        if not outcome.steps:
            accepted = "the score is below the tolerance already, so nothing was tried"
        rank_zero_info(
            f"pruning round {state.rounds}: {values['score']:.2f} points, unpruned {state.baseline_score:.2f}; "
            f"{values['sparsity']:.1%} of the prunable weights removed; {accepted}"
            + ("" if audit is None else f"; audit: {audit}")
            + (f"; the search ends: {state.stopped}" if state.stopped else "")
        )
