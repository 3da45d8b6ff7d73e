"""What was done to a network, as plain data on the network itself: `compression_history`, and how it was created.

No other module reads or writes these attributes. An entry of the history is {kind: data}, and the oldest comes first.
Pruning and quantization append entries. `checkpoint` stores them in a checkpoint and replays them, and a Program
carries them as its `origin`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entry = dict[str, Any]
"""One of {"prune": plan}, {"mask": names}, {"unmask": names} and {"quantize": arguments of QuantizedNetwork}."""


def history_of(network: Any) -> list[Entry]:
    """The entries of `network.compression_history`, the oldest first."""
    return list(getattr(network, "compression_history", []))


def append_entry(network: Any, kind: str, data: Any) -> None:
    """Appends {kind: data} to the network's history."""
    network.compression_history = [*history_of(network), {kind: data}]


def drop_latest_entry(network: Any) -> None:
    """Removes the latest entry, because what it says was undone."""
    network.compression_history = history_of(network)[:-1]


def derives_its_history(network: Any) -> bool:
    """Whether `network` wraps another one and derives its history from it, so that nothing can be appended."""
    return isinstance(getattr(type(network), "compression_history", None), property)


def set_creation(network: Any, name: str, kwargs: Mapping[str, Any]) -> None:
    """Records that `models.create_model(name, **kwargs)` makes such a network, not yet compressed."""
    network.creation = {"name": name, "kwargs": dict(kwargs)}


def creation_of(network: Any) -> dict[str, Any] | None:
    """{"name", "kwargs"} of a network that `models.create_model` made; None for any other."""
    creation: dict[str, Any] | None = getattr(network, "creation", None)
    return creation


def set_class_names(network: Any, names: Sequence[str]) -> None:
    """Records the names of a network's classes, in the order of its logits; an artifact of it then has them."""
    network.class_names = tuple(names)


def class_names_of(network: Any) -> tuple[str, ...] | None:
    """The names of a network's classes; None if they are not known, or are not as many as the classes are now."""
    names = getattr(network, "class_names", None)
    return names if isinstance(names, tuple) and len(names) == getattr(network, "num_classes", None) else None


def note_size(network: Any, size: Mapping[str, Any]) -> None:
    """Records the arguments of size with which `network` was created, as JSON-able data."""
    network.created_size = dict(size)


def follow_size(network: Any, size: Mapping[str, Any]) -> dict[str, Any]:
    """Updates the arguments of creation to the present `size`, and returns those that changed.

    timm's `set_input_size` changes the size of a network.
    """
    creation, created = creation_of(network), getattr(network, "created_size", None)
    if creation is None or created is None:
        return {}
    changed = {name: value for name, value in size.items() if created.get(name) != value}
    if changed:
        set_creation(network, creation["name"], creation["kwargs"] | changed)
        note_size(network, size)
    return changed


def note_attributes(network: Any, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Records the plain attributes {module: {attribute: value}} changed by hand since `network` was created."""
    network.changed_attributes = {path: dict(values) for path, values in attributes.items()}


def noted_attributes(network: Any) -> dict[str, dict[str, Any]]:
    """What `note_attributes` recorded; empty if nothing was."""
    noted: dict[str, dict[str, Any]] = getattr(network, "changed_attributes", {})
    return noted


def origin_of(
    network: Any, history: list[Entry], attributes: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Where a Program comes from: what `models.rebuild` needs to build its float network again.

    `attributes` are {module: {attribute: value}}, changed by hand since the network was created.
    """
    changed = {"attributes": {path: dict(values) for path, values in attributes.items()}} if attributes else {}
    return {"network": creation_of(network), "history": history, **changed}


def summarize(entry: Mapping[str, Any]) -> str:
    """An entry as one line for a reader."""
    if "prune" in entry:
        groups = entry["prune"].get("groups", {})
        changed = [
            f"{name} {'' if group.get('units') is None else group['units']} -> {len(group['kept'])}"
            for name, group in groups.items()
        ]
        return f"prune {_listed(changed, 'groups')}"
    if "quantize" in entry:
        return f"quantize, method {entry['quantize'].get('method')}"
    for kind in ("mask", "unmask"):
        if kind in entry:
            return f"{kind} {_listed(entry[kind], 'weights')}"
    return f"{', '.join(entry)} (unknown to this version)"


def _listed(names: Sequence[str], what: str) -> str:
    """The number of names, and the first few."""
    return f"{len(names)} {what}: " + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
