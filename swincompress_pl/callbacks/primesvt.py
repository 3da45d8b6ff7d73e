"""PrimeSVT as a callback: it prunes before an epoch of a fit, which then trains what is left."""

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
from swincompress_pl.pruning.space import SpaceConfig, needs_calibration


class PrimeSVT(SearchCallback):
    """Prunes a spiking network once, in a single shot, before an epoch of a fit (PrimeSVT, arXiv 2606.03428).

    See `pruning.primesvt` for the search. The epochs that follow fine-tune what is left. The optimizer's state is cut
    with the weights, and with the granularity "filter" zeros stay zeros. If both constraints cannot be met, a warning
    says so, and `prefer` decides what is applied, if anything.

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data. It is scored as in
    `AdaptiveIterativePruning`. The callback logs pruning/score, pruning/baseline, pruning/saving, pruning/parameters,
    pruning/images_scored and pruning/macs.

    It runs on one device or under DDP. FSDP, DeepSpeed, EMA and SWA are refused by name.

    Example:
        `Trainer(callbacks=[PrimeSVT(tolerance=3.0, min_memory_saving=0.25)])`

    Args:
        tolerance: Accuracy that may be lost on the hold-out, in points, above 0 and at most 100.
        audit: Part of the hold-out that decides nothing until the end, 0 to below 1. A candidate that loses more than
            `tolerance` on it is not applied. 0 for none. Not with `monitor`.
        min_memory_saving: Part of all parameters that has to go, 0 or more and below 1.
        granularity: "structured" cuts units out of the tensors; "filter" makes the weakest input channels of each
            filter zero.
        policy: What chooses the rates: "allocated", "prioritized" (the paper's), or one of them with its settings
            (`pruning.AllocatedPolicy`, `pruning.PrioritizedPolicy`).
        blocks: "layer" has one rate per layer, "block" (the paper's) one rate for all layers of a block.
        prefer: What is applied if no candidate meets both constraints. "accuracy" takes the largest saving within
            `tolerance`, "memory" the best accuracy that saves `min_memory_saving`.
        rates: Parts of a layer's units that are tried.
        min_block_share: A block with less than this part of an average block's parameters stays at the initial rate. 0
            (the paper's) raises all blocks.
        max_sparsity: Part of a layer's units that may go, above 0 and below 1.
        round_to: Widths other than numbers of heads become multiples of it, 1 or more; of "qk" and "v", that of all
            heads together.
        kinds: Kinds of groups to prune, only for "structured"; None for all that the network has except "heads" and,
            unless `compensation` is "ridge" or "second_order", "embed".
        layers: Patterns (as of `fnmatch`) of the names to prune; None for all.
        criterion: What decides which units go first: a name in `pruning.CRITERIA`, "second_order"
            (the error that compensation leaves), or a function as `pruning.Criterion` describes it. "magnitude" is the
            paper's L2 norm.
        batchnorm: "keep" leaves running statistics as they are; "correct" adapts them for each candidate, by what
            pruning changes of them on calibration images.
        compensation: What makes up for what goes, in the layers that read it. "none" leaves them as they are, "bias"
            adds what went on average, and "ridge" solves their weights again, from calibration images.
        config: All of the settings above at once, in place of the arguments from `tolerance` to `compensation`, such as
            `PrimeSVTConfig.paper()`.
        start_epoch: Epoch before which the search runs, 0 or more. 0 is for a network with trained weights.
        evaluation_cache: File that keeps each verdict, so that a search that was killed goes on where it was; None for
            no file.
        monitor: Name of a metric to score by, a fraction between 0 and 1 that grows as the network gets better; see
            `AdaptiveIterativePruning`.
        score: What is scored without `monitor`: "accuracy", "agreement" or "kl"; see `AdaptiveIterativePruning`.
        max_images: Number of images to score on; None for all. Not with `monitor`.
        holdout_size_bytes: Largest size of the hold-out, which is kept in each device's memory, in bytes. The default
            is 4 GiB.
        gradient_batches: Number of batches for criteria that need gradients, and for `batchnorm="correct"` and
            `compensation`, 1 or more.
        calibration_dataloader: Source of these batches; see `AdaptiveIterativePruning`.
        model_attribute: Where the LightningModule holds the network: "net", or a path such as "model.backbone" or
            "nets.0".

    Attributes:
        config: The settings of the search.
        result: What the search found, as a `pruning.PrimeSVTResult`; None before. A checkpoint holds it.

    Raises:
        ValueError: If an argument is out of range or contradicts another one, or `monitor` has the name of a loss or an
            error; when the fit begins, if the network, its optimizer, the data, the strategy, the precision or another
            callback does not go with pruning, if `monitor` is not between 0 and 1, or if another callback or a
            scheduler monitors the same name with mode="min"; when the
            search begins, if the network does not spike, or no rates up to `max_sparsity` save `min_memory_saving`.
        TypeError: If `config` and an argument that it replaces are both given.
        AttributeError: When the fit begins, if the module has no network at `model_attribute`.
        UnsupportedNetworkError: When the fit begins, if no adapter covers the network.
    """

    callback_name = "PrimeSVT"
    config: PrimeSVTConfig
    resumed_arguments = ResumedArguments(
        settled=(
            *(field.name for field in fields(PrimeSVTConfig)),
            "start_epoch",
            "monitor",
            "score",
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
        audit: float = 0.0,
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
        compensation: Literal["none", "bias", "ridge", "second_order"] = "none",
        config: PrimeSVTConfig | None = None,
        start_epoch: int = 0,
        evaluation_cache: str | Path | None = None,
        monitor: str | None = None,
        score: Literal["accuracy", "agreement", "kl"] = "accuracy",
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
            score=score,
            max_images=max_images,
            holdout_size_bytes=holdout_size_bytes,
            gradient_batches=gradient_batches,
            calibration_dataloader=calibration_dataloader,
            model_attribute=model_attribute,
        )
        self.config = config_of(PrimeSVTConfig, config, given)
        self._refuse_unsplittable()
        self.evaluation_cache = optional(path, "evaluation_cache", evaluation_cache)
        if self.evaluation_cache is not None and self._predicts_itself and fingerprint_of(self.predict) is None:
            raise ValueError(
                f"evaluation_cache: nothing tells {type(self).__name__}.predict from another predict; give it a name "
                "that changes whenever its answers change, below its definition: predict.fingerprint = 'version 1'"
            )
        self.result: PrimeSVTResult | None = None

    def should_prune(self, epoch: int) -> bool:
        """Decides whether the search runs before an epoch. Override it for another moment.

        Args:
            epoch: The epoch, counted from 0.

        Returns:
            Whether it does; once the search is over, the answer has no effect.
        """
        return epoch >= self.start_epoch

    def on_progress(self, trainer: Trainer, progress: PrimeProgress) -> None:
        """Does nothing; is called after each candidate, for a display of your own.

        Args:
            trainer: The trainer of the fit.
            progress: The candidate, and how far the search is.
        """

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
        if self.config.batchnorm == "correct" or needs_calibration(self.config.space(self._network(module))):
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
        audit = outcome.audit
        if audit is not None:
            values |= {"audit_lost": audit.lost_points, "optimism": audit.optimism_points}
        log_search(module, values)
        rank_zero_info(f"PrimeSVT: {outcome.summary()}" + ("" if audit is None else f"; audit: {audit}"))
