"""The whole job in a few minutes on scikit-learn's digits: train, prune, quantize, export, run in integers, report.

Nothing is downloaded: the 1,797 handwritten digits come with scikit-learn. A first `fit` trains the float network, and
a second one compresses it with the callbacks. The report is measured on the 360 test images, which no decision has
used.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from swincompress_pl import accel
from swincompress_pl.callbacks import (
    AdaptiveIterativePruning,
    CompressedCheckpoint,
    PrimeSVT,
    QuantizationAwareTraining,
)
from swincompress_pl.data import Digits, ShiftRotate
from swincompress_pl.models import CompressibleClassifier, DistillationConfig, OptimizationConfig
from swincompress_pl.progress import ReportProgress, progress_bar
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.report import RunRecord, TrainingCurves, TrainingEpoch, describe_environment, write_report
from swincompress_pl.report.stages import TestImages, measure_latency, measure_run

IMAGE = (1, 3, 32, 32)
_MEASURING_STEPS = 6  # of the bar: what measuring takes, in epochs


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The epochs of the demo's two fits.

    Attributes:
        float_epochs: Epochs of the fit in float, above 0.
        quantize_epoch: Epoch of the second fit from which the network is quantized; pruning comes before.
        epochs: Epochs of the second fit, above `quantize_epoch`.
        target: Part of the multiply-accumulates to remove, if the tolerance allows it, in (0, 1). Only the model "swin"
            uses it.

    Raises:
        ValueError: If `float_epochs` is not above 0, or `quantize_epoch` is not between 0 and `epochs`.
    """

    float_epochs: int = 22
    quantize_epoch: int = 9
    epochs: int = 13
    target: float = 0.45

    def __post_init__(self) -> None:
        if not (self.float_epochs > 0 and 0 < self.quantize_epoch < self.epochs):
            raise ValueError(
                f"float_epochs={self.float_epochs}, quantize_epoch={self.quantize_epoch}, epochs={self.epochs}: "
                "the first must be above 0, the second between 0 and the third"
            )


def _round_robin(plan: Schedule) -> Callback:
    """The round-robin search; its tolerance is four of 180 hold-out images, which later epochs win back."""
    return AdaptiveIterativePruning(
        tolerance=2.3, step=0.15, target=plan.target, max_rounds=max(1, plan.quantize_epoch - 2)
    )


def _single_shot(plan: Schedule) -> Callback:
    """PrimeSVT before the first epoch; widths go in steps of four, because the network is narrow."""
    return PrimeSVT(tolerance=3.0, min_memory_saving=0.25, round_to=4)


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """A network of the demo.

    Attributes:
        title: Its name in the report.
        name: Its name for `create_model`.
        arguments: Its arguments for `create_model`.
        schedule: How long it is trained.
        pruning: Makes the callback that prunes it.
    """

    title: str
    name: str
    arguments: Mapping[str, Any]
    schedule: Schedule
    pruning: Callable[[Schedule], Callback]


MODELS = {
    "swin": DemoModel(
        title="small Swin",
        name="SwinTransformer",
        arguments={
            "img_size": IMAGE[2],
            "patch_size": 8,  # 2 x 2 pixels of the original 8 x 8 image
            "window_size": 2,
            "embed_dim": 64,
            "depths": [2, 2],
            "num_heads": [4, 8],
            "drop_path_rate": 0.0,
        },
        schedule=Schedule(),
        pruning=_round_robin,
    ),
    "spikformer": DemoModel(
        title="small Spikformer",
        name="Spikformer",
        arguments={
            "T": 2,
            "img_size_h": IMAGE[2],
            "img_size_w": IMAGE[3],
            "patch_size": 4,
            "embed_dims": 48,
            "num_heads": 4,
            "depths": 1,
        },
        schedule=Schedule(float_epochs=24, quantize_epoch=4, epochs=8),
        pruning=_single_shot,
    ),
}


@dataclass
class EpochProgress(Callback):
    """Moves the demo's one bar at the end of every epoch.

    Attributes:
        report: What shows the progress.
        what: What is being done.
        before: Steps of the bar before the first epoch.
        total: Steps of the bar.
    """

    report: ReportProgress
    what: str
    before: int
    total: int

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows what begins."""
        self.report(self.what, self.before, self.total)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the epochs that are done, and the loss."""
        loss = trainer.callback_metrics.get("train/loss")
        detail = "" if loss is None else f"loss {loss:.2f}"
        self.report(self.what, self.before + trainer.current_epoch + 1, self.total, detail)


@dataclass
class PrunedSnapshot(Callback):
    """Keeps a copy of the network between pruning and quantization.

    Attributes:
        quantize_epoch: Epoch from which the network is quantized.
        network: The copy, in eval mode; None before.
    """

    quantize_epoch: int
    network: nn.Module | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the network at the end of the last epoch before quantization."""
        if trainer.current_epoch == self.quantize_epoch - 1:
            assert isinstance(pl_module, CompressibleClassifier)
            self.network = copy.deepcopy(pl_module.net).eval()


def run(
    output: str | Path,
    *,
    model: str = "swin",
    seed: int = 0,
    threads: int | None = None,
    schedule: Schedule | None = None,
) -> Path:
    """Runs the demo.

    Args:
        output: Directory for the checkpoint, the artifact and the report; it is made if needed.
        model: "swin", which is pruned round by round, or "spikformer", a spiking network, which PrimeSVT prunes.
        seed: Decides the splits and all random numbers.
        threads: Threads of training and measurement; None for as many as torch uses.
        schedule: Epochs of the two fits; None for those of the model.

    Returns:
        The path of the report, `output`/report.md.

    Raises:
        ValueError: If the model is unknown, or the seed is below 0.
        FileExistsError: If `output` is a file.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; choose one of {', '.join(MODELS)}")
    console, chosen = Console(), MODELS[model]
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    plan = schedule or chosen.schedule
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)

    data = Digits(seed=seed, augmentation=ShiftRotate(shift_px=2, rotation_deg=10.0))
    lightning.seed_everything(seed, verbose=False)
    console.print(
        f"[bold]1. Train[/] a {chosen.title} on {data.num_classes} digits, {plan.float_epochs} epochs in float\n"
        f"[bold]2. Compress[/] it: prune and quantize in one fit of {plan.epochs} epochs\n"
        "[bold]3. Measure[/] it beside the uncompressed network in torch and onnxruntime (where installed)"
    )
    with progress_bar() as progress:
        record = _work(chosen, data, plan, directory, threads, progress)
    report = write_report(record, directory)
    _summary(console, record, report)
    return report


def _work(
    chosen: DemoModel, data: Digits, plan: Schedule, directory: Path, threads: int, progress: ReportProgress
) -> RunRecord:
    """Trains, compresses and measures; returns what was found."""
    trained, compressed_at = plan.float_epochs, plan.float_epochs + plan.epochs
    total = compressed_at + _MEASURING_STEPS
    weights = _train(chosen, data, plan, directory, EpochProgress(progress, "training in float", 0, total))
    compressing = EpochProgress(progress, "pruning and quantizing", trained, total)
    compressed = _compress(chosen, data, plan, directory, weights, compressing)
    progress("measuring", compressed_at, total)
    # The file is enough, because the checkpoint records how its network was pruned and quantized.
    module = CompressibleClassifier.load_from_checkpoint(compressed.checkpoint, distillation=None).eval()
    artifact = accel.export(module, directory / "model.safetensors")
    assert isinstance(module.net, QuantizedNetwork)
    record = _new_record(chosen, compressed, threads)
    before = _network(chosen, data, weights).net.eval()
    networks = {"float": before, "pruned": compressed.pruned}
    test = TestImages.of(data.uint8_batches("test"), data.preprocessing.normalize)
    measure_run(record, test, networks=networks, quantized=module.net, artifact=artifact, threads=threads)
    progress("measuring the latency", compressed_at + 2, total)
    measure_latency(record, before, artifact, threads)
    return record


@dataclass(frozen=True, kw_only=True)
class _Compressed:
    checkpoint: Path
    pruned: nn.Module
    search: dict[str, Any] | None
    tolerance: float | None
    notes: list[str]
    epochs: list[TrainingEpoch]


def _new_record(model: DemoModel, compressed: _Compressed, threads: int) -> RunRecord:
    record = RunRecord(
        name=f"swincompress demo: a {model.title} on handwritten digits",
        environment=describe_environment(threads=threads),
        data="scikit-learn's digits, 32 x 32 pixels: the 360 images of the test split",
        notes=list(compressed.notes),
        training=compressed.epochs,
    )
    if compressed.search is not None:
        record.add_pruning(compressed.search, tolerance=compressed.tolerance)
    return record


def _network(model: DemoModel, data: Digits, weights: Path | None = None, **options: Any) -> CompressibleClassifier:
    return CompressibleClassifier(
        model=model.name,
        num_classes=data.num_classes,
        model_kwargs=dict(model.arguments),
        checkpoint_path=weights,
        **options,
    )


def _trainer(directory: Path, epochs: int, callbacks: list[Callback], **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=directory,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # the demo has one bar for all
        **options,
    )


def _train(model: DemoModel, data: Digits, plan: Schedule, directory: Path, progress: Callback) -> Path:
    """Trains the float network to the end of its schedule; returns the path of its weights."""
    optimization = OptimizationConfig(lr=2e-3, weight_decay=0.05, warmup_epochs=3)
    module = _network(model, data, optimization=optimization, label_smoothing=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _trainer(
            directory, plan.float_epochs, [progress], enable_checkpointing=False, check_val_every_n_epoch=5
        )
        trainer.fit(module, data)
    weights = directory / "float.safetensors"
    save_file(module.net.state_dict(), weights)
    return weights


def _compress(
    model: DemoModel, data: Digits, plan: Schedule, directory: Path, weights: Path, progress: Callback
) -> _Compressed:
    """Prunes, fine-tunes and quantizes in one fit, with distillation from the float network."""
    module = _network(
        model,
        data,
        weights,
        optimization=OptimizationConfig(lr=1e-3, weight_decay=0.05, warmup_epochs=1),
        label_smoothing=0.1,
        distillation=DistillationConfig(weight=0.5, temperature=2.0),
    )
    snapshot, curves = PrunedSnapshot(plan.quantize_epoch), TrainingCurves()
    pruning = model.pruning(plan)
    best = CompressedCheckpoint(
        dirpath=directory, filename="best", monitor="val/top1", mode="max", enable_version_counter=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = QuantizationAwareTraining(start_epoch=plan.quantize_epoch)
        _trainer(directory, plan.epochs, [snapshot, curves, pruning, quantization, best, progress]).fit(module, data)
    assert snapshot.network is not None
    found = _Compressed(
        checkpoint=Path(best.best_model_path), pruned=snapshot.network, search=None, tolerance=None, notes=[],
        epochs=curves.epochs,
    )  # fmt: skip
    if isinstance(pruning, AdaptiveIterativePruning) and pruning.search_state is not None:
        return replace(found, search=pruning.search_state.to_dict(), tolerance=pruning.config.tolerance)
    if isinstance(pruning, PrimeSVT) and pruning.result is not None:
        return replace(found, notes=[f"PrimeSVT, on the hold-out, before fine-tuning: {pruning.result.summary()}."])
    return found


def _summary(console: Console, record: RunRecord, report: Path) -> None:
    stages = {stage.name: stage for stage in record.stages}
    before, after = stages["float"], stages["engine"]
    macs = [stage.macs or 0 for stage in (before, after)]
    file_bytes = [(stage.size.file_bytes or 0) if stage.size else 0 for stage in (before, after)]
    console.print(f"   accuracy  {before.accuracy}  ->  {after.accuracy} in the engine")
    console.print(
        f"   MACs      {macs[0] / 1e6:.2f} M  ->  {macs[1] / 1e6:.2f} M  ({1 - macs[1] / macs[0]:.1%} removed)"
    )
    share = file_bytes[1] / file_bytes[0]
    console.print(f"   file      {file_bytes[0]:,}  ->  {file_bytes[1]:,} bytes  ({share:.1%})")
    for stage in (before, after):
        for name, latency in stage.latency_ms.items():
            console.print(f"   latency   {name}: {latency}")
    for check in record.checks:
        console.print(f"   {'passed' if check.passed else '[bold red]FAILED[/]'}    {check.name} ({check.detail})")
    console.print(f"[bold]Report:[/] {report}")
