"""The integer engine: `export` writes a quantized model as one file, `load` runs it on pixels. Needs no torch.

Example::

    accel.export(quantized_model, "model.safetensors")
    engine = accel.load("model.safetensors", threads=2)
    logits = engine(images)  # uint8 (N, H, W, 3) -> float32 (N, classes)

For a kernel without a network: `export_layer`, `linear`, `matmul`, `softmax`, `layernorm`, `gelu` on integer arrays.
"""

from __future__ import annotations

import os
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
    for holder in (model, getattr(model, "net", None)):
        if callable(getattr(holder, "to_program", None)):
            program = holder.to_program()  # type: ignore[union-attr]
            if not isinstance(program, spec.Program):
                returned = f"{type(holder).__name__}.to_program() returned {type(program).__name__}"
                raise TypeError(f"{returned}, not a spec.Program")
            return program
    raise TypeError(
        f"{type(model).__name__} is not quantized: export takes a spec.Program or a model with to_program(); "
        "quantize it first: accel.export(quant.quantize(model, calibration), path)"
    )


def export(model: Any, path: str | os.PathLike[str], compression: str | None = None) -> Path:
    """Writes a quantized model as one safetensors artifact and returns its path.

    model: a spec.Program, anything with `to_program()` (quant.quantize returns such), or a LightningModule whose `net`
    has it. compression: None packs weights below 8 bits and nothing else; "lzma" entropy-codes everything, losslessly,
    each kind of tensor by LZMA or by Huffman codes alone, whichever is smaller; `load` reads both. The file appears
    complete or not at all. Raises TypeError for a model that is not quantized, spec.ProgramError for one that breaks a
    bound of the specification, ValueError for an unknown compression.
    """
    artifact.require_compression(compression)
    return artifact.write(_program_of(model), path, compression)
