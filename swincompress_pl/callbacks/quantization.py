"""Quantization-aware training, from a chosen epoch of a fit on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from swincompress_pl.arguments import batches, integer, text
from swincompress_pl.callbacks.averages import refuse_averages
from swincompress_pl.callbacks.awaited_epoch import AwaitedEpoch
from swincompress_pl.callbacks.compatibility import (
    QUANTIZATION,
    refuse_averaging_before,
    refuse_compiled_module,
    refuse_neighbours,
    refuse_overlaps,
    refuse_precision,
    refuse_strategy,
    refuse_synchronized_norms,
    wrap_anew,
)
from swincompress_pl.callbacks.finetuning import note_finetuned_groups, restore_finetuned_groups
from swincompress_pl.callbacks.qat_distillation import Distillation, refuse_teaching
from swincompress_pl.callbacks.qat_images import CalibrationImages, preprocessing_of_data
from swincompress_pl.callbacks.qat_options import (
    RESUMED_ARGUMENTS,
    checked_epochs,
    checked_quantization,
    checked_training,
    refuse_other_form,
)
from swincompress_pl.callbacks.qat_scales import ScaleGroup, read_old_names
from swincompress_pl.callbacks.random_state import (
    RandomNumbers,
    isolated,
    leave_out_unbegun_epoch,
    seeded,
    stored_state,
)
from swincompress_pl.callbacks.resumed_arguments import stored
from swincompress_pl.callbacks.training_pass import TrainingPass
from swincompress_pl.callbacks.whole_change import whole_change
from swincompress_pl.checkpoint.averaging import renew_averages
from swincompress_pl.checkpoint.holder import has_network, held_by, network_of, put_network, refuse_other_places
from swincompress_pl.checkpoint.hooks import keep_record
from swincompress_pl.history import history_of
from swincompress_pl.pruning.evaluation.ranks import failing_together, from_all_ranks, from_rank_zero
from swincompress_pl.quant import Bits, QuantizedNetwork, SearchOptions, quantize
from swincompress_pl.quant.folding import refuse_altered
from swincompress_pl.quant.full_precision import bring_to_float32
from swincompress_pl.quant.preprocessing import checked_preprocessing, find_preprocessing
from swincompress_pl.stored_data import from_plain, reading

_STATE_VERSION = 1


class QuantizationAwareTraining(TrainingPass):
    """Quantizes a network at the start of an epoch, and trains on with fake quantization.

    From then on the module holds a `quant.QuantizedNetwork`. Training sees rounded values with straight-through
    gradients; validation and test see the integers of the engine. The float weights are the same parameters as before,
    so the optimizer and its state stay.

    The images for calibration are what the module's own `validation_step` gives to the network, after its hooks and its
    transfer to the device. What does not fit ends the fit before its first epoch: batches of another form than
    `validation_step` takes, or images of another size or normalization.

    A checkpoint holds the states of the random number generators: in a single process, a fit that is resumed at the end
    of an epoch goes on as an uninterrupted one would. Masks of pruned weights are kept. A pruning search beside it goes
    on with the quantized network. Modes, frozen layers and gradient checkpointing stay as they are. A module in
    `eval()` is trained in it: without dropout, and with fixed statistics.

    It runs on one device or under DDP, in float32 or in mixed precision. Under DDP, rank 0 calibrates for all ranks.
    BatchNorms normalize by each rank's own batch, and rank 0's running statistics are evaluated and kept, as in DDP
    without quantization.

    Lightning's WeightAveraging and EMAWeightAveraging work if they come after it among the callbacks: weights and
    learned scales are averaged, and evaluated as integers. The training of a compiled network stays compiled; its
    evaluation, in integers, is not. FSDP, DeepSpeed, StochasticWeightAveraging, other averages, true half and double
    precision, synchronized BatchNorms and a LightningModule that is compiled as a whole are refused by name.

    Example:
        `Trainer(max_epochs=10, callbacks=[QuantizationAwareTraining(start_epoch=6, bits="W4A8")])`

    Args:
        start_epoch: Epoch before which the network is quantized, 0 or more. 0 is for a network with trained weights.
        calibration_images: Number of images to calibrate on, 1 or more.
        method: "searched", "max" or "affine"; see `quant.quantize`.
        bits: Widths such as "W8A8" or "W4A8", or a `quant.Bits` or its fields.
        search: Options of the method "searched", a `quant.SearchOptions` or its fields; None for the defaults.
        percentile: Percentile of an activation's magnitudes at which it is clipped, instead of their maximum; see
            `quant.quantize`. None for the maximum.
        learn_scales: Whether the scales are trained too (LSQ, arXiv 1902.08153), in a parameter group of their own
            without weight decay; else they stay as calibrated. None stands for True, and for False with the method
            "affine", whose scales cannot be trained.
        scale_lr_factor: Learning rate of the scales, as a multiple of that of the network's first parameter group;
            above 0.
        freeze_epoch: Epoch, after `start_epoch`, from which learned scales stay as they are; None for never.
        distillation: Weight w of a teacher, the float network just before quantization, 0 to 1. The loss becomes
            (1 - w) * the module's own + w * T^2 KL(teacher || student). 0 is without a teacher.
            Not for manual optimization, nor for a CompressibleClassifier with a DistillationConfig, which keeps its own
            teacher. For a network that was quantized before the fit, its float weights at that moment teach. A
            checkpoint holds the teacher, and grows by the float weights.
        temperature: Temperature T of the distillation, above 0.
        preprocessing: {"mean": ..., "std": ...} of the images, one number per channel, in [0, 1] units. None stands for
            the datamodule's `preprocessing`, or else for the first that is found when the fit begins: from a loader's
            raw pixels and what the network gets of them, from a mean and std that a dataset or its transforms hold in
            any attribute if the images fit them, from the network's own if the images fit it, or from the images
            themselves. The first 32 images are looked at, under DDP the same ones on all ranks.
        calibration_dataloader: Source of the images, in the form that `validation_step` takes: a loader, or a function
            that takes a number of images and returns a loader. None stands for the datamodule's
            `calibration_dataloader(images)`, or else the training data.
        model_attribute: Where the LightningModule holds the network: "net", or a path such as "model.backbone" or
            "nets.0".

    Raises:
        ValueError: If an argument is out of range or contradicts another one; when the fit begins, if the network, its
            optimizer, the data, the strategy, the precision or another callback does not go with quantization, or if
            nothing says how the images are normalized.
        AttributeError: When the fit begins, if the module has no network at `model_attribute`.
        UnsupportedNetworkError: When the fit begins, if the network has no integer form.
    """

    callback_name = "QuantizationAwareTraining"  # also the key of the state, one for subclasses too

    def __init__(
        self,
        *,
        start_epoch: int,
        calibration_images: int = 128,
        method: str = "searched",
        bits: Bits | str | Mapping[str, Any] = "W8A8",
        search: SearchOptions | Mapping[str, Any] | None = None,
        percentile: float | None = None,
        learn_scales: bool | None = None,
        scale_lr_factor: float = 1.0,
        freeze_epoch: int | None = None,
        distillation: float = 0.0,
        temperature: float = 1.0,
        preprocessing: Mapping[str, Any] | None = None,
        calibration_dataloader: Any = None,
        model_attribute: str = "net",
    ) -> None:
        self.start_epoch, self.freeze_epoch = checked_epochs(start_epoch, freeze_epoch, learn_scales)
        self.calibration_images = integer("calibration_images", calibration_images, least=1)
        self.method, self.search, self.percentile, self.learn_scales = checked_quantization(
            method, search, percentile, learn_scales
        )
        scale_lr_factor, distillation, temperature = checked_training(scale_lr_factor, distillation, temperature)
        self.bits = Bits.of(bits)
        self.preprocessing = None if preprocessing is None else checked_preprocessing(preprocessing)
        self.calibration_dataloader = batches("calibration_dataloader", calibration_dataloader)
        self._found_preprocessing: dict[str, Any] | None = None
        self._network_checked = False
        self.model_attribute = text("model_attribute", model_attribute, "a name or a path, e.g. 'net'")
        self._scale_group, self._temperature = ScaleGroup(scale_lr_factor), temperature
        self._distillation = Distillation(distillation, temperature) if distillation > 0 else None
        self._teacher_state: Mapping[str, Any] | None = None
        self._resumed = False
        self._start = AwaitedEpoch("start_epoch", "nothing is quantized")
        self._freezing = AwaitedEpoch("freeze_epoch", "the scales are learned to the end")
        self._rng = RandomNumbers()

    @property
    def state_key(self) -> str:
        """The same key for subclasses and all options, so that each takes up the checkpoints of the others."""
        return self.callback_name

    # Policy: override these.

    def should_quantize(self, epoch: int) -> bool:
        """Decides whether the network is quantized before an epoch. Override it for another moment.

        Args:
            epoch: The epoch, counted from 0.

        Returns:
            Whether it is; the network is quantized once, so a later answer has no effect.
        """
        return epoch >= self.start_epoch

    def should_freeze(self, epoch: int) -> bool:
        """Decides whether learned scales stay as they are in an epoch. Override it for another moment.

        Args:
            epoch: The epoch, counted from 0.

        Returns:
            Whether they do; once they are frozen, they stay so.
        """
        return not self.learn_scales or (self.freeze_epoch is not None and epoch >= self.freeze_epoch)

    # Hooks.

    @failing_together("checking the fit")
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes checkpoints record how the network is compressed, and refuses what cannot work."""
        keep_record(pl_module, self.model_attribute)
        if stage != "fit":
            return
        self._resumed, self._teacher_state, self._found_preprocessing = False, None, None
        self._scale_group.place = None
        self._refuse_surroundings(trainer, pl_module)
        if self._distillation is not None:
            refuse_teaching(pl_module)
        self._network_checked = has_network(pl_module, self.model_attribute)
        if self._network_checked:  # else configure_model or setup makes it
            self._check_network(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up the random numbers, and refuses arguments that a resumed fit cannot change."""
        quantized = has_network(pl_module, self.model_attribute) and isinstance(
            network_of(pl_module, self.model_attribute), QuantizedNetwork
        )
        read_old_names(checkpoint.get("optimizer_states", ()))
        leave_out_unbegun_epoch(checkpoint)
        mine = stored_state(checkpoint, self.state_key, _STATE_VERSION)
        if mine is not None:
            self._rng.resume(trainer, mine.get("rng"))
            if trainer.state.fn == TrainerFn.FITTING and quantized and "arguments" in mine:
                RESUMED_ARGUMENTS.take_up(self.callback_name, mine["arguments"], stored(self._arguments()))

    @failing_together("checking the fit")
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the fit of a network that is already quantized, before the optimizer's state is restored."""
        super().on_fit_start(trainer, pl_module)
        if not self._network_checked:
            self._check_network(trainer, pl_module)
        network = network_of(pl_module, self.model_attribute)
        if isinstance(network, QuantizedNetwork):
            refuse_other_form(network, self.callback_name, self.method, self.bits, self.preprocessing)
            restore_finetuned_groups(trainer, pl_module)
            if held_by(pl_module, self.model_attribute) is not network:  # torch.compile around a quantized one
                put_network(pl_module, self.model_attribute, network)
            if self._distillation is not None:
                self._take_up_teacher(network)
            self._learn(trainer, pl_module, network)

    @failing_together("looking at the images")
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the images for calibration, and starts to keep masks and to distill.

        It warns if the fit will end before anything is quantized.
        """
        super().on_train_start(trainer, pl_module)
        network = network_of(pl_module, self.model_attribute)
        self.keep_masks(trainer, network)
        if not isinstance(network, QuantizedNetwork):
            with isolated():
                found = self._images.preprocessing(
                    trainer, pl_module, network, self.preprocessing, method=self.method, bits=self.bits
                )
            self._found_preprocessing = from_rank_zero(found)
        if self._distillation is not None:
            self._distillation.attach(pl_module, self.model_attribute)
        if not isinstance(network, QuantizedNetwork):
            refuse_averages(trainer, pl_module, network, self.callback_name)
            if self.learn_scales:
                self._scale_group.check(trainer, network)
        self._say_what_is_awaited(trainer, network)

    @failing_together("quantizing")
    def _begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Quantizes the network, and freezes its scales, if this is the epoch; rank 0 decides for all."""
        network, epoch = network_of(module, self.model_attribute), trainer.current_epoch
        if not isinstance(network, QuantizedNetwork) and from_all_ranks(self.should_quantize(epoch))[0]:
            followers = (self._scale_group, *([] if self._distillation is None else [self._distillation]))
            with whole_change(trainer, module, self.model_attribute, *followers):
                network = self._exchange(trainer, module, network)
        if isinstance(network, QuantizedNetwork) and from_all_ranks(self.should_freeze(epoch))[0]:
            _freeze(trainer, network)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the module and the optimizers, and warns of what this fit did not reach."""
        self._let_go()
        network = network_of(pl_module, self.model_attribute)
        if stage == "fit":
            self._say_what_is_missing(trainer, network)
        if isinstance(network, QuantizedNetwork):
            network.forget_twin()  # an averaging callback may have written its average behind autograd's back

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go as well, because Lightning calls no `teardown` after an exception."""
        self._let_go()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """Returns the arguments, the states of the random numbers, and the weights of the teacher if there is one."""
        teacher = {"teacher": None} if self._distillation is None else self._distillation.to_dict()
        return {
            "version": _STATE_VERSION,
            "arguments": stored(self._arguments()),
            "scale_group": self._scale_group.place,
            "rng": self._rng.states(),
            **teacher,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the teacher of the fit that wrote `state_dict`."""
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the quantization callback's state has version {state_dict.get('version')!r}, {_STATE_VERSION} is "
                "expected"
            )
        with reading(f"the state of {self.state_key}"):
            teacher = from_plain(Mapping[str, Any] | None, state_dict["teacher"], "teacher")
            place = from_plain(int | None, state_dict.get("scale_group"), "scale_group")
        self._resumed, self._teacher_state = True, None if teacher is None else state_dict
        self._scale_group.place = place

    # Mechanism.

    def _arguments(self) -> dict[str, Any]:
        """The arguments that a resumed fit is compared with, by name; see `resumed_arguments`."""
        alike = ("start_epoch", "calibration_images", "method", "bits", "search", "percentile", "learn_scales")
        return {
            **{name: getattr(self, name) for name in (*alike, "freeze_epoch", "model_attribute")},
            "scale_lr_factor": self._scale_group.lr_factor,
            "distillation": 0.0 if self._distillation is None else self._distillation.weight,
            "temperature": self._temperature,
        }

    @property
    def _images(self) -> CalibrationImages:
        return CalibrationImages(
            calibration_dataloader=self.calibration_dataloader,
            count=self.calibration_images,
            model_attribute=self.model_attribute,
            callback_name=self.callback_name,
        )

    def _refuse_surroundings(self, trainer: Trainer, module: LightningModule) -> None:
        refuse_strategy(trainer, self.callback_name, QUANTIZATION)
        refuse_precision(trainer, self.callback_name, QUANTIZATION)
        refuse_compiled_module(module)
        refuse_averaging_before(trainer, self, self.callback_name)
        refuse_neighbours(trainer, self.callback_name, QUANTIZATION)

    def _check_network(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuses a network that has no integer form, before any image is seen."""
        network = network_of(module, self.model_attribute)
        refuse_other_places(module, self.model_attribute)
        refuse_overlaps(trainer, module, self, self.model_attribute)
        refuse_synchronized_norms(trainer, network, self.callback_name)
        stated = (self.preprocessing, preprocessing_of_data(trainer))
        if not isinstance(network, QuantizedNetwork) and any(source is not None for source in stated):
            QuantizedNetwork(network, preprocessing=find_preprocessing(*stated), method=self.method, bits=self.bits)

    def _say_what_is_awaited(self, trainer: Trainer, network: nn.Module) -> None:
        last = trainer.max_epochs
        if not isinstance(network, QuantizedNetwork):
            self._start.fit_begins(trainer, self.start_epoch)
        if self.freeze_epoch is not None and (last is None or last < 0 or last > self.start_epoch):
            self._freezing.fit_begins(trainer, self.freeze_epoch)

    def _say_what_is_missing(self, trainer: Trainer, network: nn.Module) -> None:
        if not isinstance(network, QuantizedNetwork):
            self._start.fit_ends(trainer, self.start_epoch)
        elif self.freeze_epoch is not None and trainer.current_epoch <= self.freeze_epoch:
            self._freezing.fit_ends(trainer, self.freeze_epoch)

    def _exchange(self, trainer: Trainer, module: LightningModule, network: nn.Module) -> QuantizedNetwork:
        """Replaces the float network by the quantized one; optimizer, averages and DDP follow."""
        refuse_averages(trainer, module, network, self.callback_name)  # made since the fit began
        rank_zero_info(
            f"quantizing {self.model_attribute} ({self.method}, {self.bits}) on {self.calibration_images} images"
        )
        if self._distillation is not None:
            self._distillation.take_teacher(network)
        formats = {parameter: parameter.dtype for parameter in network.parameters()}
        with seeded(trainer.current_epoch):
            images = self._images.collect(trainer, module)  # on every rank: a step may wait for the others
            quantized = self._quantized(trainer, module, network, images)
        quantized.keep_mode()
        _cast_state(trainer.optimizers, formats)
        put_network(module, self.model_attribute, quantized)
        if self.learn_scales:
            quantized.learn_scales()
            self._scale_group.join(trainer, quantized)
        wrap_anew(trainer)  # broadcasts what the search may have done to rank 0's weights
        inside = f"{self.model_attribute}."

        def renamed(name: str) -> str:
            if not name.startswith(inside):
                return name
            return f"{inside}network.{name.removeprefix(inside).removeprefix('_orig_mod.')}"  # of a compiled network

        renew_averages(trainer, module, renamed)
        note_finetuned_groups(trainer, module)
        return quantized

    def _quantized(
        self, trainer: Trainer, module: LightningModule, network: nn.Module, images: list[Tensor]
    ) -> QuantizedNetwork:
        """The network as rank 0 has quantized it, on every rank."""
        if trainer.world_size == 1:
            return self._calibrated(trainer, module, network, images)
        result: QuantizedNetwork | None = None
        outcome: Any = None
        if trainer.is_global_zero:
            with failing_together("calibrating"):
                result = self._calibrated(trainer, module, network, images)
            scales = {key: value.cpu() for key, value in result.scales.state_dict().items()}
            outcome = (history_of(result)[-1]["quantize"], scales)
        outcome = from_rank_zero(outcome)
        if result is None:
            result = QuantizedNetwork(network, **outcome[0])
            bring_to_float32(network)
            result.scales.load_state_dict(outcome[1])
        return result

    def _calibrated(
        self, trainer: Trainer, module: LightningModule, network: nn.Module, images: list[Tensor]
    ) -> QuantizedNetwork:
        assert self._found_preprocessing is not None  # when training started
        refuse_altered(network, self._found_preprocessing)  # `quantize` would fold it
        return quantize(
            network,
            images,
            method=self.method,
            bits=self.bits,
            search=self.search,
            percentile=self.percentile,
            preprocessing=self._found_preprocessing,
            calibration_images=self.calibration_images,
            classes=_class_names(trainer),
            embeddings=True,  # a network without a classifier has its head in the module
        )

    def _learn(self, trainer: Trainer, module: LightningModule, network: QuantizedNetwork) -> None:
        """Prepares the learned scales of a network that was quantized before this fit, or before it was resumed."""
        if not self.learn_scales:
            if network.scales.adjustment is not None:
                _freeze(trainer, network)
            return
        if network.method == "affine":
            raise ValueError(
                "the network is quantized with method 'affine', whose scales cannot be learned; pass learn_scales=False"
            )
        fresh = network.scales.adjustment is None
        network.learn_scales()
        assert network.scales.adjustment is not None
        network.scales.adjustment.requires_grad_(True)
        self._scale_group.join(trainer, network)
        if fresh:
            renew_averages(trainer, module)
            wrap_anew(trainer)

    def _take_up_teacher(self, network: QuantizedNetwork) -> None:
        assert self._distillation is not None
        if self._resumed and self._teacher_state is None:
            raise ValueError(
                f"distillation={self._distillation.weight}, but the fit that is resumed had distillation=0: its "
                "checkpoint has no teacher, and its network is quantized already; resume with "
                "distillation=0, or from a checkpoint before start_epoch"
            )
        self._distillation.take_teacher(network.network, self._teacher_state)
        self._teacher_state = None

    def _let_go(self) -> None:
        self.let_go_of_masks()
        self._scale_group.leave()
        if self._distillation is not None:
            self._distillation.detach()


def _cast_state(optimizers: Sequence[Optimizer], formats: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Casts the state of optimizers that had the dtype of its parameter, given in `formats`, to the present one."""
    for optimizer in optimizers:
        for parameter in formats.keys() & optimizer.state.keys():
            state, old = optimizer.state[parameter], formats[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype is old is not parameter.dtype:
                    state[key] = value.to(parameter.dtype)


def _freeze(trainer: Trainer, network: QuantizedNetwork) -> None:
    """Stops training the learned scales; DDP is wrapped again, as it must not wait for their gradients."""
    adjustment = network.scales.adjustment
    if adjustment is not None and adjustment.requires_grad:
        adjustment.requires_grad_(False)
        adjustment.grad = None
        wrap_anew(trainer)


def _class_names(trainer: Trainer) -> list[str] | None:
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return None if names is None else [str(name) for name in names]
