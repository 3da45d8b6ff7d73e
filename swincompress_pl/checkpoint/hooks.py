"""The compression record in a LightningModule's hooks: written with the weights, and restored before they load.

There is one restore path, `LightningModule.on_load_checkpoint`, which runs for `load_from_checkpoint` and, in a
trainer, before the weights are loaded and the optimizers are made. `CompressionMixin` brings it; a callback adds it to
a module without the mixin by `keep_record` in its `setup`. (A look at `trainer.ckpt_path` in `setup` does not do: in
lightning 2.6 it still is the path of the run before.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from swincompress_pl.checkpoint.compiled_keys import follow_compilation
from swincompress_pl.checkpoint.holder import has_network, network_of
from swincompress_pl.checkpoint.networks import add_path, paths_of, record_of, restore_networks
from swincompress_pl.checkpoint.record import CompressionRecord, check_form, read_checkpoint
from swincompress_pl.pruning.structure.weight_masks import enforce_masks, keep_masks, masked_parameters
from swincompress_pl.quant import QuantizedNetwork


class CompressionMixin:
    """For a LightningModule whose checkpoints are to restore a compressed network.

    `class Mine(CompressionMixin, LightningModule)`: then `Mine.load_from_checkpoint` rebuilds what was compressed.
    model_attribute: the attribute that holds the network, or a path to it. Other networks of the module that are
    compressed are in the record by themselves.

    Hooks of a class of yours, `on_save_checkpoint` and `on_load_checkpoint`, need not call those of this class: the
    record is written and read after them. TypeError for a class that names the mixin behind LightningModule.
    """

    model_attribute: str = "net"
    _record_read = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if LightningModule in order and order.index(LightningModule) < order.index(CompressionMixin):
            raise TypeError(
                f"class {cls.__name__}: CompressionMixin stands behind LightningModule, whose hooks hide its own, "
                f"so that no checkpoint held the record; write class {cls.__name__}(CompressionMixin, ...)"
            )
        for name, completed in (("on_save_checkpoint", _with_writing), ("on_load_checkpoint", _with_reading)):
            hook = getattr(cls, name)
            if hook is not vars(CompressionMixin)[name] and not hasattr(hook, "_completed"):
                setattr(cls, name, completed(hook))

    def compression_record(self) -> CompressionRecord:
        """What a checkpoint says of the compression; override it to say more."""
        assert isinstance(self, LightningModule)
        return record_of(self)

    def _write_record(self, checkpoint: dict[str, Any]) -> None:
        """Put the record into a checkpoint that is about to be saved; doing it twice changes nothing."""
        self.compression_record().write(checkpoint)

    def _read_record(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild what the record of `checkpoint` says, before the weights load."""
        assert isinstance(self, LightningModule)
        _prepare_load(self, checkpoint)

    def on_train_start(self) -> None:
        """Keep the zeros of masked networks: no callback has to be there for it."""
        assert isinstance(self, LightningModule)
        super().on_train_start()  # type: ignore[misc]  # the LightningModule's
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        kept = {other.model_attribute for other in callbacks if getattr(other, "keeps_masks", False)}
        for path in paths_of(self):
            network = network_of(self, path)
            if masked_parameters(network) and path not in kept:
                keep_masks(self.trainer.optimizers, network)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Fake quantization while the batch is trained on, in a module that is in evaluation too."""
        for network in self._quantized():
            network.begin_training_pass()
        skip: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]  # the LightningModule's
        if skip == -1:
            for network in self._quantized():
                network.end_training_pass()
        return skip

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The mode that the user left again."""
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
        """Add the compression record."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        self._write_record(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the compressed networks before the weights load."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        self._read_record(checkpoint)
        self._record_read = True


def _with_writing(own: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `on_save_checkpoint`, after which the record is in the checkpoint whatever it did."""

    @functools.wraps(own)
    def on_save_checkpoint(self: CompressionMixin, checkpoint: dict[str, Any]) -> None:
        own(self, checkpoint)
        self._write_record(checkpoint)

    on_save_checkpoint._completed = True  # type: ignore[attr-defined]
    return on_save_checkpoint


def _with_reading(own: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `on_load_checkpoint`, after which the record was read, by itself or now."""

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
    """From now on, have `module`'s checkpoints carry the record of its network, and bring the network to the
    architecture of any checkpoint that a trainer loads into it.

    For callbacks, in `setup`, each with its own network. Doing it twice changes nothing.
    """
    if not has_network(module, model_attribute) and not _may_make_it_later(module):
        network_of(module, model_attribute)  # a wrong name is found now
    add_path(module, model_attribute)
    hooks = (("on_save_checkpoint", _write_record, False), ("on_load_checkpoint", _prepare_load, True))
    for name, ours, first in hooks:
        by_class = isinstance(module, CompressionMixin) and name not in vars(module)
        if not by_class and not isinstance(vars(module).get(name), _WithOurs):
            setattr(module, name, _WithOurs(module, ours, getattr(module, name), first))


def _may_make_it_later(module: LightningModule) -> bool:
    return is_overridden("configure_model", module) or is_overridden("setup", module)


class _WithOurs:
    """A hook of a module with one of ours before or behind it; a class, so that it can be copied and pickled.

    The networks are there when the user's hook loads, and the record is there whatever the user's hook saves.
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
    """Write the compression record of `module`'s networks, the one at `model_attribute` and those that are compressed,
    into `checkpoint`; writing it twice changes nothing."""
    add_path(module, model_attribute)
    _write_record(module, checkpoint)


def restore_from_checkpoint(
    module: LightningModule, ckpt_path: str | Path | None, model_attribute: str = "net"
) -> None:
    """Bring `module`'s network to the architecture of the checkpoint at `ckpt_path`, without its weights.

    None does nothing. Of a checkpoint with several networks each comes to the place that it had. For a callback's
    `setup` take `keep_record`: `trainer.ckpt_path` is not yet that of the run.
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
