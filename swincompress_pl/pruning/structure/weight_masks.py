"""Masks of weights: which entries of a parameter are pruned.

The parameter `<module>.weight` has a persistent bool buffer `<module>.weight_mask` of the same shape beside it, True
where kept. The weight stays a plain parameter that is exactly 0 where the mask is False, and `keep_masks` sets it to 0
again after each optimizer step. So state dicts, torch.compile, mixed precision, DDP, averaging of weights and
quantization see an ordinary network.

    register_masks(network, ["blocks.0.mlp.fc1.weight"])
    set_mask(network, "blocks.0.mlp.fc1.weight", parse_granularity("2:4").keep_mask(saliency, keep=2))
    handle = keep_masks(optimizer, network)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from swincompress_pl.evaluation_mode import outside_inference_mode
from swincompress_pl.history import append_entry, derives_its_history, drop_latest_entry, history_of
from swincompress_pl.interrupts import all_or_nothing, put_back_after, unwritten
from swincompress_pl.masks import MASK_SUFFIX, is_mask
from swincompress_pl.masks import masked_parameters as masked_parameters

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def register_masks(network: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Gives parameters masks that keep everything; returns the names of those that had none before.

    They are appended to `network.compression_history` as {"mask": [...]}. Parameters that have a mask keep it as it is.
    Raises ValueError, and changes nothing, if a parameter is unknown or shared by two places, or its mask's name is
    taken. The same holds if the network wraps another and keeps no history of its own.
    """
    _check_has_history(network)
    wanted = tuple(dict.fromkeys(names))
    _check_maskable(network, wanted)
    masked = masked_parameters(network)
    new = tuple(name for name in wanted if name not in masked)
    with all_or_nothing(network):
        _add_masks(network, new)
        if new:
            append_entry(network, "mask", list(new))
        return new


def remove_masks(network: nn.Module, names: Iterable[str]) -> None:
    """Removes the masks of parameters; the weights stay as they are, and may be trained again.

    They are appended to `network.compression_history` as {"unmask": [...]}. Raises ValueError, and changes nothing, if
    a parameter has no mask.
    """
    _check_has_history(network)
    gone = tuple(dict.fromkeys(names))
    with all_or_nothing(network):
        _drop_masks(network, gone)
        if gone:
            append_entry(network, "unmask", list(gone))


def undo_latest_masks(network: nn.Module) -> None:
    """Undoes, in the names of the state dict, the latest entry of the network's history, "mask" or "unmask".

    The weights stay. Masks that come back keep everything until a checkpoint fills them.
    """
    history = history_of(network)
    if not history or not history[-1].keys() & {"mask", "unmask"}:
        raise ValueError(f"{type(network).__name__}: the latest entry of its history is not about masks")
    _check_has_history(network)
    (kind, names), *_ = history[-1].items()
    with all_or_nothing(network):
        if kind == "mask":
            _drop_masks(network, names)
        else:
            _check_maskable(network, names)
            _add_masks(network, names)
        drop_latest_entry(network)


@torch.no_grad()
def set_mask(network: nn.Module, name: str, mask: Tensor) -> None:
    """Sets the mask of a parameter (bool, of its shape, True where kept), and the weights outside of it to 0.

    The buffer and the weight are written in place. Weights that an earlier mask has set to 0 stay 0. Raises ValueError
    if the parameter has no registered mask, or the mask has another shape or dtype.
    """
    masked = masked_parameters(network)
    if name not in masked:
        raise ValueError(f"{name}: it has no mask; register_masks(network, [{name!r}]) comes first")
    parameter, buffer = masked[name]
    checked = _checked_mask(name, parameter, mask)
    with all_or_nothing(written=[network.get_submodule(name.rpartition(".")[0])]):
        buffer.copy_(checked)
        _zero(parameter, buffer)


@torch.no_grad()
def enforce_masks(network: nn.Module) -> None:
    """Sets every masked weight to exactly 0.0 in place, even if it is NaN."""
    for parameter, mask in masked_parameters(network).values():
        _zero(parameter, mask)


class MaskKeeper:
    """What `keep_masks` returns: `enforce()` sets masked weights to 0 now, and `remove()` ends it."""

    def __init__(self, handles: Iterable[RemovableHandle], network: nn.Module) -> None:
        self._handles, self._network = tuple(handles), network

    def enforce(self) -> None:
        """Sets masked weights to 0 now; for optimizers that change weights outside of `step`."""
        enforce_masks(self._network)

    def remove(self) -> None:
        """Ends it: later optimizer steps no longer set masked weights to 0."""
        for handle in self._handles:
            handle.remove()


def keep_masks(optimizers: Optimizer | Iterable[Optimizer], network: nn.Module) -> MaskKeeper:
    """Sets masked weights to exactly 0 now, and after each step of some optimizers.

    Masks and parameters are looked up at each step, so they may change or be sliced meanwhile. The optimizers' state is
    left alone. A copied or unpickled optimizer has no hooks: call this for it again.

    Args:
        optimizers: One optimizer or several.
        network: The network with the masks.

    Returns:
        A handle: `enforce()` sets masked weights to 0 at any time, and `remove()` ends it.
    """
    enforce_masks(network)

    def enforce(*_: Any) -> None:
        enforce_masks(network)

    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    with all_or_nothing(*listed):
        return MaskKeeper([optimizer.register_step_post_hook(enforce) for optimizer in listed], network)


@contextmanager
def temporary_mask(network: nn.Module, name: str, mask: Tensor) -> Iterator[None]:
    """Inside the context, a parameter is 0 where `mask` is False; afterwards it is restored bit by bit.

    It needs no registered mask and changes none. Contexts nest: leave them in reverse order. Do not train weights
    inside, or the change is lost. Raises ValueError if the parameter is unknown, or the mask's shape or dtype is wrong.
    """
    _check_known(network, name)
    parameter = network.get_parameter(name)
    gone = ~_checked_mask(name, parameter, mask).to(parameter.device)
    values = parameter.detach()[gone]

    def put_back() -> None:
        parameter.detach().masked_scatter_(gone, values)

    with put_back_after(put_back, unwritten(parameter, writes=1)):
        _zero(parameter.detach(), ~gone)
        yield


def count_nonzero(network: nn.Module) -> int:
    """The number of parameter elements that are not 0; shared parameters count once."""
    return sum(int(parameter.detach().count_nonzero()) for parameter in network.parameters())


def masked_shares(network: nn.Module) -> dict[str, float]:
    """Maps a masked parameter to the part of its weights that is masked, 0 to 1."""
    return {name: 1 - int(mask.sum()) / mask.numel() for name, (_, mask) in masked_parameters(network).items()}


def masked_share(network: nn.Module) -> float:
    """The masked part of the weights of all masked parameters together, 0 to 1; 0 without masks."""
    masks = [mask for _, mask in masked_parameters(network).values()]
    kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return 1 - kept / total if total else 0.0


def _zero(parameter: Tensor, mask: Tensor) -> None:
    # Multiplies the bits, read as integers, by 0 or 1. This gives +0 for NaN and negative weights too, and is much
    # faster than masked_fill_.
    parameter.view(_INTEGERS[parameter.element_size()]).mul_(mask)


def _checked_mask(name: str, parameter: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"{name}: a bool mask of shape {tuple(parameter.shape)} is expected (True = kept), not {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    return mask


def _check_has_history(network: nn.Module) -> None:
    if derives_its_history(network):
        raise ValueError(
            f"{type(network).__name__} wraps a network and keeps no history of its own; change the masks of its "
            ".network"
        )


def _check_known(network: nn.Module, name: str) -> None:
    names = [known for known, _ in network.named_parameters(remove_duplicate=False)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 2)
        raise ValueError(
            f"{name}: {type(network).__name__} has no parameter of that name"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
            + " A parametrization or torch.nn.utils.prune that computes it has to be removed first."
        )


def _check_maskable(network: nn.Module, names: Iterable[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        _check_known(network, name)
        parameter = network.get_parameter(name)
        if len(places := owners[id(parameter)]) > 1:
            raise ValueError(
                f"{name}: the parameter is shared ({', '.join(places)}), so a mask here would prune the other place "
                "too. Untie it first: give each place its own nn.Parameter"
            )
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        there = getattr(module, leaf + MASK_SUFFIX, None)
        free = not hasattr(module, leaf + MASK_SUFFIX)
        if not free and not (isinstance(there, Tensor) and is_mask(module, leaf, parameter, there)):
            raise ValueError(
                f"{name}: {name}{MASK_SUFFIX} is taken by something that is not a bool mask of its shape; rename it"
            )


@outside_inference_mode()
def _add_masks(network: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        mask = torch.ones_like(network.get_parameter(name), dtype=torch.bool, requires_grad=False)
        network.get_submodule(path).register_buffer(leaf + MASK_SUFFIX, mask)


def _drop_masks(network: nn.Module, names: Iterable[str]) -> None:
    masked = masked_parameters(network)
    for name in names:
        if name not in masked:
            raise ValueError(f"{name}: it has no mask to remove; masked are {', '.join(masked) or 'no parameters'}")
    for name in names:
        path, _, leaf = name.rpartition(".")
        delattr(network.get_submodule(path), leaf + MASK_SUFFIX)
