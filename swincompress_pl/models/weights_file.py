"""Reads files of weights: safetensors and torch files of plain data, whole or in shards.

No code in a file is run: torch's files are read with `weights_only`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_INDEX = ".index.json"
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")  # the names in a folder of the Hugging Face hub
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


def read_weights_file(path: Path) -> Any:
    """Reads a file of weights.

    Args:
        path: A safetensors file (by its extension), a torch file, the index of a sharded one (`*.index.json`), or a
            folder with an index, `model.safetensors` or `pytorch_model.bin`.

    Returns:
        Tensors by name; a torch file may have other plain data around them.

    Raises:
        FileNotFoundError: If the file, or a shard of it, is missing.
        ValueError: If the file is none of these, is damaged, or holds more than tensors and plain data.
    """
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the weights file is missing; check the path.")
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def is_shard(path: Path) -> bool:
    """Whether a file's name says that it is one of several, such as "model-00001-of-00002.safetensors"."""
    return _SHARD.search(path.name) is not None


def _file_in(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{_INDEX}")) or [folder / name for name in _ONE_FILE if (folder / name).is_file()][:1]
    if len(found) != 1:
        raise ValueError(
            f"{folder}: is a folder with {len(found)} files of weights ({_INDEX} files, {', '.join(_ONE_FILE)}); pass "
            "the file itself. For a sharded Lightning checkpoint, make one file by "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    return found[0]


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index}: not the index of a sharded file: it has no 'weight_map' of names ({type(error).__name__})."
        ) from error
    state: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:"):
            raise ValueError(f"{index}: names the shard {name!r}; shards must lie in the folder of their index.")
        if name.endswith(_INDEX):
            raise ValueError(f"{index}: names the shard {name!r}, an index; a shard holds tensors.")
        shard = read_weights_file(index.parent / name)
        wanted = [key for key, file in weight_map.items() if file == name]
        absent = [key for key in wanted if not isinstance(shard, dict) or not isinstance(shard.get(key), Tensor)]
        if absent:
            raise ValueError(f"{index.parent / name}: lacks {len(absent)} of its tensors ({', '.join(absent[:3])}).")
        state |= {key: shard[key] for key in wanted}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut off ({error}).") from error


def _read_torch(path: Path) -> Any:
    try:
        # timm's train.py saves its arguments beside the weights; a Namespace is plain data with another name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything that its unpickler and the zip reader raise
        reason = str(error).strip().partition("\n")[0][:200]
        held = _other_types(path) if isinstance(error, pickle.UnpicklingError) else []
        if not held:
            raise ValueError(
                f"{path}: not a torch file of plain tensors ({type(error).__name__}: {reason})."
            ) from error
        raise ValueError(
            f"{path}: not a torch file of plain tensors: it holds {', '.join(held[:5])}"
            f"{', ...' if held[5:] else ''}, and unpickling that can run code. Where the file comes from, save the "
            f"state dict alone: torch.save(model.state_dict(), ...)."
        ) from error


def _other_types(path: Path) -> list[str]:
    """The types in a torch file that `weights_only` refuses; [] if it is not a torch file."""
    try:
        return sorted(ascii(name)[1:-1] for name in torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # as above
        return []
