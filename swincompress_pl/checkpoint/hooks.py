"""Writes the compression record in a LightningModule's hooks, and restores networks from it before weights load.

Networks are restored in one place, `LightningModule.on_load_checkpoint`. It runs for `load_from_checkpoint` and, in a
trainer, before the weights are loaded and the optimizers are made. `CompressionMixin` brings this hook. A callback adds
it to a module without the mixin, with `keep_record` in its `setup`. (`trainer.ckpt_path` is of no use in `setup`: in
Lightning 2.6 it is still the path of the previous run.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from swincompress_pl.checkpoint.compiled_keys import follow_compilation
from swincompress_pl.checkpoint.holder import has_network, network_of
from swincompress_pl.checkpoint.networks import add_path, paths_of, record_of, restore_networks
from swincompress_pl.checkpoint.record import CompressionRecord, check_form, read_checkpoint
from swincompress_pl.pruning.structure.weight_masks import enforce_masks, keep_masks, masked_parameters
from swincompress_pl.quant import QuantizedNetwork


class CompressionMixin:
    """Makes a LightningModule's checkpoints restore its compressed networks.

    With `class Mine(CompressionMixin, LightningModule)`, `Mine.load_from_checkpoint` rebuilds what was compressed. Your
    own `on_save_checkpoint` and `on_load_checkpoint` need not call those of this class: the record is written and read
    after them. The mixin also keeps masked weights at 0 in a fit, and lets a quantized network train in `eval()`.

    Attributes:
        model_attribute: Where the module holds the network: "net", or a path such as "model.backbone" or "nets.0".
            Other compressed networks of the module are recorded too.

    Raises:
        TypeError: If a class names the mixin after LightningModule.
    """

    model_attribute: str = "net"
    _record_read = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if LightningModule in order and order.index(LightningModule) < order.index(CompressionMixin):
            raise TypeError(
                f"class {cls.__name__}: CompressionMixin stands behind LightningModule, whose hooks hide its own, "
                f"so no checkpoint would hold the record; write class {cls.__name__}(CompressionMixin, ...)"
            )
        for name, completed in (("on_save_checkpoint", _with_writing), ("on_load_checkpoint", _with_reading)):
            hook = getattr(cls, name)
            if hook is not vars(CompressionMixin)[name] and not hasattr(hook, "_completed"):
                setattr(cls, name, completed(hook))

    def compression_record(self) -> CompressionRecord:
        """What a checkpoint says about the compression. Override it to say more.

        Returns:
            The histories of the module's networks.
        """
        assert isinstance(self, LightningModule)
        return record_of(self)

    def _write_record(self, checkpoint: dict[str, Any]) -> None:
        """Puts the record into a checkpoint that is about to be saved; a second call changes nothing."""
        self.compression_record().write(checkpoint)

    def _read_record(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds what the record of `checkpoint` says, before the weights are loaded."""
        assert isinstance(self, LightningModule)
        _prepare_load(self, checkpoint)

    def on_train_start(self) -> None:
        """Starts to keep masked weights at 0, unless a callback does so."""
        assert isinstance(self, LightningModule)
        super().on_train_start()  # type: ignore[misc]  # the LightningModule's
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        kept = {other.model_attribute for other in callbacks if getattr(other, "keeps_masks", False)}
        for path in paths_of(self):
            network = network_of(self, path)
            if masked_parameters(network) and path not in kept:
                keep_masks(self.trainer.optimizers, network)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Lets quantized networks simulate their integers while the batch is trained on, in `eval()` too.

        Args:
            batch: The batch.
            batch_idx: Number of the batch in its epoch.

        Returns:
            What the LightningModule's own hook returns; -1 skips the rest of the epoch.
        """
        for network in self._quantized():
            network.begin_training_pass()
        skip: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]  # the LightningModule's
        if skip == -1:
            for network in self._quantized():
                network.end_training_pass()
        return skip

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the simulation of integers.

        Args:
            outputs: What `training_step` returned.
            batch: The batch.
            batch_idx: Number of the batch in its epoch.
        """
        assert isinstance(self, LightningModule)
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]  # the LightningModule's
        for network in self._quantized():
            network.end_training_pass()
        for path in paths_of(self):
            enforce_masks(network_of(self, path))  # whoever stepped, and in how many halves

    def _quantized(self) -> list[QuantizedNetwork]:
        assert isinstance(self, LightningModule)
        networks = [network_of(self, path) for path in paths_of(self)]
        return [network for network in networks if isinstance(network, QuantizedNetwork)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the compression record to a checkpoint.

        Args:
            checkpoint: The checkpoint that is about to be saved.

        Raises:
            ValueError: In a CompressibleClassifier, if its network was changed in a way that no record can hold.
            AttributeError: If the module has no network at `model_attribute`.
        """
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        self._write_record(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the compressed networks before the weights are loaded.

        Args:
            checkpoint: The checkpoint.

        Raises:
            ValueError: If the record is damaged, of an unknown version, or of another network than the module's.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        self._read_record(checkpoint)
        self._record_read = True


def _with_writing(own: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `on_save_checkpoint`, with the record written after it."""

    @functools.wraps(own)
    def on_save_checkpoint(self: CompressionMixin, checkpoint: dict[str, Any]) -> None:
        own(self, checkpoint)
        self._write_record(checkpoint)

    on_save_checkpoint._completed = True  # type: ignore[attr-defined]
    return on_save_checkpoint


def _with_reading(own: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `on_load_checkpoint`, with the record read after it, unless it was read in it."""

    @functools.wraps(own)
    def on_load_checkpoint(self: CompressionMixin, checkpoint: dict[str, Any]) -> None:
        self._record_read = False
        own(self, checkpoint)
        if not self._record_read:
            self._read_record(checkpoint)
            self._record_read = True

    on_load_checkpoint._completed = True  # type: ignore[attr-defined]
    return on_load_checkpoint


def keep_record(module: LightningModule, model_attribute: str = "net") -> None:
    """Makes a module's checkpoints record its network, and restore it when a trainer loads them.

    Callbacks call it in `setup`, each for its own network. A second call changes nothing.

    Args:
        module: The module that holds the network.
        model_attribute: Where it holds it.

    Raises:
        AttributeError: If there is no network at `model_attribute`, and no hook that could make it later.
    """
    if not has_network(module, model_attribute) and not _may_make_it_later(module):
        network_of(module, model_attribute)  # raises for a wrong name
    add_path(module, model_attribute)
    _say_who_loads(module)
    hooks = (("on_save_checkpoint", _write_record, False), ("on_load_checkpoint", _prepare_load, True))
    for name, ours, first in hooks:
        by_class = isinstance(module, CompressionMixin) and name not in vars(module)
        if not by_class and not isinstance(vars(module).get(name), _WithOurs):
            setattr(module, name, _WithOurs(module, ours, getattr(module, name), first))


def _say_who_loads(module: LightningModule) -> None:
    """Says once per module without the mixin that its checkpoints resume, and what `load_from_checkpoint` wants.

    It has to be said here: in `load_from_checkpoint` of such a class nothing of this package runs.
    """
    if isinstance(module, CompressionMixin) or isinstance(vars(module).get("on_load_checkpoint"), _WithOurs):
        return
    name = type(module).__name__
    rank_zero_info(
        f"{name} has no CompressionMixin: a trainer with this callback resumes from its checkpoints, but "
        f"{name}.load_from_checkpoint will not rebuild a compressed network. For that write "
        f"class {name}(CompressionMixin, LightningModule), with CompressionMixin from swincompress_pl.models; "
        "checkpoints that are written before load with it too"
    )


def _may_make_it_later(module: LightningModule) -> bool:
    return is_overridden("configure_model", module) or is_overridden("setup", module)


class _WithOurs:
    """A hook of a module with one of this package before or after it; a class, so that it can be copied and pickled.

    The networks are restored before the user's hook loads, and the record is written after the user's hook saves.
    """

    def __init__(
        self,
        module: LightningModule,
        ours: Callable[[LightningModule, dict[str, Any]], None],
        own: Callable[[dict[str, Any]], None],
        first: bool,
    ) -> None:
        self.module, self.ours, self.own, self.first = module, ours, own, first

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if self.first:
            self.ours(self.module, checkpoint)
        self.own(checkpoint)
        if not self.first:
            self.ours(self.module, checkpoint)


def save_to_checkpoint(module: LightningModule, checkpoint: dict[str, Any], model_attribute: str = "net") -> None:
    """Writes the compression record of a module's networks into a checkpoint; a second call changes nothing.

    Args:
        module: The module that holds the networks.
        checkpoint: The checkpoint that is about to be saved.
        model_attribute: Where the module holds a network. Its record is written, and those of all compressed networks.

    Raises:
        AttributeError: If there is no network at `model_attribute`.
    """
    add_path(module, model_attribute)
    _write_record(module, checkpoint)


def restore_from_checkpoint(
    module: LightningModule, ckpt_path: str | Path | None, model_attribute: str = "net"
) -> None:
    """Gives `module`'s network the architecture that it has in a checkpoint, without the weights.

    In a callback's `setup` call `keep_record` instead, because `trainer.ckpt_path` is not yet that of the run.

    Args:
        module: The module that holds the network.
        ckpt_path: The checkpoint; None does nothing.
        model_attribute: Where the module holds the network. If the checkpoint has several networks, each comes to its
            own place.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of plain data and tensors, or its record is damaged, of an unknown
            version, or of another network.
    """
    if ckpt_path is not None:
        restore_networks(module, read_checkpoint(ckpt_path), model_attribute)
        keep_record(module, model_attribute)


def _write_record(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    record_of(module).write(checkpoint)


def _prepare_load(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    check_form(checkpoint)
    restore_networks(module, checkpoint)
    follow_compilation(module, checkpoint)
