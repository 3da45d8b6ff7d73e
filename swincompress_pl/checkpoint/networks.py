"""The networks of a module and the records of them: which there are, what is written of each, what is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule

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
    """Where the networks are whose record `module` keeps: CompressionMixin's first, then as callbacks and checkpoints
    named them."""
    own = getattr(module, "model_attribute", None)  # CompressionMixin's
    named: list[str] = vars(module).get(_PATHS, [])
    if not isinstance(own, str) or (named and not has_network(module, own)):
        return list(named)
    return list(dict.fromkeys([own, *named]))


def add_path(module: LightningModule, model_attribute: str) -> None:
    """From now on keep the record of the network at `model_attribute` too."""
    if model_attribute not in paths_of(module):
        vars(module)[_PATHS] = [*vars(module).get(_PATHS, []), model_attribute]


def record_of(module: LightningModule) -> CompressionRecord:
    """What is to be said of the networks of `module`: those at its paths, and all that are compressed."""
    paths = dict.fromkeys([*paths_of(module), *compressed_paths(module)])
    return CompressionRecord(networks={path: _network_record(module, path) for path in paths})


def _network_record(module: LightningModule, path: str) -> NetworkRecord:
    held = network_of(module, path)
    network = float_network(held)
    return NetworkRecord(
        history=history_of(held),
        structure=describe(network) if is_supported(held) else None,
        attributes=_changed(network),
    )


def _changed(network: Any) -> ChangedAttributes:
    try:
        return changed_attributes(network)
    except ValueError:  # beyond attributes: loading compares the structure with that of the network it finds
        return {}


def restore_networks(
    module: LightningModule, checkpoint: Mapping[str, Any], model_attribute: str | None = None
) -> None:
    """Bring the networks of `module` to the architecture that the record in `checkpoint` says.

    model_attribute: where the network goes of a record with one; by default where it was. Raises ValueError for a
    record of a network that the module does not hold, and where a network computes something else than the recorded
    one though its keys are the same.
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
    """{path: record} of all networks that are to be restored, those included that were not compressed yet."""
    recorded = dict(CompressionRecord.read(checkpoint).networks)
    plain = NetworkRecord(history=[])
    if not recorded:  # written before there was anything of ours
        return dict.fromkeys([model_attribute] if model_attribute else paths_of(module), plain)
    if len(recorded) == 1 and (model_attribute or UNNAMED in recorded):
        (only,) = recorded.values()
        return {model_attribute or _only_path(module, only): only}
    return dict.fromkeys([*paths_of(module), *compressed_paths(module)], plain) | recorded


def _only_path(module: LightningModule, record: NetworkRecord) -> str:
    """The path of a network whose record does not say it, from a file of version 0.1."""
    paths = paths_of(module)
    if len(paths) > 1 and record.history:
        raise ValueError(
            f"the checkpoint's compression record does not say of which network it is (it was written by version 0.1), "
            f"and {type(module).__name__} has {', '.join(map(repr, paths))} to choose from; load it with the callbacks "
            "of that network alone"
        )
    return paths[0] if paths else "net"


def _restore(module: LightningModule, path: str, record: NetworkRecord) -> None:
    network = network_of(module, path)
    if record.attributes and creation_of(float_network(network)) is not None:
        set_attributes(float_network(network), record.attributes)  # first: the graph follows them
        note_attributes(float_network(network), record.attributes)
    restored = restore_from_history(network, masks_as_named_in(float_network(network), record.history))
    if restored is not network:
        put_network(module, path, restored)


def _check(module: LightningModule, path: str, record: NetworkRecord) -> None:
    if record.structure is None:
        return
    found = list(differences(record.structure, describe(float_network(network_of(module, path)))))
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"the checkpoint's network at {path!r} computes something else than that of this {type(module).__name__}, "
            f"though their weights have the same names: {found[0]}{more}. Make the network as it was when it was "
            "saved, and change it after it is loaded"
        )
