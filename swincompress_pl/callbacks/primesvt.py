"""PrimeSVT before an epoch of a fit, which then trains what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from swincompress_pl.callbacks.progress import search_progress
from swincompress_pl.callbacks.random_state import seeded
from swincompress_pl.callbacks.scoring import training_batches
from swincompress_pl.callbacks.search import Outcome, SearchCallback, log_search, refuse_unknown
from swincompress_pl.callbacks.searched_network import ScalesFollower
from swincompress_pl.pruning import PrimeProgress, PrimeSVTConfig, PrimeSVTResult, RoundRobinConfig, Scorer, primesvt


class PrimeSVT(SearchCallback):
    """Prunes the spiking `module.<model_attribute>` once, in a single shot, before epoch `start_epoch`.

    PrimeSVT (arXiv 2606.03428): see `pruning.primesvt`. The epochs that follow fine-tune what is left, with the
    optimizer's state cut along; in mode "paper" zeros stay zeros.

    max_accuracy_drop: in points on the hold-out, above 0 and at most 100. min_memory_saving: part of all parameters,
    0 to below 1. mode: "group" (units go physically) or "paper" (zeros in every filter).
    start_epoch: 0 is for a network with trained weights. memo: a file that keeps every verdict, so that a search that
    was killed goes on where it was. on_progress: override it for a display of one's own.
    monitor, max_images, holdout_size_bytes, gradient_batches, model_attribute: as in `AdaptiveIterativePruning`;
    gradient_batches are also those on which `batchnorm="reestimate"` corrects the statistics.
    search: any other field of `swincompress_pl.pruning.PrimeSVTConfig`: round_to, kinds, batchnorm, policy, ...

    The hold-out is the datamodule's `holdout_dataloader()`, or else the trainer's validation data. Logs pruning/score,
    pruning/baseline, pruning/saving, pruning/parameters, pruning/images_scored and pruning/macs to every logger.
    `result` is what was found (`PrimeSVTResult`); it is in the checkpoint. Where the constraints cannot both be met, a
    warning says so and `prefer` decides what is applied.
    One device or DDP; FSDP and DeepSpeed, EMA and SWA are refused by name.

    Example: `Trainer(callbacks=[PrimeSVT(max_accuracy_drop=3.0, min_memory_saving=0.25)])`
    """

    callback_name = "PrimeSVT"

    def __init__(
        self,
        *,
        max_accuracy_drop: float = 3.0,
        min_memory_saving: float = 0.25,
        mode: str = "group",
        start_epoch: int = 0,
        memo: str | Path | None = None,
        monitor: str | None = None,
        max_images: int | None = None,
        holdout_size_bytes: int = 4 << 30,
        gradient_batches: int = 8,
        model_attribute: str = "net",
        **search: Any,
    ) -> None:
        super().__init__(
            start_epoch=start_epoch,
            monitor=monitor,
            max_images=max_images,
            holdout_size_bytes=holdout_size_bytes,
            gradient_batches=gradient_batches,
            model_attribute=model_attribute,
        )
        refuse_unknown(
            self.callback_name, search, PrimeSVTConfig, own=("max_accuracy_drop", "min_memory_saving", "mode")
        )
        self.config = PrimeSVTConfig(
            max_accuracy_drop=max_accuracy_drop,
            min_memory_saving=min_memory_saving,
            mode=mode,  # type: ignore[arg-type]  # checked there
            **search,
        )
        self.memo = memo
        self.result: PrimeSVTResult | None = None

    def should_prune(self, epoch: int) -> bool:
        """Whether the search runs before `epoch` (it may be over already)."""
        return epoch >= self.start_epoch

    def on_progress(self, trainer: Trainer, progress: PrimeProgress) -> None:
        """Called after each candidate, for a display of one's own; does nothing."""

    def _granularity(self, network: nn.Module) -> RoundRobinConfig:
        return self.config.granularity(network)

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
        follower: ScalesFollower,
    ) -> PrimeSVTResult:
        done = 0
        calibration = None
        if self.config.batchnorm == "reestimate":
            with seeded(trainer.current_epoch):
                calibration = [images for images, _ in training_batches(trainer, self.gradient_batches)]
        first = len(self.config.target_sets) * len(self.config.rates)
        with search_progress(trainer, f"PrimeSVT before epoch {trainer.current_epoch}", first) as report_progress:

            def progress(now: PrimeProgress) -> None:
                nonlocal done
                done += 1
                report_progress(_text(now), done + now.total - now.done)
                self.on_progress(trainer, now)

            return primesvt(
                self._network(module),
                scorer,
                self.config,
                input_shape=shape,
                calibration=calibration,
                gradients=lambda network: self._gradients(trainer, module, network),
                memo=self.memo,
                progress=progress,
            )

    def _take(self, module: LightningModule, outcome: Outcome) -> None:
        assert isinstance(outcome, PrimeSVTResult)
        self.result = outcome
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


def _text(progress: PrimeProgress) -> str:
    found = progress.candidate
    verdict = "within" if found.accepted else "beyond"
    left = "" if progress.left_s is None else f", at most {progress.left_s:.0f} s left in this phase"
    return f"{found.label}: {found.saving:.1%} saved at {found.score:.2f} points, {verdict} the constraint{left}"
