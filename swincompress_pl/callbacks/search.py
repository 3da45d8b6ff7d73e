"""What the pruning callbacks share: a search on a hold-out before an epoch, which the rest of the fit follows."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from swincompress_pl.arguments import batches, choice, integer, optional, require, text
from swincompress_pl.callbacks.averages import note_old_shapes, refuse_averages
from swincompress_pl.callbacks.awaited_epoch import AwaitedEpoch
from swincompress_pl.callbacks.calibration import answer_of, first_inputs, labelled_batches, network_inputs
from swincompress_pl.callbacks.compatibility import (
    PRUNING,
    QUANTIZATION,
    refuse_neighbours,
    refuse_optimizers,
    refuse_overlaps,
    refuse_precision,
    refuse_sharing,
    refuse_strategy,
    refuse_synchronized_norms,
    wrap_anew,
)
from swincompress_pl.callbacks.loaders import calibration_loaders, holdout_loaders
from swincompress_pl.callbacks.monitored import refuse_minimized, refuse_shrinking_name
from swincompress_pl.callbacks.random_state import (
    RandomNumbers,
    isolated,
    leave_out_unbegun_epoch,
    seeded,
    stored_state,
)
from swincompress_pl.callbacks.resumed_arguments import ResumedArguments, stored
from swincompress_pl.callbacks.scoring import HoldOutReader, Named, images_and_labels, metric_scorer
from swincompress_pl.callbacks.searched_network import (
    CoupledScales,
    pruned_tensors,
    refuse_masked_integers,
    scored_network,
    searched_network,
    standing,
)
from swincompress_pl.callbacks.training_pass import TrainingPass
from swincompress_pl.callbacks.validation import ModuleValidation, on_device, validating
from swincompress_pl.callbacks.whole_change import whole_change
from swincompress_pl.checkpoint.holder import has_network, network_of
from swincompress_pl.checkpoint.hooks import keep_record
from swincompress_pl.interrupts import Attributes
from swincompress_pl.pruning import Gradients, HoldOut, collect_gradients
from swincompress_pl.pruning.evaluation.ranks import failing_together, from_all_ranks, share_buffers
from swincompress_pl.pruning.evaluation.scorer import Scorer, fingerprint_of
from swincompress_pl.pruning.evaluation.scores import SCORES
from swincompress_pl.pruning.space import SpaceConfig, check_on_trial
from swincompress_pl.pruning.structure.apply import AppliedPlan
from swincompress_pl.pruning.structure.change import Change
from swincompress_pl.pruning.structure.optimizer_state import slice_optimizers
from swincompress_pl.pruning.structure.trial import FirstInputs
from swincompress_pl.stored_data import reading

_STATE_VERSION = 2
# The attributes of a callback that a search changes.
_OWN = ("_last_epoch", "_masks", "search_state", "result")
Config = TypeVar("Config")


class Outcome(Protocol):
    """What a search did."""

    @property
    def change(self) -> Change:
        """What it changed in the network."""
        ...


class SearchCallback(TrainingPass, ABC):
    """Runs a search before some epochs of a fit; subclasses say which search, and when.

    The arguments are those of `AdaptiveIterativePruning` with the same names.
    """

    callback_name: ClassVar[str]  # also the key of the state, the same for subclasses of a callback
    resumed_arguments: ClassVar[ResumedArguments]
    config: Any  # the search's, a frozen dataclass

    def __init__(
        self,
        *,
        start_epoch: int,
        monitor: str | None,
        score: str,
        max_images: int | None,
        holdout_size_bytes: int,
        gradient_batches: int,
        calibration_dataloader: Any,
        model_attribute: str,
    ) -> None:
        self.start_epoch = integer("start_epoch", start_epoch, least=0)
        self.monitor = optional(text, "monitor", monitor, "None, or the name of a logged metric")
        if self.monitor is not None:
            refuse_shrinking_name(self.monitor)
        self.score = choice("score", score, SCORES)
        if self.monitor is not None and self.score != "accuracy":
            raise ValueError(f"score={score!r}: a monitor ({monitor!r}) is what is scored; leave one of the two out")
        wanted = "None (all), or 1 or more, an integer"
        self.max_images = optional(integer, "max_images", max_images, least=1, wanted=wanted)
        if self.monitor is not None and self.max_images is not None:
            raise ValueError(
                f"max_images={max_images}: a monitor ({monitor!r}) is computed over the whole hold-out; leave one of "
                "the two out, or limit the hold-out itself"
            )
        wanted = "1 or more, an integer, e.g. 4 << 30"
        self.holdout_size_bytes = integer("holdout_size_bytes", holdout_size_bytes, least=1, wanted=wanted)
        self.gradient_batches = integer("gradient_batches", gradient_batches, least=1)
        self.calibration_dataloader = batches("calibration_dataloader", calibration_dataloader)
        self.model_attribute = text("model_attribute", model_attribute, "a name or a path, e.g. 'net'")
        self._last_epoch = -1
        self._start = AwaitedEpoch("start_epoch", "nothing is pruned")
        self._scorer: Scorer | None = None
        self._network_checked = False
        self._rng = RandomNumbers()

    @property
    def state_key(self) -> str:
        """The same key for subclasses and all options, so that each takes up the checkpoints of the others."""
        return self.callback_name

    # Policy: override these.

    @abstractmethod
    def should_prune(self, epoch: int) -> bool:
        """Decides whether a search runs before an epoch; once it is over, the answer has no effect."""

    def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
        """Returns the logits that are scored. Override it to score something else than `validation_step` predicts.

        An override is called with the images that a batch begins with, and replaces `validation_step` in scoring.

        Args:
            module: The LightningModule.
            network: The network to score, which may be a candidate.
            images: Images on the device, (N, ...).

        Returns:
            Logits (N, classes).
        """
        logits: Tensor = network(images)
        return logits

    # The search: subclasses define these.

    @abstractmethod
    def _space(self, network: nn.Module) -> SpaceConfig:
        """What may be removed from the network."""

    @abstractmethod
    def _is_over(self) -> bool:
        """Whether there is nothing left to search."""

    @abstractmethod
    def _forget(self) -> None:
        """Forgets what is known, as it is of another fit."""

    @abstractmethod
    def _find(
        self,
        trainer: Trainer,
        module: LightningModule,
        scorer: Scorer,
        shape: tuple[int, ...] | None,
        coupled: CoupledScales,
    ) -> Outcome:
        """Searches, and changes the network."""

    def _finish(self, network: nn.Module, outcome: Outcome) -> AppliedPlan | None:
        """Slices what is left to slice when the search is over, and returns it; None if nothing is."""
        return None

    @abstractmethod
    def _take(self, outcome: Outcome) -> None:
        """Keeps what was found, once everything in the fit has followed."""

    @abstractmethod
    def _log(self, module: LightningModule, outcome: Outcome) -> None:
        """Logs what was found."""

    @abstractmethod
    def _stored(self) -> dict[str, Any]:
        """The search as plain data."""

    @abstractmethod
    def _restore(self, stored: dict[str, Any]) -> None:
        """Takes up what `_stored` returned; "arguments" are those of the fit before, if it stored any."""

    def _arguments(self) -> dict[str, Any]:
        """The arguments that a resumed fit is compared with, by name; see `resumed_arguments`."""
        own = ("start_epoch", "monitor", "score", "max_images", "gradient_batches", "model_attribute")
        return {**vars(self.config), **{name: getattr(self, name) for name in own}}

    # Hooks.

    @failing_together("checking the fit")
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes checkpoints record how the network is compressed, and refuses what cannot work."""
        keep_record(pl_module, self.model_attribute)
        if stage == "fit":
            refuse_strategy(trainer, self.callback_name, PRUNING)
            refuse_neighbours(trainer, self.callback_name, PRUNING)
            self._refuse_minimized(trainer)
            self._network_checked = has_network(pl_module, self.model_attribute)
            if self._network_checked:  # else configure_model or setup makes it
                self._check_network(trainer, pl_module)
            if trainer.current_epoch == 0:  # a fresh fit; a resumed one loads its state after this hook
                self._last_epoch = -1
                self._forget()

    @failing_together("checking the fit")
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks a network that did not exist at `setup`."""
        super().on_fit_start(trainer, pl_module)
        if not self._network_checked:
            self._check_network(trainer, pl_module)

    @failing_together("looking at the hold-out")
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the hold-out before the first epoch is spent, and starts to keep masks."""
        super().on_train_start(trainer, pl_module)
        self.keep_masks(trainer, self._network(pl_module))
        if not self._is_over():
            self._refuse_minimized(trainer)  # by schedulers, which the trainer has now
            refuse_averages(trainer, pl_module, self._network(pl_module), self.callback_name)
            self._refuse_optimizers(trainer, pl_module)
            with isolated(), validating(trainer, pl_module), torch.no_grad():
                self._scorer = self._make_scorer(trainer, pl_module)
                network, shape = self._network(pl_module), self._input_shape(trainer, pl_module, self._scorer)
                check_on_trial(network, self._space(network), FirstInputs(), shape)
        if self._waits():
            self._start.fit_begins(trainer, self.start_epoch)

    @failing_together("pruning")
    def _begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Searches if a search is due before this epoch; rank 0 decides for all."""
        epoch = trainer.current_epoch
        if self._is_over() or epoch <= self._last_epoch or not from_all_ranks(self.should_prune(epoch))[0]:
            return
        # The network, what follows it and the state of the search change together.
        with whole_change(trainer, module, self.model_attribute, Attributes(self, _OWN)):
            # The search must not move the random numbers that shuffling, dropout and augmentation draw.
            with isolated():
                outcome = self._search(trainer, module)
            self._last_epoch = epoch
            self._take(outcome)
        self._log(module, outcome)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the hold-out and the optimizers, and warns if no search has run."""
        self._let_go()
        if stage == "fit" and self._waits():
            self._start.fit_ends(trainer, self.start_epoch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go as well, because Lightning calls no `teardown` after an exception."""
        self._let_go()
        super().on_exception(trainer, pl_module, exception)
        if self._last_epoch >= 0:
            note_old_shapes(trainer, pl_module, self._network(pl_module), self.callback_name, exception)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up the random numbers, and refuses arguments that a resumed fit cannot change."""
        leave_out_unbegun_epoch(checkpoint)
        mine = stored_state(checkpoint, self.state_key, _STATE_VERSION)
        if mine is not None:
            self._rng.resume(trainer, mine.get("rng"))
            begun = integer("last_epoch", mine.get("last_epoch"), least=-1) >= 0
            if trainer.state.fn == TrainerFn.FITTING and begun and "arguments" in mine:
                self.resumed_arguments.take_up(self.callback_name, mine["arguments"], stored(self._arguments()))

    def state_dict(self) -> dict[str, Any]:
        """Returns the search so far, its arguments and the states of the random numbers, as plain data and tensors."""
        return {
            "version": _STATE_VERSION,
            "last_epoch": self._last_epoch,
            **self._stored(),
            "arguments": stored(self._arguments()),
            "rng": self._rng.states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the search of the fit that wrote `state_dict`."""
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the pruning callback's state has version {state_dict.get('version')!r}, {_STATE_VERSION} is expected"
            )
        with reading(f"the state of {self.state_key}"):
            last_epoch = integer("last_epoch", state_dict["last_epoch"], least=-1)
            self._restore(state_dict)
        self._last_epoch = last_epoch

    # Mechanism.

    def _waits(self) -> bool:
        """Whether no search has run yet."""
        return self._last_epoch < 0 and not self._is_over()

    def _let_go(self) -> None:
        self._scorer = None
        self.let_go_of_masks()

    def _check_network(self, trainer: Trainer, module: LightningModule) -> None:
        network = self._network(module)
        quantized = network is not network_of(module, self.model_attribute)
        refuse_precision(trainer, self.callback_name, QUANTIZATION if quantized else PRUNING)
        refuse_synchronized_norms(trainer, network, self.callback_name)
        refuse_overlaps(trainer, module, self, self.model_attribute)
        space = self._space(network)
        refuse_masked_integers(trainer, module, self.model_attribute, self.monitor, space.kinds)
        refuse_sharing(module, network, pruned_tensors(network, space), self.model_attribute)

    def _refuse_unsplittable(self) -> None:
        """Raises ValueError if there is to be an audit of a metric."""
        if self.monitor is not None and self.config.audit:
            raise ValueError(
                f"audit={self.config.audit:g}: a monitor ({self.monitor!r}) is computed over the whole hold-out, which "
                "cannot be split; leave monitor= out, or give audit=0"
            )

    def _refuse_minimized(self, trainer: Trainer) -> None:
        if self.monitor is not None:
            refuse_minimized(self.monitor, trainer)

    def _refuse_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        network = self._network(module)
        space = self._space(network)
        if space.granularity == "structured":
            refuse_optimizers(trainer.optimizers, network, pruned_tensors(network, space))

    def _network(self, module: LightningModule) -> nn.Module:
        return searched_network(module, self.model_attribute)

    def _search(self, trainer: Trainer, module: LightningModule) -> Outcome:
        coupled = CoupledScales(module, self.model_attribute)
        refuse_averages(trainer, module, self._network(module), self.callback_name)  # made since the fit began
        self._refuse_optimizers(trainer, module)  # they have no state before the first step
        share_buffers(self._network(module))
        with validating(trainer, module), torch.no_grad():
            assert self._scorer is not None  # made when training started
            shape = self._input_shape(trainer, module, self._scorer)
            outcome = self._find(trainer, module, self._scorer, shape, coupled)
        self._follow(trainer, module, outcome, coupled)
        return outcome

    def _follow(self, trainer: Trainer, module: LightningModule, outcome: Outcome, coupled: CoupledScales) -> None:
        """Lets optimizers, masks, compiled code and DDP follow what the search made of the network."""
        network, change = self._network(module), outcome.change
        slice_optimizers(trainer.optimizers, coupled.with_scales(change.applied))
        sliced = bool(change.applied.tensors)
        finished = self._finish(network, outcome)
        if finished is not None:
            coupled.cut(finished)
            slice_optimizers(trainer.optimizers, coupled.with_scales(finished))
            sliced = sliced or bool(finished.tensors)
        self.keep_masks(trainer, self._network(module))
        if sliced:
            # Compiled code has the old shapes; without a reset each shrink counts against the recompile limit.
            torch.compiler.reset()
        if sliced or change.registered:
            wrap_anew(trainer)

    def _make_scorer(self, trainer: Trainer, module: LightningModule) -> Scorer:
        loaders = holdout_loaders(trainer, self.callback_name)
        validation = self._validation(trainer, module, loaders)
        if self.monitor is not None:
            return metric_scorer(validation, self.monitor, loaders)
        reader = HoldOutReader(
            validation,
            loaders,
            partial(standing, module, self.model_attribute),
            score=self.score,
            max_images=self.max_images,
            max_size_bytes=self.holdout_size_bytes,
        )
        predict = Named(partial(self._predict, module), lambda: fingerprint_of(self.predict))
        return reader.with_predict(predict) if self._predicts_itself else reader.holdout(self._network(module), predict)

    def _validation(
        self, trainer: Trainer, module: LightningModule, loaders: list[Iterable[Any]] | None = None
    ) -> ModuleValidation:
        several = loaders is not None and len(loaders) > 1
        return ModuleValidation(trainer, module, self.model_attribute, several_loaders=several)

    @property
    def _predicts_itself(self) -> bool:
        """Whether a subclass overrides `predict`."""
        return getattr(self.predict, "__func__", None) is not SearchCallback.predict

    def _input_shape(self, trainer: Trainer, module: LightningModule, scorer: Scorer) -> tuple[int, ...]:
        """The shape of one image with its batch axis, as the network gets it."""
        if isinstance(scorer, HoldOut):
            return (1, *scorer.image_shape)
        loaders = holdout_loaders(trainer, self.callback_name)
        validation = self._validation(trainer, module, loaders)
        with validation.without_trace(), standing(module, self.model_attribute, self._network(module)):
            validation.begin()
            _, images = first_inputs(validation, loaders)
        return (1, *images[0].shape[1:])

    def _predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
        return self.predict(module, scored_network(module, self.model_attribute, network), images)

    def _gradients(self, trainer: Trainer, module: LightningModule, network: nn.Module) -> Gradients:
        """The gradients of the training batches' loss, through the logits of the module's step."""
        loaders = calibration_loaders(trainer, self.calibration_dataloader, 64 * self.gradient_batches)
        validation = self._validation(trainer, module)
        with torch.enable_grad(), seeded(trainer.current_epoch):
            if self._predicts_itself:
                pairs = (images_and_labels(on_device(trainer, raw)) for loader in loaders for raw in loader)
                return collect_gradients(
                    network,
                    pairs,
                    max_batches=self.gradient_batches,
                    predict=lambda images: self._predict(module, network, images),
                )
            with validation.without_trace(), standing(module, self.model_attribute, network):
                validation.begin_beside_training()
                return collect_gradients(
                    network,
                    labelled_batches(validation, loaders, self.gradient_batches),
                    max_batches=self.gradient_batches,
                    predict=lambda counted: answer_of(validation, *counted),
                )

    def _calibration_images(self, trainer: Trainer, module: LightningModule) -> list[Tensor]:
        """What the network gets from `gradient_batches` training batches."""
        loaders = calibration_loaders(trainer, self.calibration_dataloader, 64 * self.gradient_batches)
        validation = self._validation(trainer, module)
        with seeded(trainer.current_epoch), validation.without_trace():
            validation.begin_beside_training()
            return list(islice(network_inputs(validation, loaders), self.gradient_batches))


def log_search(module: LightningModule, values: Mapping[str, float]) -> None:
    """Logs what a search found, {name: value}, as `pruning/<name>`."""
    # All ranks have the same values; the reduction only lets Lightning know, so that every rank may monitor them.
    module.log_dict({f"pruning/{name}": value for name, value in values.items()}, sync_dist=True, reduce_fx="max")


def config_of(kind: type[Config], config: Config | None, arguments: Mapping[str, Any]) -> Config:
    """Returns `config`, or makes one of a callback's `arguments` with the names of its fields.

    Raises a TypeError if both are given: if an argument differs from its default, which is that of the field.
    """
    settings = {field.name: arguments[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if config is None:
        return kind(**settings)
    require("config", config, isinstance(config, kind), f"of type {kind.__name__}")
    defaults = kind()
    given = [name for name, value in settings.items() if not _same(value, getattr(defaults, name))]
    if given:
        raise TypeError(
            f"config= is given, and {', '.join(given)} beside it; change the config instead: "
            f"dataclasses.replace(config, {given[0]}={settings[given[0]]!r})"
        )
    return config


def _same(value: object, default: object) -> bool:
    return (tuple(value) if isinstance(value, list) else value) == default
