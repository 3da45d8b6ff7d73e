"""PrimeSVT before an epoch of a fit, which then trains what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from swincompress_pl._deprecated import renamed
from swincompress_pl.arguments import optional, path
from swincompress_pl.callbacks.progress import search_progress
from swincompress_pl.callbacks.resumed_arguments import ResumedArguments
from swincompress_pl.callbacks.search import Outcome, SearchCallback, config_of, log_search
from swincompress_pl.callbacks.searched_network import CoupledScales
from swincompress_pl.pruning import (
    AllocatedPolicy,
    Criterion,
    PrimeProgress,
    PrimeSVTConfig,
    PrimeSVTResult,
    PrioritizedPolicy,
    primesvt,
)
from swincompress_pl.pruning.evaluation.scorer import Scorer, fingerprint_of
from swincompress_pl.pruning.prime.config import with_old_policy_settings
from swincompress_pl.pruning.space import SpaceConfig


class PrimeSVT(SearchCallback):
    """Prunes the spiking `module.<model_attribute>` once, in a single shot, before epoch `start_epoch`.

    PrimeSVT (arXiv 2606.03428): see `pruning.primesvt`. The epochs that follow fine-tune what is left, with the
    optimizer's state cut along; with granularity "filter" zeros stay zeros.

    tolerance: accuracy that may be lost in points on the hold-out, above 0 and at most 100. min_memory_saving: part of
    all parameters, 0 to below 1. granularity: "structured" (units go physically) or "filter" (zeros in every filter).
    policy, blocks, prefer, rates, min_block_share, max_sparsity, round_to, kinds, layers, criterion, batchnorm: see
    `pruning.PrimeSVTConfig`.
    config: all settings of the search at once, in the place of those above, e.g. `PrimeSVTConfig.paper()`.
    start_epoch: 0 is for a network with trained weights. evaluation_cache: a file that keeps every verdict, so that a
    search that was killed goes on where it was. on_progress: override it for a display of one's own.
    monitor, max_images, holdout_size_bytes, gradient_batches, calibration_dataloader, model_attribute: as in
    `AdaptiveIterativePruning`; gradient_batches are also those on which `batchnorm="correct"` corrects the statistics.

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data. Logs pruning/score,
    pruning/baseline, pruning/saving, pruning/parameters, pruning/images_scored and pruning/macs to every logger.
    `result` is what was found (`PrimeSVTResult`); it is in the checkpoint. Where the constraints cannot both be met, a
    warning says so and `prefer` decides what is applied.
    One device or DDP; FSDP and DeepSpeed, EMA and SWA are refused by name.

    Example: `Trainer(callbacks=[PrimeSVT(tolerance=3.0, min_memory_saving=0.25)])`
    """

    callback_name = "PrimeSVT"
    config: PrimeSVTConfig
    resumed_arguments = ResumedArguments(
        settled=(
            *(field.name for field in fields(PrimeSVTConfig)),
            "start_epoch",
            "monitor",
            "max_images",
            "gradient_batches",
            "model_attribute",
        ),
        free=(),
        because="its one search is over",
    )

    @renamed(
        max_accuracy_drop="tolerance",
        mode="granularity",
        max_rate="max_sparsity",
        memo="evaluation_cache",
        values={"granularity": {"group": "structured", "paper": "filter"}, "batchnorm": {"reestimate": "correct"}},
    )
    @with_old_policy_settings
    def __init__(
        self,
        *,
        tolerance: float = 3.0,
        min_memory_saving: float = 0.25,
        granularity: Literal["structured", "filter"] = "structured",
        policy: AllocatedPolicy | PrioritizedPolicy | Literal["allocated", "prioritized"] = "allocated",
        blocks: Literal["layer", "block"] = "layer",
        prefer: Literal["accuracy", "memory"] = "accuracy",
        rates: Sequence[float] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
        min_block_share: float = 0.2,
        max_sparsity: float = 0.9,
        round_to: int = 8,
        kinds: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        criterion: str | Criterion = "magnitude",
        batchnorm: Literal["keep", "correct"] = "keep",
        config: PrimeSVTConfig | None = None,
        start_epoch: int = 0,
        evaluation_cache: str | Path | None = None,
        monitor: str | None = None,
        max_images: int | None = None,
        holdout_size_bytes: int = 4 << 30,
        gradient_batches: int = 8,
        calibration_dataloader: Any = None,
        model_attribute: str = "net",
    ) -> None:
        given = dict(locals())
        if isinstance(policy, str) and policy == "allocated":
            given["policy"] = AllocatedPolicy()
        super().__init__(
            start_epoch=start_epoch,
            monitor=monitor,
            max_images=max_images,
            holdout_size_bytes=holdout_size_bytes,
            gradient_batches=gradient_batches,
            calibration_dataloader=calibration_dataloader,
            model_attribute=model_attribute,
        )
        self.config = config_of(PrimeSVTConfig, config, given)
        self.evaluation_cache = optional(path, "evaluation_cache", evaluation_cache)
        if self.evaluation_cache is not None and self._predicts_itself and fingerprint_of(self.predict) is None:
            raise ValueError(
                f"evaluation_cache: nothing tells {type(self).__name__}.predict from another predict; give it a name "
                "that changes whenever it predicts otherwise, below its definition: predict.fingerprint = 'version 1'"
            )
        self.result: PrimeSVTResult | None = None

    def should_prune(self, epoch: int) -> bool:
        """Whether the search runs before `epoch` (it may be over already)."""
        return epoch >= self.start_epoch

    def on_progress(self, trainer: Trainer, progress: PrimeProgress) -> None:
        """Called after each candidate, for a display of one's own; does nothing."""

    def _space(self, network: nn.Module) -> SpaceConfig:
        return self.config.space(network)

    def _is_over(self) -> bool:
        return self.result is not None

    def _forget(self) -> None:
        self.result = None

    def _stored(self) -> dict[str, Any]:
        return {"result": None if self.result is None else self.result.to_dict()}

    def _restore(self, stored: dict[str, Any]) -> None:
        result = stored["result"]
        self.result = None if result is None else PrimeSVTResult.from_dict(result)

    def _find(
        self,
        trainer: Trainer,
        module: LightningModule,
        scorer: Scorer,
        shape: tuple[int, ...] | None,
        coupled: CoupledScales,
    ) -> PrimeSVTResult:
        done = 0
        calibration = None
        if self.config.batchnorm == "correct":
            calibration = self._calibration_images(trainer, module)
        with search_progress(trainer, f"PrimeSVT before epoch {trainer.current_epoch}", None) as report_progress:

            def progress(now: PrimeProgress) -> None:
                nonlocal done
                done += 1
                report_progress(str(now), done + now.total - now.done)
                self.on_progress(trainer, now)

            return primesvt(
                self._network(module),
                scorer,
                self.config,
                input_shape=shape,
                calibration=calibration,
                gradients=lambda network: self._gradients(trainer, module, network),
                evaluation_cache=self.evaluation_cache,
                progress=progress,
            )

    def _take(self, outcome: Outcome) -> None:
        assert isinstance(outcome, PrimeSVTResult)
        self.result = outcome

    def _log(self, module: LightningModule, outcome: Outcome) -> None:
        assert isinstance(outcome, PrimeSVTResult)
        values = {
            "score": outcome.score,
            "baseline": outcome.baseline_score,
            "saving": outcome.saving,
            "parameters": outcome.parameters_before * (1 - outcome.saving),
            "images_scored": float(outcome.scoring["images_scored"]),
        }
        if outcome.macs_after is not None:
            values["macs"] = float(outcome.macs_after)
        log_search(module, values)
        rank_zero_info(f"PrimeSVT: {outcome.summary()}")
