"""The compression record: what a checkpoint says of the network's compression, beside the weights.

It is plain data: `checkpoint["swincompress_pl"] = {"version": 1, "history": [...]}`, the network's history, oldest
entry first, and, of a `CompressibleClassifier`, two keys of its own. Nothing else reads or writes these keys.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swincompress_pl.checkpoint.restore import checked_history
from swincompress_pl.stored_data import from_plain

CHECKPOINT_KEY = "swincompress_pl"
RECORD_VERSION = 1
INPUT_KEY = "swincompress_pl_input"
TEACHER_TAKEN_KEY = "swincompress_pl_teacher_taken"


@dataclass(frozen=True, kw_only=True)
class CompressionRecord:
    """history: what was done to the network (`swincompress_pl.history`). input_description, teacher_taken: those of a
    CompressibleClassifier, None of another module."""

    history: Sequence[Mapping[str, Any]]
    input_description: Mapping[str, Any] | None = None
    teacher_taken: bool | None = None

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Put a copy into `checkpoint`; doing it twice changes nothing."""
        checkpoint[CHECKPOINT_KEY] = {"version": RECORD_VERSION, "history": copy.deepcopy(list(self.history))}
        if self.input_description is not None:
            checkpoint[INPUT_KEY] = copy.deepcopy(self.input_description)
        if self.teacher_taken is not None:
            checkpoint[TEACHER_TAKEN_KEY] = self.teacher_taken

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> CompressionRecord:
        """What stands in `checkpoint`; ValueError for another version."""
        return cls(
            history=history_in(checkpoint),
            input_description=from_plain(Mapping[str, Any] | None, copy.deepcopy(checkpoint.get(INPUT_KEY)), INPUT_KEY),
            teacher_taken=from_plain(bool | None, checkpoint.get(TEACHER_TAKEN_KEY), TEACHER_TAKEN_KEY),
        )


def history_in(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The history in a checkpoint's record, empty where there is none; ValueError for another version."""
    record = checkpoint.get(CHECKPOINT_KEY)
    if record is None:
        return []
    if not isinstance(record, Mapping) or record.get("version") != RECORD_VERSION:
        found = record.get("version") if isinstance(record, Mapping) else record
        raise ValueError(
            f"the checkpoint's compression record has version {found!r}, this package reads {RECORD_VERSION}; update "
            "swincompress_pl"
        )
    return checked_history(record.get("history"))


def check_form(checkpoint: Mapping[str, Any], parts: Sequence[str] = ("state_dict", "callbacks", "loops")) -> None:
    """ValueError, naming the part, for a checkpoint whose parts are no mappings by name."""
    for part in parts:
        from_plain(Mapping[str, Any], checkpoint.get(part, {}), f"the checkpoint's {part}")


def read_checkpoint(ckpt_path: str | Path) -> Mapping[str, Any]:
    """A checkpoint, without running any code that it may hold; its tensors are mapped and read when they are used.

    Raises ValueError where it holds more than tensors and plain data, or is damaged.
    """
    try:
        checkpoint: Mapping[str, Any] = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{ckpt_path} holds more than tensors and plain data, so it is not read; save plain hyperparameters, or "
            f"allow the types with torch.serialization.add_safe_globals. {error}"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{ckpt_path} is no checkpoint of plain data and tensors, or it is damaged: {reason}"
        ) from error
    if isinstance(checkpoint, Mapping):
        check_form(checkpoint, ("state_dict", "callbacks", "hyper_parameters"))
    return checkpoint
