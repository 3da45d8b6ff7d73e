"""ONNX files of Programs, with what else an artifact says in their metadata."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from swincompress_pl import __version__, spec
from swincompress_pl.files import write_file
from swincompress_pl.interop.exact import exact_graph
from swincompress_pl.interop.layers import LAYERS
from swincompress_pl.interop.qdq import qdq_graph
from swincompress_pl.interop.spiking import SPIKING

PRODUCER = "swincompress_pl"
FORMS = ("exact", "qdq")
_BYTES_MAX = 2**31 - 1  # of one protobuf message


def onnx_package() -> Any:
    """The package onnx; an ImportError names the extra that installs it."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            "ONNX files need the package onnx, which is not installed; `pip install swincompress_pl[onnx]` installs it"
        ) from error


def to_onnx(
    program: spec.Program,
    path: str | os.PathLike[str],
    *,
    form: str = "exact",
    opset: int | None = None,
    gather_elements: bool = False,
    reduce_range: bool = False,
) -> Path:
    """Writes a Program as an ONNX file of standard operators. The file appears complete or not at all.

    Input: "images", uint8 (N, *shape) as the engine takes them, with a dynamic batch. Output: "logits", float32 (N,
    classes), or each named output. Preprocessing, class names and origin are in the model's metadata.

    Args:
        program: The Program, such as `engine.program` or `quantized_network.to_program()`.
        path: The file; its folder must exist.
        form: "exact": integers that equal the specification's to the bit; "integer_logits", int32, and "integer_" and
            the name of each named output are outputs, too. "qdq": QuantizeLinear and DequantizeLinear around float
            operators, which runtimes fuse into int8 kernels of their own; its answers are near and not equal. Spiking
            networks have no such form, unless their neurons give counts.
        opset: Version of the operators; None for 18 (exact), 17 (qdq) or 21 (qdq with 4-bit weights), which are the
            only ones.
        gather_elements: Of the exact form: look tables up by GatherElements, which onnxruntime runs about ten times as
            fast as Gather. onnx's reference evaluator then cannot run the file.
        reduce_range: Of "qdq": weights of 7 bits, whose products do not saturate on CPUs without VNNI.

    Returns:
        The path of the file.

    Raises:
        ImportError: If onnx is not installed.
        FileNotFoundError: If the folder of `path` does not exist.
        TypeError: If `program` is something else.
        ValueError: If the form or the opset is unknown, an option is of the other form, or the model passes 2 GB.
        spec.ProgramError: If the Program breaks a rule of the specification, or an operation has no such form.
    """
    if not isinstance(program, spec.Program):
        raise TypeError(
            f"to_onnx takes a spec.Program, not {type(program).__name__}; `accel.load(file).program` is that of an "
            "artifact, and `to_program()` that of a quantized network"
        )
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose {' or '.join(map(repr, FORMS))}")
    if (gather_elements and form != "exact") or (reduce_range and form != "qdq"):
        option, of = ("gather_elements", "exact") if gather_elements else ("reduce_range", "qdq")
        raise ValueError(f"{option} is of form={of!r}, and form is {form!r}; leave it out")
    onnx = onnx_package()
    if form == "exact":
        graph = exact_graph(onnx, program, {**LAYERS, **SPIKING}, gather_elements=gather_elements)
    else:
        graph = qdq_graph(onnx, program, reduce_range=reduce_range)
    if opset not in (None, graph.opset):
        raise ValueError(f"opset is {opset}; this network is written with opset {graph.opset}")
    model = graph.model(form, producer=PRODUCER, version=__version__, metadata=_metadata(program, form))
    return _write(onnx, model, path)


def _metadata(program: spec.Program, form: str) -> dict[str, str]:
    """What the artifact's description says beside the operations, in JSON."""
    described = program.describe()
    entries = {
        "form": form,
        "input": described["input"],
        "classes": described.get("classes"),
        "origin": described["origin"],
        "outputs": described.get("outputs"),
        "logit_scale": described.get("logit_scale"),
        "macs": sum(cost.macs for cost in spec.costs(program)),
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


def describe_onnx(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes an ONNX file that `to_onnx` wrote.

    Args:
        path: The file.

    Returns:
        JSON-able data: form, opset, ir_version, producer_version, inputs and outputs with type and shape, the number of
        each operator, and what the artifact said (input, classes, origin, logit_scale, outputs), with its
        multiply-accumulates per image, macs.

    Raises:
        ImportError: If onnx is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no ONNX file, or one of another origin.
    """
    onnx = onnx_package()
    model = _read(onnx, Path(path))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if f"{PRODUCER}.form" not in metadata:
        producer = model.producer_name or "an unknown producer"
        raise ValueError(f"{path}: an ONNX file of {producer}, which {PRODUCER} did not write and does not describe")
    operators = Counter(node.op_type for node in model.graph.node)
    given = {key.removeprefix(f"{PRODUCER}."): json.loads(value) for key, value in metadata.items()}
    return {
        "kind": "onnx",
        "file_bytes": Path(path).stat().st_size,
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "producer_version": model.producer_version,
        "values": [_described(onnx, value, kind) for kind, values in (
            ("input", model.graph.input), ("output", model.graph.output)) for value in values],
        "operators": dict(operators.most_common()),
        **given,
    }  # fmt: skip


def _read(onnx: Any, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    from google.protobuf.message import DecodeError  # onnx brings protobuf

    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except (DecodeError, UnicodeDecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is no whole ONNX file: {' '.join(str(error).split())[:200]}") from error
    return model


def _described(onnx: Any, value: Any, kind: str) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return {"kind": kind, "name": value.name, "type": dtype, "shape": shape}
