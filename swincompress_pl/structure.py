"""Describes what a network computes beyond its tensors, as plain data: classes and plain attributes of its modules.

A state dict does not tell these, so two networks with the same keys can compute different things: by `global_pool`, an
`eps`, or another activation. `describe` makes the description, and `differences` compares two of them. Left out is what
does not change an answer in evaluation (dropout, momentum, gradient checkpointing, fused kernels), and what the shapes
of the tensors show anyway.
"""

from __future__ import annotations

import enum
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

Description = dict[str, dict[str, Any]]
"""{path of a module: {"class": name, "tensors": names of its own parameters and saved buffers, "attributes": {...}}}"""

_LIBRARIES = ("torch.", "timm.", "spikingjelly.", "swincompress_pl.")
_NEUTRAL = "Identity"
_TRAINING_ONLY = {"training", "momentum", "inplace", "detach_reset", "alpha", "weight_init_mode", "fix_init"}
_NUMERICS_ONLY = {"fused_attn", "grad_checkpointing", "backend", "store_v_seq"}
# A tensor of another shape does not load, unless somebody leaves it out on purpose.
_SHAPES = {
    "num_classes",
    "in_features",
    "out_features",
    "num_features",
    "in_channels",
    "out_channels",
    "normalized_shape",
    "num_embeddings",
    "embedding_dim",
}
_WORDS = {"class_names"}
_LEFT_OUT = _TRAINING_ONLY | _NUMERICS_ONLY | _SHAPES | _WORDS
_NOTHING = object()


@dataclass(frozen=True)
class Difference:
    """A module that differs between two descriptions.

    Attributes:
        module: Its path.
        attribute: The attribute that differs; None if the class does.
        stored: The value, or the name of the class, in the stored description.
        found: The same in the description that was found.
    """

    module: str
    attribute: str | None
    stored: Any
    found: Any

    def __str__(self) -> str:
        where = ".".join(part for part in (self.module, self.attribute) if part) or "its class"
        return f"{_shown(where)[1:-1]} is {_shown(self.stored)} there and {_shown(self.found)} here"


def uncompiled_name(name: str) -> str:
    """The name of a weight or module without the prefixes that `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def describe(network: nn.Module) -> Description:
    """Returns the description of `network`, which is the same if parts of it are compiled."""
    described: Description = {}
    for path, module in network.named_modules(remove_duplicate=False):
        if type(module).__name__ != "OptimizedModule":  # torch.compile's
            described[uncompiled_name(path)] = _entry(module)
    return described


def differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    """Yields what differs between two descriptions.

    Modules whose tensors have other names are passed over with all modules inside, because their keys do not load.
    Attributes that only one of the two has are passed over too, because they depend on the version of a library.
    """
    passed: set[str] = set()
    for path in [*stored, *(path for path in found if path not in stored)]:
        parent = path.rpartition(".")[0]
        one, other = stored.get(path), found.get(path)
        if path and parent in passed:
            passed.add(path)
        elif one is None or other is None:
            passed.add(path)
            names = [None if entry is None else entry["class"] for entry in (one, other)]
            if _NEUTRAL not in names and not _has_tensors(found if one is None else stored, path):
                yield Difference(path, None, *names)
        elif one["tensors"] != other["tensors"]:
            passed.add(path)
        elif one["class"] != other["class"]:
            yield Difference(path, None, one["class"], other["class"])
        else:
            for name, value in one["attributes"].items():
                present = other["attributes"].get(name, _NOTHING)
                if present is not _NOTHING and not _equal(value, present):
                    yield Difference(path, name, value, present)


def set_attributes(network: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets the plain attributes {module: {attribute: value}} of modules of `network`.

    Raises a ValueError if a module does not have such a plain attribute, or its value is of another type.
    """
    present = describe(network)
    modules = {uncompiled_name(path): module for path, module in network.named_modules()}
    if not isinstance(attributes, Mapping) or not all(isinstance(each, Mapping) for each in attributes.values()):
        raise ValueError("the stored attributes are not {module: {attribute: value}}; the file is damaged")
    for path, changed in attributes.items():
        for name, value in changed.items():
            known = present.get(path, {}).get("attributes", {}).get(name, _NOTHING)
            if known is _NOTHING or not _same_kind(value, known):
                raise ValueError(
                    f"the stored attribute {_shown(f'{path}.{name}')}={_shown(value)} is not one that "
                    f"{type(network).__name__} has; the file is damaged, or of another version of its library"
                )
            old = getattr(modules[path], name)
            setattr(modules[path], name, tuple(value) if isinstance(old, tuple) else value)


def check_description(described: Any) -> Description:
    """Returns a description that was read from a file; raises a ValueError if it is none."""
    if not isinstance(described, Mapping) or not all(
        isinstance(path, str)
        and isinstance(entry, Mapping)
        and isinstance(entry.get("class"), str)
        and isinstance(entry.get("tensors"), list)
        and isinstance(entry.get("attributes"), Mapping)
        for path, entry in described.items()
    ):
        raise ValueError("the stored description of the network is not a description; the file is damaged")
    return dict(described)


def _entry(module: nn.Module) -> dict[str, Any]:
    buffers = [name for name, value in module._buffers.items() if value is not None]
    persistent = [name for name in buffers if name not in module._non_persistent_buffers_set]
    tensors = sorted([*(name for name, value in module._parameters.items() if value is not None), *persistent])
    if isinstance(module, nn.Identity) or "drop" in type(module).__name__.lower():
        return {"class": _NEUTRAL, "tensors": tensors, "attributes": {}}
    return {"class": type(module).__name__, "tensors": tensors, "attributes": dict(_attributes(module))}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the plain attributes that may change an answer.

    For a class of the user these are strings, and attributes that the constructors of its bases in a library set.
    Other numbers may be counters.
    """
    own = not f"{type(module).__module__}.".startswith(_LIBRARIES)
    known = _set_by_libraries(type(module)) if own else set()
    for name, value in vars(module).items():
        if name.startswith("_") or name in _LEFT_OUT or "drop" in name:
            continue
        plain = _plain(value)
        if plain is not _NOTHING and (not own or name in known or isinstance(plain, str)):
            yield name, plain


def _set_by_libraries(kind: type) -> set[str]:
    bases = (base for base in kind.__mro__ if f"{base.__module__}.".startswith(_LIBRARIES))
    codes = (getattr(vars(base).get("__init__"), "__code__", None) for base in bases)
    return {name for code in codes if code is not None for name in code.co_names}


def _plain(value: Any) -> Any:
    """The value as files hold it; `_NOTHING` if it is not plain data."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items if all(item is not _NOTHING for item in items) else _NOTHING
    return _NOTHING


def _has_tensors(described: Mapping[str, Any], path: str) -> bool:
    inside = f"{path}." if path else ""
    return any(entry["tensors"] for key, entry in described.items() if key == path or key.startswith(inside))


def _equal(one: Any, other: Any) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and one != one and other != other
    return bool(one == other) or both_nan


def _same_kind(value: Any, known: Any) -> bool:
    if value is None or known is None:
        return value is None or isinstance(value, bool | int | float | str)
    if isinstance(value, list) and isinstance(known, list):
        return len(value) == len(known) and all(map(_same_kind, value, known))
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (value, known))
    return numbers or type(value) is type(known)


def _shown(value: Any) -> str:
    return ascii(reprlib.repr(value))[1:-1] if not isinstance(value, str) else ascii(value[:80])
