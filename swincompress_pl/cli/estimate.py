"""`swincompress estimate`: what a fit will cost, computed from measured parts of it."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.cli import PROGRAM
from swincompress_pl.cli.common import epilog, print_json
from swincompress_pl.cli.measured_fit import (
    EpochTime,
    MakeTrainer,
    Progress,
    measure_epoch,
    measure_exchange,
    measure_search,
    peak_memory_bytes,
)
from swincompress_pl.cli.parsing import HelpFormatter
from swincompress_pl.cli.signals import EndedBySignal, ended_by_signals
from swincompress_pl.cli.train import CompressionCLI, command_line
from swincompress_pl.report.content.numbers import megabytes
from swincompress_pl.report.curves import TrainingCurves
from swincompress_pl.text_table import text_table

_DESCRIPTION = (
    "Measures a few batches of training and validation, a search on a few of its targets, and the exchange to "
    "integers. From these it computes what the whole fit will cost. Nothing is written, and no weights are kept."
)
_EXAMPLES = (
    "swincompress estimate -c configs/digits_swin.yaml",
    "swincompress estimate -c configs/swin_tiny_imagenet.yaml --data.root imagenet --devices 8",
)
_NOTE = (
    "One device was measured. For several, times are divided by their number; communication between devices is not "
    "counted. Networks get faster as they are pruned, and targets drop out of a search, so the time given for a search "
    "is an upper bound. Memory is what this process needed, without the workers that load data."
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of work in a fit.

    Attributes:
        name: What it is, such as "pruning round".
        times: How often it is done.
        seconds: Seconds each time, on one device.
        detail: What the time was computed from.
    """

    name: str
    times: float
    seconds: float
    detail: str

    @property
    def total_s(self) -> float:
        """The seconds of all times together, on one device."""
        return self.times * self.seconds


class EstimateCLI(CompressionCLI):
    """The command line of `fit`, which only makes model, data and a trainer on one device, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of `estimate`, and those of `fit` that a stored config may hold.

        Args:
            parser: The parser of the command.
        """
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--batches", type=PositiveInt, default=20, help="batches of training and of validation to measure"
        )
        parser.add_argument(
            "--devices", type=PositiveInt | None, default=None, help="devices of the fit; default: the config's"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="refused: an estimate is for a fit from its beginning"
        )
        parser.add_argument("--weights_only", type=bool | None, default=None, help="has no effect here")

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        """Makes a trainer with the settings of the config, but on one device.

        Args:
            **settings: Settings that replace those of the config.

        Returns:
            The trainer.
        """
        return super().instantiate_trainer(**settings, devices=1, num_nodes=1, strategy="auto")

    def devices(self) -> int:
        """Returns the number of devices that the fit will have, on all nodes."""
        if self.config.devices is not None:
            return int(self.config.devices)
        asked, nodes = self.config.trainer.devices, int(self.config.trainer.num_nodes)
        if isinstance(asked, str) and asked.lstrip("-").isdecimal():
            asked = int(asked)
        if isinstance(asked, str | list) and asked != "auto":
            return nodes * len(asked.split(",") if isinstance(asked, str) else asked)
        return nodes * (asked if isinstance(asked, int) and asked > 0 else max(1, torch.cuda.device_count()))


def main(name: str, arguments: Sequence[str]) -> int:
    """Measures and prints the estimate; returns 0, or 128 plus the number of the signal that ended it."""
    try:
        with ended_by_signals():
            return _estimate(name, arguments)
    except EndedBySignal as ending:
        print(f"{PROGRAM}: {name}: ended by {ending.name}; nothing was written", file=sys.stderr)
        return ending.exit_code


def _estimate(name: str, arguments: Sequence[str]) -> int:
    options = {"prog": f"{PROGRAM} {name}", "description": _DESCRIPTION, "epilog": epilog(*_EXAMPLES)}
    sys.argv[1:] = arguments  # where Lightning reads them
    cli = command_line(
        EstimateCLI,
        run=False,
        save_config_callback=None,
        parser_kwargs={**options, "formatter_class": HelpFormatter},
    )
    if cli.config.ckpt_path is not None:
        raise ValueError(
            f"ckpt_path={cli.config.ckpt_path!r}: an estimate is for a fit from its beginning; leave it out"
        )
    devices = cli.devices()
    with _without_news():
        parts = measure(
            cli.trainer, cli.instantiate_trainer, cli.model, cli.datamodule, batches=cli.config.batches, on_part=_say
        )
    memory_bytes = peak_memory_bytes(cli.trainer.strategy.root_device)
    if cli.config.json:
        rows = [asdict(part) | {"total_s": part.total_s / devices} for part in parts]
        total_s = sum(row["total_s"] for row in rows)
        print_json({"parts": rows, "devices": devices, "total_s": total_s, "memory_bytes": memory_bytes})
    else:
        _show(parts, devices, memory_bytes)
    return 0


def _say(what: str) -> None:
    """Says what is measured, where it is not in the way of the estimate."""
    print(f"measuring: {what}", file=sys.stderr, flush=True)


@contextmanager
def _without_news() -> Iterator[None]:
    """Hides Lightning's messages about each short fit, but not its warnings."""
    news = logging.getLogger("lightning.pytorch")
    level = news.level
    news.setLevel(logging.WARNING)
    try:
        yield
    finally:
        news.setLevel(level)


def measure(
    trainer: Trainer,
    make_trainer: MakeTrainer,
    module: LightningModule,
    data: LightningDataModule | None,
    *,
    batches: int,
    on_part: Progress,
) -> list[Part]:
    """Measures the parts of the fit that a trainer would do, each on one device.

    Args:
        trainer: Has the callbacks and the number of epochs; it is not used to fit.
        make_trainer: Makes trainers like it, except for the settings that are given by name.
        module: The module; copies are trained, and it stays as it is.
        data: The datamodule, or None.
        batches: Number of batches of training and of validation to measure, 1 or more.
        on_part: Called with what is measured next.

    Returns:
        The parts of the fit.

    Raises:
        ValueError: If the fit has no end, or the length of an epoch is unknown.
    """

    def quiet(callbacks: list[Callback], **settings: Any) -> Trainer:
        return make_trainer(**settings, **_QUIET, callbacks=callbacks)

    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    beside = [each for each in callbacks if not isinstance(each, _NOT_MEASURED_WITH)]
    beside = copy.deepcopy(beside)
    epoch = measure_epoch(quiet, module, data, batches=batches, on_part=on_part, callbacks=beside)
    epochs = _epochs(trainer, epoch)
    quantizers = [each for each in callbacks if isinstance(each, QuantizationAwareTraining)]
    parts: list[Part] = []
    for search in callbacks:
        if isinstance(search, AdaptiveIterativePruning | PrimeSVT):
            parts += _search(search, epochs, quiet, module, data, on_part)
    quantized = [number for number in range(epochs) if any(each.should_quantize(number) for each in quantizers)]
    parts = [*_of_epochs("float", epochs - len(quantized), trainer, epoch), *parts]
    if quantized:
        exchange_s, later = measure_exchange(quiet, module, data, quantizers[0], batches=batches, on_part=on_part)
        images = f"{quantizers[0].calibration_images} images, method {quantizers[0].method!r}"
        parts.append(Part(name="exchange to integers", times=1, seconds=exchange_s, detail=images))
        parts += _of_epochs("quantized", len(quantized), trainer, later)
    return parts


# Nothing is written or shown, and what changes the network is measured separately.
_QUIET: Mapping[str, Any] = {
    "max_steps": -1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
_NOT_MEASURED_WITH = (
    Checkpoint,
    ModelSummary,
    ProgressBar,
    AdaptiveIterativePruning,
    PrimeSVT,
    QuantizationAwareTraining,
    TrainingCurves,
)


def _epochs(trainer: Trainer, epoch: EpochTime) -> int:
    """The number of epochs that `trainer` would train."""
    limits = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    if trainer.max_steps >= 0:
        steps = math.ceil(epoch.training_batches / trainer.accumulate_grad_batches)
        limits.append(math.ceil(trainer.max_steps / steps))
    if not limits:
        raise ValueError(
            f"max_epochs={trainer.max_epochs}: a fit without an end has no cost; give --trainer.max_epochs"
        )
    return min(limits)


def _of_epochs(name: str, count: int, trainer: Trainer, epoch: EpochTime) -> list[Part]:
    passes = count * _validations(trainer, epoch)
    training, validation = f"{epoch.training_batches:,} batches", f"{epoch.validation_batches:,} batches"
    parts = [
        Part(name=f"training epoch, {name}", times=count, seconds=epoch.training_s, detail=training),
        Part(name=f"validation, {name}", times=passes, seconds=epoch.validation_s, detail=validation),
    ]
    return [part for part in parts if part.times and part.seconds]


def _validations(trainer: Trainer, epoch: EpochTime) -> float:
    """The number of passes of validation per epoch."""
    interval = trainer.val_check_interval
    per_epoch = 1 / interval if isinstance(interval, float) else epoch.training_batches / interval
    every = trainer.check_val_every_n_epoch
    return per_epoch if every is None else max(1.0, math.floor(per_epoch)) / every


def _search(
    search: AdaptiveIterativePruning | PrimeSVT,
    epochs: int,
    make_trainer: MakeTrainer,
    module: LightningModule,
    data: LightningDataModule | None,
    on_part: Progress,
) -> list[Part]:
    times = sum(search.should_prune(number) for number in range(epochs))
    name = "pruning round"
    if isinstance(search, PrimeSVT):
        times, name = min(times, 1), "PrimeSVT search"
    elif search.config.max_rounds is not None:
        times = min(times, search.config.max_rounds)
    if not times:
        return []
    found = measure_search(make_trainer, module, data, search, on_part=on_part)
    detail = f"{found.targets} targets, {found.measured} measured"
    return [Part(name=name, times=times, seconds=found.total_s, detail=detail)]


def _show(parts: Sequence[Part], devices: int, memory_bytes: int) -> None:
    rows = []
    for part in parts:
        each, total = (_duration(seconds / devices) for seconds in (part.seconds, part.total_s))
        rows.append([part.name, part.detail, f"{part.times:g}", each, total])
    print(text_table(["part", "measured on", "times", "each", "in all"], rows, text=2))
    whole = _duration(sum(part.total_s for part in parts) / devices)
    on = "1 device" if devices == 1 else f"{devices} devices"
    print(f"The whole fit: {whole} on {on}; memory {megabytes(memory_bytes)}.\n{_NOTE}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
