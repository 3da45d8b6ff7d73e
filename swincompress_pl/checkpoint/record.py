"""The compression record: what a checkpoint says about the compression of a module's networks, beside the weights.

It is plain data under `checkpoint["swincompress_pl"]`. A module with one network has {"version": 1, "history": [...],
"network": path, ...}; a module with several has {"version": 2, "networks": {path: {"history": [...], ...}}}. A
`CompressibleClassifier` adds two keys of its own. No other module reads or writes these keys. Files of version 0.1 have
neither the path nor the structure.
"""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from swincompress_pl.checkpoint.restore import checked_history
from swincompress_pl.stored_data import from_plain
from swincompress_pl.structure import Description, check_description

CHECKPOINT_KEY = "swincompress_pl"
RECORD_VERSION = 1
SEVERAL_NETWORKS_VERSION = 2
INPUT_KEY = "swincompress_pl_input"
TEACHER_TAKEN_KEY = "swincompress_pl_teacher_taken"
UNNAMED = ""
"""The path of the network in a file that does not name one."""


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """What was done to one network.

    Attributes:
        history: The entries of its history, the oldest first; see `swincompress_pl.history`.
        structure: Its description, see `swincompress_pl.structure`; None if it is not known.
        attributes: {module: {attribute: value}} changed by hand on a network of `create_model`.
    """

    history: Sequence[Mapping[str, Any]]
    structure: Description | None = None
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data; an empty structure or attributes are left out."""
        more = {"structure": self.structure, "attributes": self.attributes}
        return copy.deepcopy({"history": list(self.history), **{key: value for key, value in more.items() if value}})

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> NetworkRecord:
        """Rebuilds what `to_dict` returned.

        Args:
            stored: The data, from a file.

        Returns:
            The record of the network.

        Raises:
            ValueError: If the data are damaged.
        """
        stored = from_plain(Mapping[str, Any], stored, "the compression record of a network")
        attributes = from_plain(dict[str, dict[str, Any]], stored.get("attributes", {}), "the record's attributes")
        structure = stored.get("structure")
        return cls(
            history=checked_history(stored.get("history")),
            structure=None if structure is None else check_description(structure),
            attributes=attributes,
        )


@dataclass(frozen=True, kw_only=True)
class CompressionRecord:
    """What a checkpoint says about the compression of a module.

    Attributes:
        networks: {path in the module: what was done to the network there}.
        input_description: That of a CompressibleClassifier; None for another module.
        teacher_taken: That of a CompressibleClassifier; None for another module.
    """

    networks: Mapping[str, NetworkRecord]
    input_description: Mapping[str, Any] | None = None
    teacher_taken: bool | None = None

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Puts a copy of the record into a checkpoint; a second call changes nothing.

        Args:
            checkpoint: The checkpoint that is about to be saved.
        """
        networks = {path: network.to_dict() for path, network in self.networks.items()}
        if len(networks) == 1:
            ((path, network),) = networks.items()
            checkpoint[CHECKPOINT_KEY] = {"version": RECORD_VERSION, "network": path, **network}
        else:
            checkpoint[CHECKPOINT_KEY] = {"version": SEVERAL_NETWORKS_VERSION, "networks": networks}
        if self.input_description is not None:
            checkpoint[INPUT_KEY] = copy.deepcopy(self.input_description)
        if self.teacher_taken is not None:
            checkpoint[TEACHER_TAKEN_KEY] = self.teacher_taken

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> CompressionRecord:
        """Reads the record of a checkpoint.

        Args:
            checkpoint: The checkpoint.

        Returns:
            The record, without networks if the checkpoint has none.

        Raises:
            ValueError: If the record is damaged, or of an unknown version.
        """
        return cls(
            networks=_networks_in(checkpoint),
            input_description=from_plain(Mapping[str, Any] | None, copy.deepcopy(checkpoint.get(INPUT_KEY)), INPUT_KEY),
            teacher_taken=from_plain(bool | None, checkpoint.get(TEACHER_TAKEN_KEY), TEACHER_TAKEN_KEY),
        )


def histories_in(checkpoint: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The histories in a checkpoint's record.

    Args:
        checkpoint: The checkpoint.

    Returns:
        {path of a network: its history}, empty without a record.

    Raises:
        ValueError: If the record is damaged, or of an unknown version.
    """
    return {path: [*map(dict, network.history)] for path, network in _networks_in(checkpoint).items()}


def _networks_in(checkpoint: Mapping[str, Any]) -> dict[str, NetworkRecord]:
    record = checkpoint.get(CHECKPOINT_KEY)
    if record is None:
        return {}
    version = record.get("version") if isinstance(record, Mapping) else record
    if type(version) is not int or version not in (RECORD_VERSION, SEVERAL_NETWORKS_VERSION):
        raise ValueError(
            f"the checkpoint's compression record has version {version!r}, this package reads {RECORD_VERSION} and "
            f"{SEVERAL_NETWORKS_VERSION}; update swincompress_pl"
        )
    if "networks" in record:
        networks = from_plain(dict[str, Any], record["networks"], "the compression record's networks")
    else:
        networks = {from_plain(str, record.get("network", UNNAMED), "the compression record's network"): record}
    return {path: NetworkRecord.from_dict(network) for path, network in networks.items()}


def check_form(checkpoint: Mapping[str, Any], parts: Sequence[str] = ("state_dict", "callbacks", "loops")) -> None:
    """Raises a ValueError, which names the part, if a part of a checkpoint is not a mapping with string keys."""
    for part in parts:
        from_plain(Mapping[str, Any], checkpoint.get(part, {}), f"the checkpoint's {part}")


def read_checkpoint(ckpt_path: str | Path) -> Mapping[str, Any]:
    """Reads a checkpoint without running code from it; its tensors are memory-mapped.

    Args:
        ckpt_path: The file.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds more than tensors and plain data, or is damaged.
    """
    try:
        checkpoint: Mapping[str, Any] = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{ckpt_path} holds more than tensors and plain data, so it is not read; save plain hyperparameters, or "
            f"allow the types with torch.serialization.add_safe_globals. {error}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # else nothing can be mapped
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{ckpt_path} is no checkpoint of plain data and tensors, or it is damaged: {reason}"
        ) from error
    if isinstance(checkpoint, Mapping):
        check_form(checkpoint, ("state_dict", "callbacks", "hyper_parameters"))
    return checkpoint
