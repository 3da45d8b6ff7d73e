"""Writes the report of a fit beside its checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.models._features import FeatureDictNet, FeatureGetterNet
from torch import Tensor, nn

from swincompress_pl.arguments import flag, integer
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.report.callback import search_data_of, searches_of
from swincompress_pl.report.curves import TrainingCurves
from swincompress_pl.report.environment import describe_environment
from swincompress_pl.report.fit_stages import Snapshots, measure_networks, spaced_images
from swincompress_pl.report.record import RunRecord
from swincompress_pl.report.stages import TestImages
from swincompress_pl.report.write import HTML_FILE, write_report


class CompressionReport(TrainingCurves):
    """Writes a report when a fit ends: its curves, the pruning search, and the network before and after.

    The report is report.html, report.md, report.json and the plots. The stages are the network before it was changed
    ("float"), after pruning ("pruned"), and as integers in the engine ("engine"). They are measured on a bounded number
    of test images of the datamodule, evenly spaced. The last stage is the network of the best checkpoint if the module
    is a `CompressibleClassifier`, and otherwise the network as the fit left it.

    The fit goes on as it would without this callback. While it runs, a copy of the network is kept in the CPU's memory
    for each stage. What cannot be measured is left out, and a note in the report says why: without test images, without
    a datamodule of this package, or with several processes there are no accuracies. An error while the report is made
    is a warning.

    Args:
        save_dir: Folder of the report. None for the folder of the checkpoints, or without any for the logger's folder
            or `default_root_dir`.
        name: Title of the report; None for one of the network's and the data's names.
        images: Test images that the stages are measured on, at most; 0 measures no accuracy.
        checked_images: Of these, the images on which the NumPy reference and the torch twin check the engine's
            integers, 1 or more. Both are slow.
        latency: Whether to measure the latency of the engine, and of the float network in torch and onnxruntime. It
            takes a minute or more.
        model_attribute: Where the LightningModule holds the network: "net", or a path such as "model.backbone".
        train_loss: Name of the logged training loss.
        val_loss: Name of the logged validation loss.
        val_accuracy: Name of the logged validation accuracy.

    Raises:
        ValueError: If a number is outside its range.
        NotADirectoryError: At the start of a fit, if `save_dir` is a file.
    """

    def __init__(
        self,
        save_dir: str | Path | None = None,
        *,
        name: str | None = None,
        images: int = 256,
        checked_images: int = 4,
        latency: bool = False,
        model_attribute: str = "net",
        train_loss: str = "train/loss",
        val_loss: str = "val/loss",
        val_accuracy: str = "val/top1",
    ) -> None:
        super().__init__(
            model_attribute=model_attribute, train_loss=train_loss, val_loss=val_loss, val_accuracy=val_accuracy
        )
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.name = name
        self.images = integer("images", images, least=0)
        self.checked_images = integer("checked_images", checked_images, least=1)
        self.latency = flag("latency", latency)
        self._snapshots = Snapshots()
        self._notes: list[str] = []
        self._input_shape: list[int] | None = None
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks `save_dir` before the first epoch."""
        if stage == "fit" and self.save_dir is not None and self.save_dir.exists() and not self.save_dir.is_dir():
            raise NotADirectoryError(f"save_dir={self.save_dir} is a file; name a directory for {HTML_FILE}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the network before the first epoch."""
        super().on_train_start(trainer, pl_module)
        self._notes, self._trained = [], False
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._snapshots = Snapshots()
        self._take(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the shape of an input."""
        if self._input_shape is None:
            images = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
            self._input_shape = [1, *images.shape[1:]] if isinstance(images, Tensor) and images.ndim > 1 else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the epoch to the curves, and copies the network unless it is quantized."""
        super().on_train_epoch_end(trainer, pl_module)
        self._trained = True
        self._take(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report on rank zero."""
        if trainer.is_global_zero and self._trained and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with torch.random.fork_rng(devices=[]):
                self._part("writing the report", lambda: self._write(trainer, pl_module))
        self._snapshots.networks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the curves, and what the network cost in stages that are over."""
        return super().state_dict() | {"costs": copy.deepcopy(self._snapshots.costs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the curves and the costs of earlier stages.

        Args:
            state_dict: What `state_dict()` gave.
        """
        super().load_state_dict(state_dict)
        self._snapshots = Snapshots(costs=copy.deepcopy(state_dict.get("costs", {})))

    # Mechanism.

    def _take(self, trainer: Trainer, module: LightningModule) -> None:
        network = self._network(module)
        if network is not None and trainer.is_global_zero:
            self._part("copying the network", lambda: self._snapshots.take(network, self._input_shape))

    def _part(self, what: str, do: Callable[[], object]) -> None:
        """Does a part of the report; an error is a warning and a note, because it must not end a fit."""
        try:
            do()
        except Exception as error:
            note = f"{what} failed: {type(error).__name__}: {error}"
            if note not in self._notes:
                self._notes.append(note)
                rank_zero_warn(f"CompressionReport: {note}")

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        record = RunRecord(
            name=self.name or _title(trainer, self._network(module)),
            environment=describe_environment(threads=torch.get_num_threads()),
            training=self.epochs,
        )
        self._part("adding the pruning search", lambda: _add_search(record, trainer))
        self._part("measuring the network", lambda: self._measure(record, trainer, module))
        record.notes += [note[0].upper() + note[1:] + "." * (not note.endswith(".")) for note in self._notes]
        folder = self.save_dir or _folder(trainer)
        write_report(record, folder)
        rank_zero_info(f"report: {folder / HTML_FILE}")

    def _measure(self, record: RunRecord, trainer: Trainer, module: LightningModule) -> None:
        network = self._network(module)
        if network is None:
            self._notes.append(f"the module holds no network at model_attribute={self.model_attribute!r}")
            return
        last = self._last(record, trainer, module, network)
        test = self._test_images(record, trainer, last)
        if {"float", "pruned"} & self._snapshots.costs.keys() - self._snapshots.networks.keys():
            self._notes.append("the fit was resumed, so its earlier stages were not scored")
        measure_networks(
            record, self._snapshots, last, test, input_shape=self._input_shape, device=module.device,
            checked_images=self.checked_images, latency=self.latency,
        )  # fmt: skip
        if test is not None and isinstance(last, QuantizedNetwork) and not self.latency:
            self._notes.append("latency was not compared with other runtimes; `swincompress bench` does that")

    def _last(self, record: RunRecord, trainer: Trainer, module: LightningModule, network: nn.Module) -> nn.Module:
        """The network of the best checkpoint if it can be loaded, else a copy of what the fit left; on the CPU."""
        path = _best_checkpoint(trainer)
        if path is not None and isinstance(module, CompressibleClassifier) and self.model_attribute == "net":
            best = type(module).load_from_checkpoint(path, map_location="cpu", distillation=None, weights_only=True)
            if isinstance(best.net, QuantizedNetwork) or not isinstance(network, QuantizedNetwork):
                record.notes.append(f"The last stage is the network of the best checkpoint, {path.name}.")
                return best.net.eval()
        record.notes.append("The last stage is the network as the fit left it.")
        return copy.deepcopy(network).cpu().eval()

    def _test_images(self, record: RunRecord, trainer: Trainer, network: nn.Module) -> TestImages | None:
        data = getattr(trainer, "datamodule", None)
        inner = network.network if isinstance(network, QuantizedNetwork) else network
        if isinstance(inner, FeatureGetterNet | FeatureDictNet):
            self._notes.append(f"nothing was scored, because {type(inner).__name__} gives feature maps and no logits")
        elif trainer.world_size > 1:
            self._notes.append(f"nothing was scored, because the fit had {trainer.world_size} processes")
        elif self.images == 0:
            self._notes.append("nothing was scored, because images=0")
        elif not hasattr(data, "dataset") or not hasattr(getattr(data, "preprocessing", None), "normalize"):
            self._notes.append("nothing was scored, because the data are not of a datamodule of swincompress_pl.data")
        else:
            try:
                test = spaced_images(data, "test", self.images)
            except (OSError, ValueError) as error:
                self._notes.append(f"nothing was scored, because there are no test images: {error}")
                return None
            record.data = f"{len(test.labels)} test images of {type(data).__name__}, evenly spaced"
            return test
        return None


def _title(trainer: Trainer, network: nn.Module | None) -> str:
    inner = network.network if isinstance(network, QuantizedNetwork) else network
    data = getattr(trainer, "datamodule", None)
    on = "" if data is None else f" on {type(data).__name__}"
    return f"Fit of {type(inner).__name__ if inner is not None else 'a network'}{on}"


def _add_search(record: RunRecord, trainer: Trainer) -> None:
    """Adds the search of the one callback that had one; that of PrimeSVT is a note."""
    for callback in searches_of(trainer):
        if hasattr(callback, "search_state"):
            found = search_data_of(callback)
            if found is not None and record.pruning is None:
                record.add_pruning(found)
        elif callback.result is not None:
            result = callback.result
            audit = "" if result.audit is None else f"; audit: {result.audit}"
            record.notes.append(f"PrimeSVT, on the hold-out, before fine-tuning: {result.summary()}{audit}.")


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]


def _best_checkpoint(trainer: Trainer) -> Path | None:
    """The first checkpoint that was chosen by a metric, or else the first one that was written."""
    written = [each for each in _checkpoints(trainer) if each.best_model_path and Path(each.best_model_path).is_file()]
    chosen = [each for each in written if each.monitor is not None] or written
    return Path(chosen[0].best_model_path) if chosen else None


def _folder(trainer: Trainer) -> Path:
    """The folder of the checkpoints, or without any that of the logger, or the root."""
    folders = [each.dirpath for each in _checkpoints(trainer) if each.dirpath]
    return Path(folders[0] if folders else trainer.log_dir or trainer.default_root_dir)
