"""The integer engine: `export` writes a quantized model as one file, `load` runs it on pixels. Needs no torch.

Example::

    accel.export(quantized_model, "model.safetensors")
    engine = accel.load("model.safetensors", threads=2)
    logits = engine(images)  # uint8 (N, H, W, 3) -> float32 (N, classes)

For a kernel without a network: `export_layer`, `linear`, `matmul`, `softmax`, `layernorm`, `gelu` on integer arrays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swincompress_pl import spec
from swincompress_pl.accel import artifact
from swincompress_pl.accel.artifact import ArtifactError
from swincompress_pl.accel.core import implementations
from swincompress_pl.accel.functions import gelu, layernorm, linear, matmul, softmax
from swincompress_pl.accel.layer import QuantizedLayer, export_layer
from swincompress_pl.accel.profile import Profile, ProfileRow
from swincompress_pl.accel.runtime import Engine, ReferenceEngine, load, reference

__all__ = [
    "ArtifactError",
    "Engine",
    "Profile",
    "ProfileRow",
    "QuantizedLayer",
    "ReferenceEngine",
    "export",
    "export_layer",
    "gelu",
    "implementations",
    "layernorm",
    "linear",
    "load",
    "matmul",
    "reference",
    "softmax",
]


def __dir__() -> list[str]:
    return __all__


def _program_of(model: Any) -> spec.Program:
    if isinstance(model, spec.Program):
        return model
    holder = _quantized_in(model)
    program = holder.to_program()
    if not isinstance(program, spec.Program):
        returned = f"{type(holder).__name__}.to_program() returned {type(program).__name__}"
        raise TypeError(f"{returned}, not a spec.Program")
    return program


def _quantized_in(model: Any) -> Any:
    """What has `to_program()`: the model, its `net`, or the one module in it that does."""
    for holder in (model, getattr(model, "net", None)):
        if callable(getattr(holder, "to_program", None)):
            return holder
    modules = dict(_modules_in(model))
    found = {id(module): path for path, module in modules.items() if callable(getattr(module, "to_program", None))}
    if len(found) > 1:
        paths = ", ".join(f"model.{path}" for path in found.values())
        raise TypeError(
            f"{type(model).__name__} holds {len(found)} quantized networks: {paths}; export the one that you want: "
            f"accel.export(model.{next(iter(found.values()))}, path)"
        )
    if found:
        return modules[next(iter(found.values()))]
    held = [f"model.{path} ({type(module).__name__})" for path, module in modules.items() if "." not in path]
    looked = f"; none of its {len(modules)} modules has to_program(): {', '.join(held[:6])}" if held else ""
    raise TypeError(
        f"{type(model).__name__} is not quantized{looked}. export takes a spec.Program, a model with to_program(), or "
        "one that holds such a model; quantize it first: accel.export(quant.quantize(network, calibration), path)"
    )


def _modules_in(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules of a torch module by path, and those in the attributes, lists and dictionaries that torch does not
    look into."""
    yield from _below("", model)
    for name, value in getattr(model, "__dict__", {}).items():
        if name.startswith("_"):
            continue
        yield from _below(name, value)
        entries = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, entry in entries:
            yield from _below(f"{name}[{key!r}]", entry)


def _below(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if callable(getattr(value, "named_modules", None)):
        for name, module in value.named_modules():
            place = ".".join(part for part in (path, name) if part)
            if place:
                yield place, module


def export(model: Any, path: str | os.PathLike[str], compression: str | None = None) -> Path:
    """Writes a quantized model as one safetensors artifact and returns its path.

    model: a spec.Program, anything with `to_program()` (quant.quantize returns such), or what holds one such network,
    as a LightningModule does, in `net` or elsewhere. compression: None packs weights below 8 bits and nothing else;
    "lzma" entropy-codes everything, losslessly, each kind of tensor by LZMA or by Huffman codes alone, whichever is
    smaller; `load` reads both. The file appears complete or not at all. Raises TypeError for a model that is not
    quantized or holds several networks that are, spec.ProgramError for one that breaks a bound of the specification,
    ValueError for an unknown compression.
    """
    artifact.require_compression(compression)
    return artifact.write(_program_of(model), path, compression)
