"""The LightningModule that trains, validates and tests a network, compressed or not."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from swincompress_pl.arguments import integer, number
from swincompress_pl.checkpoint.holder import float_network, has_network, network_of
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.checkpoint.record import CompressionRecord
from swincompress_pl.history import class_names_of, creation_of, set_class_names
from swincompress_pl.models.changes import changes_since_creation
from swincompress_pl.models.factory import create_model
from swincompress_pl.models.stored_arguments import is_restoring, restoring, without_sources
from swincompress_pl.models.training import (
    DistillationConfig,
    MixingConfig,
    OptimizationConfig,
    as_config,
    decay_groups,
    distillation_loss,
    warmup_cosine,
)
from swincompress_pl.quant.preprocessing import described_preprocessing
from swincompress_pl.stored_data import from_plain, reading

Batch = tuple[Tensor, Tensor]  # (N, 3, H, W) float, (N,) int64


class CompressibleClassifier(CompressionMixin, LightningModule):
    """Trains a network as a classifier. Callbacks compress it, and CompressionMixin restores it.

    A checkpoint holds only plain data and tensors. Loading it needs nothing else: neither the initial weights nor the
    data. The module logs train/loss, val/loss, val/top1, test/loss, test/top1 and, with more than 5 classes, val/top5
    and test/top5.

    Args:
        model: Name of the network; see `create_model`. Checkpoints hold the name and the arguments of the architecture
            that was found.
        num_classes: Number of classes, 2 or more.
        model_kwargs: Other arguments of `create_model`, such as `pretrained` or those of the network, as plain data.
        checkpoint_path: File with initial weights; see `create_model`.
        optimization: Options of AdamW and its schedule.
        label_smoothing: Part of each label that is spread over all classes, 0 or more and below 1.
        mixing: Options of Mixup and CutMix; the default mixes nothing.
        distillation: Options of the distillation from the uncompressed network; None for no teacher. Checkpoints then
            hold the teacher's weights too, so that a resumed fit has the same teacher. Load one with
            `distillation=None` to leave them out.

    Attributes:
        net: The network. It may be replaced, or change its parameters, at any time (pruning, quantization).
        input_description: {"preprocessing": mapping, "class_names": list} of the data that the module was last attached
            to, without class_names if the data names none; {} before. Checkpoints hold it.
        teacher: The network that teaches, a frozen copy of `net`; None without distillation.
        teacher_taken: Whether the teacher was taken, so that its loss counts.

    Raises:
        ValueError: If an argument is out of range, or `create_model` refuses one.
        TypeError: If the network does not take the `model_kwargs`.
        FileNotFoundError: If there is no file at `checkpoint_path`.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        model_kwargs: dict[str, Any] | None = None,
        checkpoint_path: str | Path | None = None,
        optimization: OptimizationConfig = OptimizationConfig(),
        label_smoothing: float = 0.0,
        mixing: MixingConfig = MixingConfig(),
        distillation: DistillationConfig | None = None,
    ) -> None:
        super().__init__()
        num_classes = integer("num_classes", num_classes, least=2)
        label_smoothing = number("label_smoothing", label_smoothing, lambda x: 0 <= x < 1, "0 or more and below 1")
        model_kwargs = from_plain(dict[str, Any] | None, model_kwargs, "model_kwargs")
        if "num_classes" in (model_kwargs or {}):
            raise ValueError("model_kwargs holds num_classes; give it as the argument num_classes only.")
        self.optimization = as_config(OptimizationConfig, optimization)
        self.mixing = as_config(MixingConfig, mixing)
        self.distillation = None if distillation is None else as_config(DistillationConfig, distillation)
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.input_description: dict[str, Any] = {}

        if is_restoring():
            model_kwargs = without_sources(model, {**(model_kwargs or {}), "checkpoint_path": checkpoint_path})
            checkpoint_path = None
        self.net = create_model(model, num_classes=num_classes, checkpoint_path=checkpoint_path, **(model_kwargs or {}))
        published = any((model_kwargs or {}).get(key) for key in ("pretrained", "weights"))
        self._random_start = checkpoint_path is None and not published
        self._create_teacher()
        self._create_metrics()
        creation = creation_of(self.net)
        assert creation is not None  # create_model notes it
        # Plain data, so that a checkpoint loads with weights_only, and without what only gave the initial weights:
        # loading a checkpoint must neither download nor look for a file that is gone.
        self.save_hyperparameters(
            {
                "model": creation["name"],
                "num_classes": num_classes,
                "model_kwargs": {k: v for k, v in creation["kwargs"].items() if k != "num_classes"},
                "checkpoint_path": None,
                "optimization": dataclasses.asdict(self.optimization),
                "label_smoothing": label_smoothing,
                "mixing": dataclasses.asdict(self.mixing),
                "distillation": None if self.distillation is None else dataclasses.asdict(self.distillation),
            }
        )

    @_restricted_classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: N805  # a class method of Lightning's
        """Loads a checkpoint as any LightningModule does, and never fetches initial weights.

        Args:
            *args: Positional arguments of `LightningModule.load_from_checkpoint`.
            **kwargs: Keyword arguments of it.

        Returns:
            The module, with its network compressed as it was.

        Raises:
            ValueError: If the checkpoint's arguments or its record of the compression are damaged or unknown.
        """
        with restoring(), reading("the checkpoint's hyper_parameters", passing=(ValueError, RuntimeError)):
            return super().load_from_checkpoint(*args, **kwargs)

    def _create_metrics(self) -> None:
        ranks = [1, 5] if self.num_classes > 5 else [1]
        accuracies: dict[str, Any] = {
            f"top{k}": MulticlassAccuracy(num_classes=self.num_classes, top_k=k, average="micro") for k in ranks
        }
        self.val_metrics = MetricCollection(accuracies, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def _create_teacher(self) -> None:
        # A module from the start, with the uncompressed shapes whatever becomes of `net`. So Lightning saves, restores
        # and moves it, and a resumed fit has the same teacher.
        self.teacher: nn.Module | None = None
        self.teacher_taken = False
        self._teacher_untrained = False
        if self.distillation is not None:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Runs the network.

        Args:
            x: Normalized images (N, 3, H, W).

        Returns:
            Logits (N, num_classes).
        """
        logits: Tensor = self.net(x)
        return logits

    def setup(self, stage: str) -> None:
        """Takes the description of the input from the datamodule, if there is one that describes it.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: If the data has another number of classes or an invalid `preprocessing`, or the network was
                changed in a way that no checkpoint could rebuild.
        """
        super().setup(stage)
        if stage == "fit":
            self._changes()
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise ValueError(
                f"the data has {classes} classes, the model num_classes={self.num_classes}; make them equal."
            )
        if getattr(data, "preprocessing", None) is not None:
            self.input_description = _description_of(data)
        # Here, and not when the epoch starts, because callbacks may compress before that. On a resume this is
        # preliminary: Lightning loads the checkpoint, and with it the teacher, after `setup`.
        starts_now = stage == "fit" and self.distillation is not None and self.distillation.start_epoch == 0
        if starts_now and not self.teacher_taken and self._fits_teacher():
            self.take_teacher()

    def train(self, mode: bool = True) -> CompressibleClassifier:
        """Sets the mode as for any module, but leaves the teacher in evaluation.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            The module itself.
        """
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_fit_start(self) -> None:
        """Refuses a teacher that was never trained, before any work; a resumed fit has loaded its teacher by now.

        Raises:
            ValueError: If the teacher was taken already and has its random initial weights.
        """
        super().on_fit_start()
        if not self.trainer.strategy.restore_checkpoint_after_setup:  # as FSDP does, so the teacher may still come
            self._refuse_untrained_teacher()

    def on_train_epoch_start(self) -> None:
        """Takes the teacher when its epoch has come.

        Raises:
            ValueError: If the teacher has its random initial weights, or the network is compressed already.
        """
        super().on_train_epoch_start()
        if self.distillation is None or self.current_epoch < self.distillation.start_epoch:
            return
        if not self.teacher_taken:
            self.take_teacher()
        self._refuse_untrained_teacher()

    def take_teacher(self) -> None:
        """Makes the network as it is now the teacher.

        Raises:
            ValueError: If there is no distillation, or the network is compressed already.
        """
        if self.teacher is None:
            raise ValueError("take_teacher: there is no teacher; construct the classifier with a DistillationConfig.")
        if not self._fits_teacher():
            raise ValueError(
                f"distillation: at epoch {self.current_epoch} the network is compressed already and cannot be its own "
                f"teacher; choose a start_epoch before the first compression."
            )
        now, initial = self.net.state_dict(), self.teacher.state_dict()
        self._teacher_untrained = self._random_start and all(torch.equal(now[key], initial[key]) for key in now)
        self.teacher.load_state_dict(now)
        self.teacher_taken = True

    def _refuse_untrained_teacher(self) -> None:
        if self._teacher_untrained:
            raise ValueError(
                "distillation: the network has its random initial weights, which teach nothing; give checkpoint_path, "
                "or model_kwargs={'pretrained': True}, or a start_epoch after some training."
            )

    def _fits_teacher(self) -> bool:
        assert self.teacher is not None
        now, initial = self.net.state_dict(), self.teacher.state_dict()
        return now.keys() == initial.keys() and all(now[key].shape == initial[key].shape for key in now)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss of one batch, and logs it as train/loss.

        Args:
            batch: Normalized images (N, 3, H, W), and their classes (N,).
            batch_idx: Number of the batch in its epoch, which decides how it is mixed.

        Returns:
            The loss, a scalar.
        """
        images, targets = self._mix(*batch, batch_idx) if self.mixing.enabled else batch
        logits = self(images)
        smoothing = 0.0 if self.mixing.enabled else self.label_smoothing  # Mixup smooths its targets itself
        loss = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is not None and self.distillation is not None and self.teacher_taken:
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            distilled = distillation_loss(logits, teacher_logits, self.distillation.temperature)
            loss = (1 - self.distillation.weight) * loss + self.distillation.weight * distilled
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def _mix(self, images: Tensor, targets: Tensor, batch_idx: int) -> Batch:
        if len(images) % 2:
            raise ValueError(
                f"a batch of {len(images)} images cannot be mixed in pairs; use an even batch_size and drop_last."
            )
        mixup = Mixup(  # type: ignore[no-untyped-call]  # timm does not annotate it
            mixup_alpha=self.mixing.mixup_alpha,
            cutmix_alpha=self.mixing.cutmix_alpha,
            prob=self.mixing.probability,
            switch_prob=self.mixing.switch_probability,
            label_smoothing=self.label_smoothing,
            num_classes=self.num_classes,
        )
        with _seeded_numpy([self.mixing.seed, self.current_epoch, batch_idx, self.global_rank]):
            mixed: Batch = mixup(images.clone(), targets)  # timm mixes in place
        return mixed

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs val/loss and the accuracies of one batch.

        Args:
            batch: Normalized images (N, 3, H, W), and their classes (N,).
            batch_idx: Number of the batch; not used.
        """
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs test/loss and the accuracies of one batch.

        Args:
            batch: Normalized images (N, 3, H, W), and their classes (N,).
            batch_idx: Number of the batch; not used.
        """
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Batch, stage: str, metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss = functional.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val", sync_dist=True, batch_size=len(images))
        self.log_dict(metrics, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes AdamW over the present parameters of `net`, with a schedule per step.

        Returns:
            The optimizer and its schedule, as Lightning takes them.

        Raises:
            ValueError: If the Trainer has no end (neither max_epochs nor max_steps).
        """
        config = self.optimization
        optimizer = torch.optim.AdamW(decay_groups(self.net, config.weight_decay), lr=config.lr, betas=config.betas)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end; give the Trainer max_epochs or max_steps.")
        epochs = self.trainer.max_epochs
        steps_per_epoch = steps / epochs if epochs is not None and epochs > 0 else self._steps_per_epoch()
        warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), int(steps))

        # A function and not an object, because LambdaLR saves objects: a resume with more epochs would get the old
        # schedule.
        def factor(step: int) -> float:
            return warmup_cosine(step, int(steps), warmup_steps, floor=config.min_lr / config.lr)

        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def _steps_per_epoch(self) -> float:
        return float(self.trainer.num_training_batches) / self.trainer.accumulate_grad_batches

    def compression_record(self) -> CompressionRecord:
        """What a checkpoint says about the compression.

        Returns:
            The history of the network, the description of the input, and whether the teacher was taken.
        """
        description = dict(self.input_description)
        network = self._float_network()
        names = None if network is None else class_names_of(network)
        if names is not None:  # of a published network; names of the data come first
            description.setdefault("class_names", list(names))
        return dataclasses.replace(
            super().compression_record(),
            input_description=description,
            teacher_taken=self.teacher_taken,
        )

    def _changes(self) -> None:
        """Raises a ValueError if the stored arguments would build another network.

        A subclass may make its network in its own constructor, so only loading can find out there.
        """
        try:
            changes_since_creation(float_network(network_of(self, self.model_attribute)))
        except ValueError:
            if type(self) is CompressibleClassifier:
                raise

    def _write_record(self, checkpoint: dict[str, Any]) -> None:
        # `_changes` updates the arguments of the network to its present size.
        self._changes()
        super()._write_record(checkpoint)
        creation = creation_of(float_network(network_of(self, self.model_attribute)))
        saved = checkpoint.get("hyper_parameters")
        if creation is not None and saved is not None:
            saved["model_kwargs"] = {k: v for k, v in creation["kwargs"].items() if k != "num_classes"}

    def _float_network(self) -> nn.Module | None:
        """The float network; None where a subclass does not hold it yet."""
        held = has_network(self, self.model_attribute)
        return float_network(network_of(self, self.model_attribute)) if held else None

    def _name_classes(self) -> None:
        """Gives the network the names of its classes, if it does not have them, as a published network does."""
        network, names = self._float_network(), self.input_description.get("class_names")
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if network is not None and named and class_names_of(network) is None:
            set_class_names(network, names or [])

    def _read_record(self, checkpoint: dict[str, Any]) -> None:
        # It also reads the description of the input, and the teacher if there is one.
        super()._read_record(checkpoint)
        record = CompressionRecord.read(checkpoint)
        if not self.input_description:  # a datamodule that is attached now counts more than an earlier one
            self.input_description = dict(record.input_description or {})
        self._name_classes()
        state = checkpoint["state_dict"]
        saved = [key for key in state if key.startswith("teacher.")]
        self._teacher_untrained = False
        if self.teacher is None:
            for key in saved:  # loaded with distillation=None
                del state[key]
        elif saved:
            self.teacher_taken = bool(record.teacher_taken)
        else:  # distillation is new: the teacher is taken at its epoch, from what is loaded now
            self.teacher_taken = False
            state.update({f"teacher.{key}": tensor for key, tensor in self.teacher.state_dict().items()})


@contextmanager
def _seeded_numpy(entropy: list[int]) -> Iterator[None]:
    """Seeds NumPy's global generator, which timm's Mixup uses, inside the context, and restores it afterwards."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(entropy).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)


def _description_of(data: Any) -> dict[str, Any]:
    """What a datamodule with a `preprocessing` says about the network's input."""
    try:
        description: dict[str, Any] = {"preprocessing": described_preprocessing(data.preprocessing)}
    except ValueError as error:
        raise ValueError(f"the datamodule {type(data).__name__}: {error}") from error
    names = getattr(data, "class_names", None)
    return description if names is None else description | {"class_names": list(names)}
