"""The integer engine: `export` writes a quantized model to one file, and `load` runs it on pixels, without torch.

Example::

    accel.export(quantized_model, "model.safetensors")
    engine = accel.load("model.safetensors", threads=2)
    logits = engine(images)  # uint8 (N, H, W, 3) -> float32 (N, classes)
    predictions = engine.classify("cat.jpg", top=5)  # needs Pillow

`export_layer`, `linear`, `matmul`, `softmax`, `layernorm` and `gelu` run single kernels on integer arrays.
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
from swincompress_pl.accel.outputs import EngineOutput
from swincompress_pl.accel.pictures import Prediction, Preprocess, with_preprocessing
from swincompress_pl.accel.profile import Profile, ProfileRow
from swincompress_pl.accel.runtime import Engine, ReferenceEngine, load, reference
from swincompress_pl.accel.times import LayerShape, LayerTimes, Tuning

__all__ = [
    "ArtifactError",
    "Engine",
    "EngineOutput",
    "LayerShape",
    "LayerTimes",
    "Prediction",
    "Preprocess",
    "Profile",
    "ProfileRow",
    "QuantizedLayer",
    "ReferenceEngine",
    "Tuning",
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
    """The object with `to_program()`: the model, its `net`, or the only such module in it."""
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
    looked = f" None of its {len(modules)} modules has to_program(): {', '.join(held[:6])}." if held else ""
    raise TypeError(
        f"{type(model).__name__} is not quantized; quantize it first: "
        "accel.export(quant.quantize(network, calibration), path). export takes a spec.Program, a model with "
        f"to_program(), or one that holds such a model.{looked}"
    )


def _modules_in(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules of a torch module by path, including those in attributes, lists and dictionaries of others."""
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


def export(
    model: Any, path: str | os.PathLike[str], compression: str | None = None, *, preprocessing: Any = None
) -> Path:
    """Writes a quantized model as one safetensors artifact. The file appears complete or not at all.

    Args:
        model: A `spec.Program`, an object with `to_program()` such as `quant.quantize` returns, or an object that holds
            one such network, such as a LightningModule with it in `net`.
        path: The file; its folder must exist.
        compression: None packs weights of fewer than 8 bits, and stores those with many zeros as a bitmap and the
            nonzeros. "lzma" codes each kind of tensor losslessly, by LZMA or by Huffman codes, whichever is smaller.
            `load` reads both; the C++ library reads the latter only where it is built with liblzma and zlib.
        preprocessing: How a picture becomes the network's pixels, for the artifact's description: an
            `accel.Preprocess`, a `data.Preprocessing`, a data config of timm, or a mapping of fields. It replaces what
            the model says. None for what the model says.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If the folder of `path` does not exist.
        TypeError: If the model is not quantized, or holds several quantized networks.
        spec.ProgramError: If the model breaks a bound of the specification.
        ArtifactError: If the Program cannot be written, for example because no operation uses one of its tensors.
        ValueError: If the compression is unknown, or the preprocessing does not fit the network.
    """
    artifact.require_compression(compression)
    program = _program_of(model)
    if preprocessing is not None:
        program = with_preprocessing(program, preprocessing)
    return artifact.write(program, path, compression)
