"""Replays the entries of a history on a network, or undoes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from swincompress_pl.checkpoint.holder import float_network
from swincompress_pl.history import history_of
from swincompress_pl.pruning.structure.apply import apply_plan
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.regrow import regrow_latest_plan
from swincompress_pl.pruning.structure.weight_masks import register_masks, remove_masks, undo_latest_masks
from swincompress_pl.quant import Bits, QuantizedNetwork
from swincompress_pl.quant.full_precision import bring_to_float32
from swincompress_pl.quant.preprocessing import checked_preprocessing
from swincompress_pl.quant.silent_hooks import warn_of_silent_hooks
from swincompress_pl.stored_data import from_plain, reading


def _replay_prune(network: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    applied = apply_plan(float_network(network), PruningPlan.from_dict(data))
    if isinstance(network, QuantizedNetwork):
        network.follow({sliced.name: dict(sliced.kept) for sliced in applied.tensors})
    return network


def _replay_quantize(network: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    quantized = QuantizedNetwork(network, **data)
    bring_to_float32(network)
    quantized.keep_mode()
    warn_of_silent_hooks(network, quantized.graph)
    return quantized


def _replay_mask(network: nn.Module, names: Sequence[str]) -> nn.Module:
    register_masks(float_network(network), names)
    return network


def _replay_unmask(network: nn.Module, names: Sequence[str]) -> nn.Module:
    remove_masks(float_network(network), names)
    return network


# {kind of entry: function that replays it on a network and returns the network that takes its place}
_REPLAY: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "prune": _replay_prune,
    "mask": _replay_mask,
    "unmask": _replay_unmask,
    "quantize": _replay_quantize,
}
# {kind of entry: function that undoes the latest one, in the state dict's names and shapes}; quantization is unwrapped
_UNDO: dict[str, Callable[[nn.Module], None]] = {
    "prune": regrow_latest_plan,
    "mask": undo_latest_masks,
    "unmask": undo_latest_masks,
}


@dataclass(frozen=True, kw_only=True)
class _Quantization:
    """The stored arguments of `QuantizedNetwork`."""

    method: str
    preprocessing: dict[str, Any]
    classes: list[str] | None = None
    bits: Any = "W8A8"
    unsigned: tuple[str, ...] = ()
    learned_scales: bool = False
    without_signal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Bits.of(self.bits)
        checked_preprocessing(self.preprocessing)


# {kind of entry: function that raises a ValueError for data that is none of it}
_FORMS: dict[str, Callable[[Any], Any]] = {
    "prune": PruningPlan.from_dict,
    "mask": partial(from_plain, list[str], name="names"),
    "unmask": partial(from_plain, list[str], name="names"),
    "quantize": partial(from_plain, _Quantization, name="arguments"),
}


def checked_history(history: Any) -> list[dict[str, Any]]:
    """The entries; raises a ValueError, which names the entry, for damaged data. Entries of unknown kinds pass."""
    entries: list[dict[str, Any]] = from_plain(list[dict[str, Any]], history, "the compression record's history")
    for number, entry in enumerate(entries):
        for kind, data in entry.items():
            if kind in _FORMS:
                with _entry(number, kind):
                    _FORMS[kind](data)
    return entries


def _entry(number: int, kind: str) -> AbstractContextManager[None]:
    return reading(f"the compression record's history[{number}] ({kind})")


def restore_from_history(network: nn.Module, history: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Gives a network the history `history`: entries that it has beyond are undone, and missing ones are replayed.

    Undoing restores shapes and names only. Pruning and masks change `network` itself; quantization wraps it, so the
    result may be another object. Weights and masks are not right until those of the checkpoint are loaded.

    Args:
        network: The network.
        history: The entries that it is to have, the oldest first.

    Returns:
        The network with this history.

    Raises:
        ValueError: If an entry is damaged, of an unknown kind, or does not fit the network.
    """
    history = checked_history(history)
    for entry in history:
        if len(entry) != 1 or next(iter(entry)) not in _REPLAY:
            raise ValueError(
                f"the history holds an entry {list(entry)}, this package knows {list(_REPLAY)}; update swincompress_pl"
            )
    done = history_of(network)
    common = 0
    while common < min(len(done), len(history)) and done[common] == history[common]:
        common += 1
    if common < len(done):  # cut scales do not grow back: quantization is undone and replayed
        common = min([common, *(number for number, entry in enumerate(done) if "quantize" in entry)])
    for entry in reversed(done[common:]):
        if "quantize" in entry:
            network = float_network(network)
        else:
            _UNDO[next(iter(entry))](float_network(network))
    for number, entry in enumerate(history[common:], common):
        (kind, data), *_ = entry.items()
        with _entry(number, kind):
            network = _REPLAY[kind](network, data)
    return network
