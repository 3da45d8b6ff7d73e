"""Arguments of a network as checkpoints and artifacts store them: plain data, and nothing that could be fetched.

A network that is built again gets its weights from the file that stores the arguments. So the source of its first
weights is not stored, and is ignored, with a warning, if a file names one.
"""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from swincompress_pl.arguments import shown

# Arguments that only say where weights come from, and how they are taken from there.
_SOURCES = {
    "pretrained",
    "checkpoint_path",
    "cache_dir",
    "pretrained_strict",
    "pretrained_custom_load",
    "pretrained_model_args",
}
# timm's descriptions of published weights, and the fields of them that shape a network or its preprocessing.
_DESCRIPTIONS = {"pretrained_cfg", "pretrained_cfg_overlay"}
_FIELDS = {
    "architecture",
    "tag",
    "input_size",
    "test_input_size",
    "min_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "pool_size",
    "test_pool_size",
    "first_conv",
    "classifier",
}
_PLACE = re.compile(
    r"(^|_)(url|uri|file|filename|dir|folder|hub|repo|revision|checkpoint|ckpt|weights|download|cache|pretrained|"
    r"state_dict|fn)(_|$)",
    re.IGNORECASE,
)
_PARTS = {"pretrained_window_sizes"}  # arguments that shape a network for all that _PLACE says
_NAME = re.compile(r"[\w.+-]{0,64}", re.ASCII)  # "layernorm", "avg": no URL, no path, no "owner/name" of a hub
_MAX_DEPTH = 8
_MOST, _MOST_BLOCKS = 1 << 20, 1000  # limits of the numbers in an argument, and in one for blocks (`depth`, `depths`)

_restoring: ContextVar[bool] = ContextVar("_restoring", default=False)


def storable(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the network `name` as JSON data, without those that only give its first weights.

    Raises a ValueError that names the argument if one is not plain data, or could name a place.
    """
    kept, _ = _split(kwargs)
    return {key: _as_data(name, key, value) for key, value in kept.items()}


def checked_creation(creation: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and arguments of a stored `network.creation`; sources of weights are left out, with a warning.

    Raises a ValueError that names the argument if one is not plain data, or could name a place.
    """
    name = creation.get("name") if isinstance(creation, Mapping) else None
    kwargs = creation.get("kwargs") if isinstance(creation, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(kwargs, Mapping):
        raise ValueError(
            f"the stored description of the network, {reprlib.repr(creation)}, is not {{'name': a model's name, "
            "'kwargs': its arguments}; build networks with models.create_model"
        )
    return name, without_sources(name, kwargs)


def without_sources(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The stored arguments of the network `name` that it may be given; see `checked_creation`."""
    kept, left_out = _split(kwargs)
    checked = {key: _as_data(name, key, value) for key, value in kept.items()}
    if left_out:
        what = ", ".join(f"{ascii(key)[1:-1]}={ascii(reprlib.repr(value))[1:-1]}" for key, value in left_out.items())
        warnings.warn(
            f"{name}: the stored arguments say where the first weights came from ({what}); nothing is fetched from "
            "there, the weights are those of the file",
            stacklevel=3,
        )
    return checked


@contextmanager
def restoring() -> Iterator[None]:
    """A context in which classifiers are made of stored arguments, with weights from the checkpoint."""
    token = _restoring.set(True)
    try:
        yield
    finally:
        _restoring.reset(token)


def is_restoring() -> bool:
    """Whether `restoring` is in effect."""
    return _restoring.get()


def _split(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits arguments into those that shape the network, and those that only say where weights come from."""
    kept: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key in _SOURCES:
            sources[key] = value
        elif key in _DESCRIPTIONS and isinstance(value, Mapping):
            kept[key] = {field: part for field, part in value.items() if field in _FIELDS}
            sources |= {f"{key}.{field}": part for field, part in value.items() if field not in _FIELDS}
        else:
            kept[key] = value
    kept = {key: value for key, value in kept.items() if key not in _DESCRIPTIONS or value}
    return kept, {key: value for key, value in sources.items() if value}


def _as_data(name: str, key: Any, value: Any) -> Any:
    if not isinstance(key, str) or not key.isidentifier() or (_PLACE.search(key) and key not in _DESCRIPTIONS | _PARTS):
        raise ValueError(
            f"{name}: {reprlib.repr(key)} is no argument that a network can be built again with: it names a place, "
            "not a part of the network. Load weights with checkpoint_path"
        )
    try:
        data = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: argument {key}={reprlib.repr(value)} is not JSON data ({error}), so no checkpoint could rebuild "
            "the network; pass numbers, strings, lists (timm takes layers by name, e.g. norm_layer='layernorm')."
        ) from error
    _check_values(name, key, data)
    return data


def _check_values(name: str, key: str, data: Any, depth: int = 0) -> None:
    most = _MOST_BLOCKS if "depth" in key else _MOST
    if isinstance(data, int | float) and abs(data) > most:
        raise ValueError(f"{name}: argument {key} holds {shown(data)}; no network is built with more than {most:,}")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name}: argument {key} is nested deeper than {_MAX_DEPTH} lists; no network takes that")
    if isinstance(data, str) and not _NAME.fullmatch(data):
        raise ValueError(
            f"{name}: argument {key} holds {ascii(reprlib.repr(data))[1:-1]}, which is no plain name (letters, digits, "
            "'.', '+', '-', '_'): a network is built from numbers and names, not from a URL, a path or a hub's name"
        )
    if isinstance(data, dict):
        for inner, part in data.items():
            if _PLACE.search(inner):
                raise ValueError(
                    f"{name}: argument {key} holds {inner!r}, which names a place, not a part of a network"
                )
            _check_values(name, key, part, depth + 1)
    if isinstance(data, list):
        for part in data:
            _check_values(name, key, part, depth + 1)
