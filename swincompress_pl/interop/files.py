"""ONNX files of Programs, with what else an artifact says in their metadata."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from swincompress_pl import __version__, spec
from swincompress_pl.files import write_file
from swincompress_pl.interop.exact import OPSET, exact_graph
from swincompress_pl.interop.layers import LAYERS
from swincompress_pl.interop.spiking import SPIKING

PRODUCER = "swincompress_pl"
_BYTES_MAX = 2**31 - 1  # of one protobuf message


def onnx_package() -> Any:
    """The package onnx; an ImportError names the extra that installs it."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            "ONNX files need the package onnx, which is not installed; `pip install swincompress_pl[onnx]` installs it"
        ) from error


def to_onnx(program: spec.Program, path: str | os.PathLike[str], *, opset: int = OPSET) -> Path:
    """Writes a Program as an ONNX file whose integers equal the specification's to the bit.

    The file has standard operators of opset 18 only. Input: "images", uint8 (N, *shape) as the engine takes them.
    Outputs: "logits", float32 (N, classes), and "integer_logits", int32; for each named output its name, float32, and
    "integer_" and its name. Preprocessing, class names and origin are in the model's metadata. The file appears
    complete or not at all.

    Args:
        program: The Program, such as `engine.program` or `quantized_network.to_program()`.
        path: The file; its folder must exist.
        opset: Version of the operators; 18 is the only one.

    Returns:
        The path of the file.

    Raises:
        ImportError: If onnx is not installed.
        FileNotFoundError: If the folder of `path` does not exist.
        TypeError: If `program` is something else.
        ValueError: If another opset is asked for, or the model passes 2 GB.
        spec.ProgramError: If the Program breaks a rule of the specification, or an operation has no exact form.
    """
    if not isinstance(program, spec.Program):
        raise TypeError(
            f"to_onnx takes a spec.Program, not {type(program).__name__}; `accel.load(file).program` is that of an "
            "artifact, and `to_program()` that of a quantized network"
        )
    if opset != OPSET:
        raise ValueError(
            f"opset is {opset}; the exact form is written with opset {OPSET}, for onnxruntime 1.14 or later"
        )
    onnx = onnx_package()
    graph = exact_graph(onnx, program, {**LAYERS, **SPIKING})
    model = graph.model("exact", producer=PRODUCER, version=__version__, metadata=_metadata(program))
    return _write(onnx, model, path)


def _metadata(program: spec.Program) -> dict[str, str]:
    """What the artifact's description says beside the operations, in JSON."""
    described = program.describe()
    entries = {
        "form": "exact",
        "input": described["input"],
        "classes": described.get("classes"),
        "origin": described["origin"],
        "outputs": described.get("outputs"),
        "logit_scale": described.get("logit_scale"),
    }
    return {f"{PRODUCER}.{key}": json.dumps(value) for key, value in entries.items() if value is not None}


def _write(onnx: Any, model: Any, path: str | os.PathLike[str]) -> Path:
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; make it first")
    if model.ByteSize() > _BYTES_MAX:
        raise ValueError(f"{path}: the model has {model.ByteSize():,} bytes; an ONNX file holds less than 2 GB")
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    return write_file(path, lambda stream: stream.write(content))
