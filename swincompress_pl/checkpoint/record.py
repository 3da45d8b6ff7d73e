"""The architecture manifest: it travels in the checkpoint and is replayed before the weights load.

A checkpoint carries `checkpoint["swincompress_pl"] = {"version": 1, "history": [...]}`, plain data: the network's
`compression_history`, oldest entry first. There is one restore path, `LightningModule.on_load_checkpoint`, which runs
for `load_from_checkpoint` and, in a trainer, before the weights are loaded and the optimizers are made.
`CompressionMixin` brings it; a callback adds it to a module without the mixin by `restore_on_load` in its `setup`. (A
look at `trainer.ckpt_path` in `setup` does not do: in lightning 2.6 it still is the path of the run before.)
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.pruning.structure.apply import history_of
from swincompress_pl.pruning.structure.regrow import regrow_latest_plan
from swincompress_pl.pruning.structure.weight_masks import (
    keep_masks,
    masked_parameters,
    register_masks,
    remove_masks,
    undo_latest_masks,
)
from swincompress_pl.quant import QuantizedNetwork

CHECKPOINT_KEY = "swincompress_pl"
MANIFEST_VERSION = 1


def _inside(network: nn.Module) -> nn.Module:
    """Where pruning and masks act: the network, or the one with the float weights in a quantized one."""
    return network.network if isinstance(network, QuantizedNetwork) else network


def _replay_prune(network: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    applied = apply_plan(_inside(network), PruningPlan.from_dict(data))
    if isinstance(network, QuantizedNetwork):
        network.follow({sliced.name: dict(sliced.kept) for sliced in applied.tensors})
    return network


def _replay_quantize(network: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    quantized = QuantizedNetwork(network, **data)
    return quantized.train(network.training)


def _replay_mask(network: nn.Module, names: Sequence[str]) -> nn.Module:
    register_masks(_inside(network), names)
    return network


def _replay_unmask(network: nn.Module, names: Sequence[str]) -> nn.Module:
    remove_masks(_inside(network), names)
    return network


# Kind of a history's entry -> how it is done again to a network; gives the network that takes its place.
_REPLAY: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "prune": _replay_prune,
    "mask": _replay_mask,
    "unmask": _replay_unmask,
    "quantize": _replay_quantize,
}
# The same kinds -> how the latest entry is undone, in shapes and names of the state dict; quantization is unwrapped.
_UNDO: dict[str, Callable[[nn.Module], None]] = {
    "prune": regrow_latest_plan,
    "mask": undo_latest_masks,
    "unmask": undo_latest_masks,
}


class CompressionMixin:
    """For a LightningModule whose checkpoints are to restore a compressed network.

    `class Mine(CompressionMixin, LightningModule)`: then `Mine.load_from_checkpoint` rebuilds what was compressed.
    model_attribute: the attribute that holds the network.
    """

    model_attribute: str = "net"

    def on_train_start(self) -> None:
        """Keep the zeros of a masked network: no callback has to be there for it."""
        assert isinstance(self, LightningModule)
        super().on_train_start()  # type: ignore[misc]  # the LightningModule's
        network = network_of(self, self.model_attribute)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        if masked_parameters(network) and not any(getattr(callback, "keeps_masks", False) for callback in callbacks):
            keep_masks(self.trainer.optimizers, network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the manifest."""
        assert isinstance(self, LightningModule)
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        save_to_checkpoint(self, checkpoint, self.model_attribute)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the compressed network before the weights load."""
        assert isinstance(self, LightningModule)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]  # the LightningModule's
        _restore(self, history_in(checkpoint), self.model_attribute)


def network_of(module: LightningModule, model_attribute: str) -> nn.Module:
    """The network that `module` holds; a compiled one (`torch.compile`) is unwrapped.

    Raises AttributeError naming the attribute and those that would do.
    """
    network = getattr(module, model_attribute, None)
    if not isinstance(network, nn.Module):
        children = [name for name, _ in module.named_children()]
        raise AttributeError(
            f"model_attribute={model_attribute!r}: {type(module).__name__} has no module of that name; it holds "
            f"{', '.join(children) or 'no modules'}. Pass the name of the one to compress."
        )
    inner = getattr(network, "_orig_mod", network)
    assert isinstance(inner, nn.Module)
    return inner


def put_network(module: LightningModule, model_attribute: str, network: nn.Module) -> None:
    """Put `network` in the place of the one that `module` holds, compiled where that is compiled.

    Of a quantized network the training is compiled; where that cannot be, a warning says so and it goes on uncompiled.
    """
    held = getattr(module, model_attribute)
    compiled, compiler = _compiler_of(held)
    if isinstance(network, QuantizedNetwork):
        if compiler is not None and network.method != "affine":
            network.compile_with(compiler)
        elif compiled:
            why = "its compiler is not known" if compiler is None else "method 'affine' cannot be traced"
            rank_zero_warn(
                f"{type(module).__name__}.{model_attribute} was compiled; quantized it trains uncompiled ({why})"
            )
    elif compiler is not None and network._compiled_call_impl is None:
        network = compiler(network)
    setattr(module, model_attribute, network)


def _compiler_of(held: nn.Module) -> tuple[bool, Callable[[Any], Any] | None]:
    """Whether `held` is compiled, by `torch.compile(held)` or `held.compile()`, and what compiles another likewise."""
    if isinstance(held, QuantizedNetwork):
        return held.compiler is not None, held.compiler
    if hasattr(held, "_orig_mod"):
        return True, getattr(held, "dynamo_ctx", None)
    call = held._compiled_call_impl
    cells = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    # torch has no public way from a compiled function to what compiled it.
    found = (each for each in cells if any(base.__name__ == "_TorchDynamoContext" for base in type(each).__mro__))
    return call is not None, next(found, None)


def save_to_checkpoint(module: LightningModule, checkpoint: dict[str, Any], model_attribute: str = "net") -> None:
    """Write the manifest of `module`'s network into `checkpoint`; writing it twice changes nothing."""
    history = copy.deepcopy(history_of(network_of(module, model_attribute)))
    checkpoint[CHECKPOINT_KEY] = {"version": MANIFEST_VERSION, "history": history}


def restore_on_load(module: LightningModule, model_attribute: str = "net") -> None:
    """From now on, bring `module`'s network to the architecture of any checkpoint that a trainer loads into it.

    For callbacks, in `setup`. Doing it twice, or for a module with the mixin, changes nothing.
    """
    network_of(module, model_attribute)  # a wrong name is found now
    mixed_in = isinstance(module, CompressionMixin) and module.model_attribute == model_attribute
    if not mixed_in and not isinstance(vars(module).get("on_load_checkpoint"), _RestoreFirst):
        hook = _RestoreFirst(module, model_attribute, module.on_load_checkpoint)
        module.on_load_checkpoint = hook  # type: ignore[method-assign]


class _RestoreFirst:
    """A module's `on_load_checkpoint` with the restoring in front; a class, so that it can be copied and pickled."""

    def __init__(self, module: LightningModule, model_attribute: str, then: Callable[[dict[str, Any]], None]) -> None:
        self.module, self.model_attribute, self.then = module, model_attribute, then

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        _restore(self.module, history_in(checkpoint), self.model_attribute)
        self.then(checkpoint)


def _restore(module: LightningModule, history: Sequence[Mapping[str, Any]], model_attribute: str) -> None:
    network = network_of(module, model_attribute)
    restored = restore_from_history(network, history)
    if restored is network:
        return
    put_network(module, model_attribute, restored)


def restore_from_checkpoint(
    module: LightningModule, ckpt_path: str | Path | None, model_attribute: str = "net"
) -> None:
    """Bring `module`'s network to the architecture of the checkpoint at `ckpt_path`, without its weights.

    None does nothing. For a callback's `setup` take `restore_on_load`: `trainer.ckpt_path` is not yet that of the run.
    """
    if ckpt_path is not None:
        _restore(module, history_in(_read(ckpt_path)), model_attribute)


def history_in(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The history in a checkpoint's manifest, empty where there is none; ValueError for another version."""
    manifest = checkpoint.get(CHECKPOINT_KEY)
    if manifest is None:
        return []
    if not isinstance(manifest, Mapping) or manifest.get("version") != MANIFEST_VERSION:
        found = manifest.get("version") if isinstance(manifest, Mapping) else manifest
        raise ValueError(
            f"the checkpoint's manifest has version {found!r}, this package reads {MANIFEST_VERSION}; update "
            "swincompress_pl"
        )
    return list(manifest["history"])


def restore_from_history(network: nn.Module, history: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The network with the history `history`: what `network` has beyond that is undone in shape, what is missing is
    replayed.

    Pruning and masks change `network` itself; quantization wraps it, so the result may be another object. Weights and
    masks are not right until those of the checkpoint are loaded.
    """
    for entry in history:
        if len(entry) != 1 or next(iter(entry)) not in _REPLAY:
            raise ValueError(
                f"the history holds an entry {list(entry)}, this package knows {list(_REPLAY)}; update swincompress_pl"
            )
    done = history_of(network)
    common = 0
    while common < min(len(done), len(history)) and done[common] == history[common]:
        common += 1
    if common < len(done):  # scales do not grow again: what was quantized before that is quantized anew
        common = min([common, *(number for number, entry in enumerate(done) if "quantize" in entry)])
    for entry in reversed(done[common:]):
        if "quantize" in entry:
            network = _inside(network)
        else:
            _UNDO[next(iter(entry))](_inside(network))
    for entry in history[common:]:
        (kind, data), *_ = entry.items()
        network = _REPLAY[kind](network, data)
    return network


def _read(ckpt_path: str | Path) -> Mapping[str, Any]:
    try:
        # Mapped, not read: only the manifest is needed here.
        checkpoint: Mapping[str, Any] = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{ckpt_path} holds more than tensors and plain data, so it is not read; save plain hyperparameters, or "
            f"allow the types with torch.serialization.add_safe_globals. {error}"
        ) from error
    return checkpoint
