"""The compression record in a LightningModule's hooks: written with the weights, and restored before they load.

There is one restore path, `LightningModule.on_load_checkpoint`, which runs for `load_from_checkpoint` and, in a
trainer, before the weights are loaded and the optimizers are made. `CompressionMixin` brings it; a callback adds it to
a module without the mixin by `keep_record` in its `setup`. (A look at `trainer.ckpt_path` in `setup` does not do: in
lightning 2.6 it still is the path of the run before.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from swincompress_pl.checkpoint.compiled_keys import follow_compilation, masks_as_named_in
from swincompress_pl.checkpoint.holder import float_network, has_network, network_of, put_network
from swincompress_pl.checkpoint.record import CompressionRecord, check_form, history_in, read_checkpoint
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.history import follow_size, history_of
from swincompress_pl.pruning.structure.weight_masks import enforce_masks, keep_masks, masked_parameters
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.registry import size_of


class CompressionMixin:
    """For a LightningModule whose checkpoints are to restore a compressed network.

    `class Mine(CompressionMixin, LightningModule)`: then `Mine.load_from_checkpoint` rebuilds what was compressed.
    model_attribute: the attribute that holds the network.
    """

    model_attribute: str = "net"

    def compression_record(self) -> CompressionRecord:
        """What a checkpoint says of the compression; override it to say more."""
        assert isinstance(self, LightningModule)
        return _record_of(self, self.model_attribute)

    def on_train_start(self) -> None:
        """Keep the zeros of a masked network: no callback has to be there for it."""
        assert isinstance(self, LightningModule)
        super().on_train_start()  # type: ignore[misc]  # the LightningModule's
        network = network_of(self, self.model_attribute)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        if masked_parameters(network) and not any(getattr(callback, "keeps_masks", False) for callback in callbacks):
            keep_masks(self.trainer.optimizers, network)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Fake quantization while the batch is trained on, in a module that is in evaluation too."""
        assert isinstance(self, LightningModule)
        network = network_of(self, self.model_attribute)
        if isinstance(network, QuantizedNetwork):
            network.begin_training_pass()
        skip: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]  # the LightningModule's
        if skip == -1 and isinstance(network, QuantizedNetwork):
            network.end_training_pass()
        return skip

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The mode that the user left again."""
        assert isinstance(self, LightningModule)
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]  # the LightningModule's
        network = network_of(self, self.model_attribute)
        if isinstance(network, QuantizedNetwork):
            network.end_training_pass()
        enforce_masks(network)  # whoever stepped, and in how many halves

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the compression record."""
        assert isinstance(self, LightningModule)
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        self.compression_record().write(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the compressed network before the weights load."""
        assert isinstance(self, LightningModule)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        _prepare_load(self, checkpoint, self.model_attribute)


def keep_record(module: LightningModule, model_attribute: str = "net") -> None:
    """From now on, have `module`'s checkpoints carry the record of its network, and bring the network to the
    architecture of any checkpoint that a trainer loads into it.

    For callbacks, in `setup`. Doing it twice, or for a module with the mixin, changes nothing.
    """
    if not has_network(module, model_attribute) and not _may_make_it_later(module):
        network_of(module, model_attribute)  # a wrong name is found now
    if isinstance(module, CompressionMixin) and module.model_attribute == model_attribute:
        return
    for name, first in (("on_save_checkpoint", save_to_checkpoint), ("on_load_checkpoint", _prepare_load)):
        if not isinstance(vars(module).get(name), _OursFirst):
            setattr(module, name, _OursFirst(module, model_attribute, first, getattr(module, name)))


def _may_make_it_later(module: LightningModule) -> bool:
    return is_overridden("configure_model", module) or is_overridden("setup", module)


class _OursFirst:
    """A hook of a module with one of ours in front; a class, so that it can be copied and pickled."""

    def __init__(
        self,
        module: LightningModule,
        model_attribute: str,
        first: Callable[[LightningModule, dict[str, Any], str], None],
        then: Callable[[dict[str, Any]], None],
    ) -> None:
        self.module, self.model_attribute, self.first, self.then = module, model_attribute, first, then

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.first(self.module, checkpoint, self.model_attribute)
        self.then(checkpoint)


def save_to_checkpoint(module: LightningModule, checkpoint: dict[str, Any], model_attribute: str = "net") -> None:
    """Write the compression record of `module`'s network into `checkpoint`; writing it twice changes nothing."""
    _record_of(module, model_attribute).write(checkpoint)


def restore_from_checkpoint(
    module: LightningModule, ckpt_path: str | Path | None, model_attribute: str = "net"
) -> None:
    """Bring `module`'s network to the architecture of the checkpoint at `ckpt_path`, without its weights.

    None does nothing. For a callback's `setup` take `keep_record`: `trainer.ckpt_path` is not yet that of the run.
    """
    if ckpt_path is not None:
        _restore_from(module, read_checkpoint(ckpt_path), model_attribute)


def _record_of(module: LightningModule, model_attribute: str) -> CompressionRecord:
    network = network_of(module, model_attribute)
    follow_size(float_network(network), size_of(float_network(network)))
    return CompressionRecord(history=history_of(network))


def _prepare_load(module: LightningModule, checkpoint: dict[str, Any], model_attribute: str) -> None:
    check_form(checkpoint)
    _restore_from(module, checkpoint, model_attribute)
    follow_compilation(module, checkpoint)


def _restore_from(module: LightningModule, checkpoint: Mapping[str, Any], model_attribute: str) -> None:
    network = network_of(module, model_attribute)
    restored = restore_from_history(network, masks_as_named_in(float_network(network), history_in(checkpoint)))
    if restored is not network:
        put_network(module, model_attribute, restored)
