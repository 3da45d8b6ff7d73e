"""Relative paths in a config: weights and data are looked for beside it, outputs go below the working directory.

An argument of a model or a datamodule counts as a path if its annotation admits `pathlib.Path`.
"""

from __future__ import annotations

import importlib
import sys
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from swincompress_pl.cli.early import is_no_path

_ROLES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}


def import_from(folder: Path) -> None:
    """Lets classes of a folder's modules be named in configs and options, behind all that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def with_absolute_paths(config: dict[str, Any], folder: Path, working: Path, default_model: str) -> dict[str, Any]:
    """A config, or the part of it for one class, whose paths of inputs are absolute.

    Args:
        config: Content of a config file.
        folder: Folder of the file; relative paths are relative to it.
        working: The working directory, for paths that are there and not in `folder`, as older configs have them.
        default_model: Path of the model's class, where the config names none.

    Returns:
        A copy with other paths.
    """
    config = dict(config)
    if isinstance(config.get("class_path"), str) and isinstance(config.get("init_args"), dict):
        return _of_class(config, config["class_path"], folder, working)
    for role in _ROLES:
        part = config.get(role)
        if isinstance(part, dict):
            named = {"class_path": default_model} if role == "model" else {}
            config[role] = _of_class({**named, **part}, (named | part).get("class_path"), folder, working)
    checkpoint = config.get("ckpt_path")
    if isinstance(checkpoint, str) and (folder / checkpoint).exists() and not is_no_path(checkpoint):
        config["ckpt_path"] = str((folder / checkpoint).resolve())
    return config


def _of_class(part: dict[str, Any], class_path: Any, folder: Path, working: Path) -> dict[str, Any]:
    names = path_arguments(class_path)
    key = "init_args" if isinstance(part.get("init_args"), dict) else None
    arguments: dict[str, Any] = part[key] if key else part
    found = {
        name: _absolute(name, value, folder, working)
        for name, value in arguments.items()
        if name in names and isinstance(value, str) and value
    }
    return part | ({key: arguments | found} if key else found)


def _absolute(name: str, value: str, folder: Path, working: Path) -> str:
    path = Path(value).expanduser()
    if "://" in value or path.is_absolute():
        return value if "://" in value else str(path)
    if not (folder / path).exists() and (working / path).exists():
        warnings.warn(
            f"{name}: {value} is not in {folder}, the folder of the config, but in the working directory, and taken "
            "from there; paths in a config are relative to its folder",
            stacklevel=2,
        )
        folder = working
    return str((folder / path).resolve())


def path_arguments(class_path: Any) -> set[str]:
    """The arguments of a model's or a datamodule's class that are paths; nothing for what is no such class."""
    kind = _class_of(class_path)
    names: set[str] = set()
    for base in kind.__mro__ if kind else ():
        try:
            hints: Mapping[str, Any] = typing.get_type_hints(vars(base).get("__init__"))
        except (NameError, TypeError, AttributeError):
            continue  # an annotation that cannot be evaluated; the parser has its own means
        names |= {name for name, hint in hints.items() if hint is Path or Path in typing.get_args(hint)}
    return names


def _class_of(class_path: Any) -> type | None:
    """The class that a config names, by its path or, as jsonargparse allows, by its name alone."""
    if not isinstance(class_path, str):
        return None
    module, _, name = class_path.rpartition(".")
    if not module:
        return next((kind for base in _ROLES.values() for kind in _below(base) if kind.__name__ == name), None)
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None  # the parser says so
    return kind if isinstance(kind, type) and issubclass(kind, tuple(_ROLES.values())) else None


def _below(kind: type) -> list[type]:
    found = [kind]
    each: type
    for each in kind.__subclasses__():
        found += _below(each)
    return found
