"""The networks of a module and their records: which there are, what is written and what is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule
from torch import nn

from swincompress_pl.checkpoint.averaging import renew_averages
from swincompress_pl.checkpoint.compiled_keys import masks_as_named_in
from swincompress_pl.checkpoint.holder import (
    compressed_paths,
    float_network,
    has_network,
    is_supported,
    network_of,
    networks_to_name,
    put_network,
)
from swincompress_pl.checkpoint.record import UNNAMED, CompressionRecord, NetworkRecord
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.history import creation_of, history_of, note_attributes
from swincompress_pl.registry import ChangedAttributes, changed_attributes
from swincompress_pl.structure import describe, differences, set_attributes

_PATHS = "_compressed_networks"


def paths_of(module: LightningModule) -> list[str]:
    """The paths of the networks whose record `module` keeps.

    That of CompressionMixin comes first, then those that callbacks and checkpoints named.
    """
    own = getattr(module, "model_attribute", None)  # CompressionMixin's
    named: list[str] = vars(module).get(_PATHS, [])
    if not isinstance(own, str) or (named and not has_network(module, own)):
        return list(named)
    return list(dict.fromkeys([own, *named]))


def add_path(module: LightningModule, model_attribute: str) -> None:
    """Adds the network at `model_attribute` to those whose record is kept."""
    if model_attribute not in paths_of(module):
        vars(module)[_PATHS] = [*vars(module).get(_PATHS, []), model_attribute]


def record_of(module: LightningModule) -> CompressionRecord:
    """The record of the networks of `module`: those at its paths, and all that are compressed."""
    paths = dict.fromkeys([*paths_of(module), *compressed_paths(module)])
    return CompressionRecord(networks={path: record_of_network(network_of(module, path)) for path in paths})


def record_of_network(network: nn.Module) -> NetworkRecord:
    """What was done to a network, and what its state dict does not say."""
    inner = float_network(network)
    return NetworkRecord(
        history=history_of(network),
        structure=describe(inner) if is_supported(network) else None,
        attributes=_changed(inner),
    )


def _changed(network: Any) -> ChangedAttributes:
    try:
        return changed_attributes(network)
    except ValueError:  # more than attributes: loading compares the structure
        return {}


def restore_networks(
    module: LightningModule, checkpoint: Mapping[str, Any], model_attribute: str | None = None
) -> None:
    """Gives the networks of `module` the architecture that the record in `checkpoint` says.

    Args:
        module: The module.
        checkpoint: The checkpoint with the record.
        model_attribute: Where to put the network of a record with one network; None for its recorded place.

    Raises:
        ValueError: If the module does not hold a recorded network, or holds one with the same keys that computes
            something else.
    """
    recorded = _recorded(module, checkpoint, model_attribute)
    for path, record in recorded.items():
        if record.history and not has_network(module, path):
            raise ValueError(
                f"the checkpoint's compression record is of a network at {path!r}, and {type(module).__name__} holds "
                f"none there; {networks_to_name(module)}, or name the network as it was when the checkpoint was written"
            )
    networks = {path: record for path, record in recorded.items() if has_network(module, path)}
    before = {path: history_of(network_of(module, path)) for path in networks}
    for path, record in networks.items():
        _restore(module, path, record)
        add_path(module, path)
    if any(list(record.history) != before[path] for path, record in networks.items()) and module._trainer is not None:
        renew_averages(module.trainer, module)
    for path, record in networks.items():
        _check(module, path, record)


def _recorded(
    module: LightningModule, checkpoint: Mapping[str, Any], model_attribute: str | None
) -> dict[str, NetworkRecord]:
    """{path: record} of all networks to restore, including those that were not compressed yet."""
    recorded = dict(CompressionRecord.read(checkpoint).networks)
    plain = NetworkRecord(history=[])
    if not recorded:  # written without this package
        return dict.fromkeys([model_attribute] if model_attribute else paths_of(module), plain)
    if len(recorded) == 1 and (model_attribute or UNNAMED in recorded):
        (only,) = recorded.values()
        return {model_attribute or _only_path(module, only): only}
    return dict.fromkeys([*paths_of(module), *compressed_paths(module)], plain) | recorded


def _only_path(module: LightningModule, record: NetworkRecord) -> str:
    """The path of a network whose record does not name one, as in files of version 0.1."""
    paths = paths_of(module)
    if len(paths) > 1 and record.history:
        raise ValueError(
            f"the checkpoint's compression record does not say which network it is of (it was written by version 0.1), "
            f"and {type(module).__name__} has {', '.join(map(repr, paths))} to choose from; load it with the callbacks "
            "of that network alone"
        )
    return paths[0] if paths else "net"


def _restore(module: LightningModule, path: str, record: NetworkRecord) -> None:
    network = network_of(module, path)
    restored = restored_network(network, record)
    if restored is not network:
        put_network(module, path, restored)


def restored_network(network: nn.Module, record: NetworkRecord) -> nn.Module:
    """Gives a network the architecture of a record; quantization wraps it, so the result may be another object."""
    inner = float_network(network)
    if record.attributes and creation_of(inner) is not None:
        set_attributes(inner, record.attributes)  # first: the graph follows them
        note_attributes(inner, record.attributes)
    return restore_from_history(network, masks_as_named_in(inner, record.history))


def _check(module: LightningModule, path: str, record: NetworkRecord) -> None:
    found = difference_from(network_of(module, path), record)
    if found is not None:
        raise ValueError(
            f"the checkpoint's network at {path!r} computes something else than that of this {type(module).__name__}, "
            f"though their weights have the same names: {found}. Make the network as it was when it was "
            "saved, and change it after it is loaded"
        )


def difference_from(network: nn.Module, record: NetworkRecord) -> str | None:
    """What a network computes otherwise than the recorded one, as far as it is known; None for nothing."""
    if record.structure is None:
        return None
    found = list(differences(record.structure, describe(float_network(network))))
    if not found:
        return None
    return f"{found[0]}, and {len(found) - 1} more" if len(found) > 1 else str(found[0])
