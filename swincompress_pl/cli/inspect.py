"""`swincompress inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swincompress_pl.accel import artifact
from swincompress_pl.accel.core import Content
from swincompress_pl.cli.common import existing_file, is_checkpoint, parser, print_json
from swincompress_pl.history import summarize
from swincompress_pl.interop import describe_onnx
from swincompress_pl.printable import printable_data
from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.sizes import program_parameters, program_size
from swincompress_pl.spec import Cost, Program, costs
from swincompress_pl.text_table import text_table

_MAX_DEPTH = 20  # of nested data in a checkpoint; what is deeper is not shown


def main(name: str, arguments: Sequence[str]) -> int:
    """Shows an artifact or a checkpoint; returns 0."""
    command = parser(
        name,
        "Shows what a file holds. For an artifact: its input, classes, operations with shapes, MACs, bytes and proven "
        "bounds. For a checkpoint: hyperparameters, the history of its compression, parameters. For an ONNX file that "
        "`swincompress export` wrote: its form, operators, inputs and outputs.",
        "swincompress inspect model.safetensors",
        "swincompress inspect runs/digits/best.ckpt --json",
    )
    command.add_argument("file", type=str, help="artifact, Lightning checkpoint or ONNX file")
    command.add_argument("--json", action="store_true", help="print JSON")
    given = command.parse_args(list(arguments))
    file = existing_file(given.file)
    if is_checkpoint(file):
        described, show = describe_checkpoint(file), show_checkpoint
    elif file.suffix == ".onnx":
        described, show = describe_onnx(file), show_onnx
    else:
        described, show = describe_artifact(file), show_artifact
    if given.json:
        print_json(described)
    else:
        show(printable_data(described))
    return 0


def show_onnx(described: Mapping[str, Any]) -> None:
    """Prints the description of an ONNX file."""
    print(
        f"ONNX, form {described['form']}, opset {described['opset']}, IR version {described['ir_version']}, written by "
        f"swincompress_pl {described['producer_version']}, {megabytes(described['file_bytes'])} on disk"
    )
    for value in described["values"]:
        print(f"{value['kind']} {value['name']}: {value['type']} ({', '.join(map(str, value['shape']))})")
    print(f"preprocessing: {_pairs(described['input']['preprocessing'])}")
    if "classes" in described:
        print(f"classes: {len(described['classes'])}: {'; '.join(described['classes'][:5])}")
    _show_history(described["origin"])
    count_of = described["operators"]
    print(f"{sum(count_of.values())} operators: {', '.join(f'{name} {number}' for name, number in count_of.items())}")


def describe_artifact(file: Path) -> dict[str, Any]:
    """What an artifact holds, in JSON types; raises ArtifactError for a bad one, as counting its costs checks it."""

    def with_costs(content: Content) -> tuple[Program, list[Cost]]:
        program = artifact.unproved_program(content)
        return program, costs(program)

    program, table = artifact.through(file, with_costs)
    description = program.describe()
    return {
        "kind": "artifact",
        "file_bytes": file.stat().st_size,
        "norm_version": description["norm_version"],
        "input": description["input"],
        "classes": description.get("classes"),
        "logit_scale": None if program.outputs else program.logit_scale,
        "outputs": [
            {
                "name": o.name,
                "value": o.value,
                "shape": list(o.shape),
                "dtype": _dtype(table, o.value),
                "scale": o.scale,
            }
            for o in program.outputs
        ],
        "origin": description["origin"],
        "parameters": program_parameters(program),
        "macs": sum(cost.macs for cost in table),
        "size": program_size(program, file=file).to_dict(),
        "operations": [
            {
                "name": cost.operation.name,
                "kind": cost.operation.kind,
                "inputs": list(cost.operation.inputs),
                "output_shape": list(cost.output.shape),
                "output_dtype": cost.output.dtype,
                "macs": cost.macs,
                "parameter_bytes": cost.parameter_bytes,
                "accumulator_bound": cost.accumulator_reach,
            }
            for cost in table
        ],
    }


def show_artifact(described: Mapping[str, Any]) -> None:
    """Prints the description of an artifact."""
    given = described["input"]
    print(
        f"artifact of specification version {described['norm_version']}, {megabytes(described['file_bytes'])} on disk"
    )
    axes = [given[axis] for axis in ("time_steps", "height", "width", "channels") if axis in given]
    shape = f"(N, {', '.join(map(str, axes))})"
    print(f"input: {given['dtype']} {shape}; preprocessing: {_pairs(given['preprocessing'])}")
    _show_outputs(described)
    print(f"parameters: {count(described['parameters'])}; MACs per image: {count(described['macs'])}")
    size = described["size"]
    print(
        f"bytes: {megabytes(size['nonzero_bytes'])} of non-zeros, {megabytes(size['indexed_bytes'])} with index "
        f"({size['index']}), {megabytes(size['file_bytes'])} on disk"
    )
    _show_history(described["origin"])
    print(f"{len(described['operations'])} operations:")
    header = ["operation", "kind", "output", "MACs", "bytes", "accumulator / 2^31"]
    print(text_table(header, map(_cells, described["operations"]), text=3))


def _show_outputs(described: Mapping[str, Any]) -> None:
    for output in described["outputs"]:
        shape = ", ".join(map(str, ["N", *output["shape"]]))
        print(f"output {output['name']}: {output['dtype']} ({shape}), one step is {output['scale']:.6g}")
    if described["outputs"]:
        return
    classes = described["classes"]
    more = "; ..." if classes and len(classes) > 5 else ""
    answers = "features" if described["origin"].get("answers") == "features" else "logits"
    if answers == "logits":
        print("classes: " + ("not named" if classes is None else f"{len(classes)}: {'; '.join(classes[:5])}{more}"))
    print(f"{answers}: int32, one step is {described['logit_scale']:.6g}")


def _dtype(table: Sequence[Cost], value: str) -> str:
    return next(cost.output.dtype for cost in table if cost.operation.output == value)


def _cells(row: Mapping[str, Any]) -> list[str]:
    bound = row["accumulator_bound"]
    return [
        row["name"],
        row["kind"],
        f"{row['output_dtype']} {tuple(row['output_shape'])}",
        f"{row['macs']:,}" if row["macs"] else "",
        f"{row['parameter_bytes']:,}" if row["parameter_bytes"] else "",
        "" if bound is None else f"{bound / 2**31:.4f}",
    ]


def describe_checkpoint(file: Path) -> dict[str, Any]:
    """What a Lightning checkpoint holds, in JSON types.

    Raises ValueError if it is not a Lightning checkpoint, or holds more than plain data and tensors.
    """
    from swincompress_pl.checkpoint.record import histories_in, read_checkpoint

    checkpoint = read_checkpoint(file)
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{file} is no Lightning checkpoint: it has no state_dict; pass what the trainer saved")
    state, histories = checkpoint["state_dict"], histories_in(checkpoint)
    return {
        "kind": "checkpoint",
        "file_bytes": file.stat().st_size,
        "lightning_version": checkpoint.get("pytorch-lightning_version"),
        "epoch": checkpoint.get("epoch"),
        "global_step": checkpoint.get("global_step"),
        "hyperparameters": _plain(checkpoint.get("hyper_parameters", {})),
        "history": _plain(next(iter(histories.values()), [])) if len(histories) < 2 else None,
        "networks": _plain(histories),
        "tensors": len(state),
        "values": sum(tensor.numel() for tensor in state.values() if hasattr(tensor, "numel")),
        "callbacks": sorted(checkpoint.get("callbacks", {})),
    }


def show_checkpoint(described: Mapping[str, Any]) -> None:
    """Prints the description of a checkpoint."""
    print(
        f"checkpoint of Lightning {described['lightning_version']}, {megabytes(described['file_bytes'])}, "
        f"epoch {described['epoch']}, step {described['global_step']}"
    )
    print(f"{described['tensors']} tensors, {count(described['values'])} values")
    for key, value in described["hyperparameters"].items():
        print(f"  {key}: {value}")
    for path, history in (described["networks"] or {"": []}).items():
        _show_history({"history": history}, path)
    if described["callbacks"]:
        print("callbacks: " + ", ".join(described["callbacks"]))


def _show_history(origin: Mapping[str, Any], path: str = "") -> None:
    network = origin.get("network")
    if network:
        print(f"network: {network.get('name')} {_pairs(network.get('kwargs', {}))}".rstrip())
    history = origin.get("history") or []
    print("compression" + (f" of {path}" if path else "") + ":" + ("" if history else " none"))
    for number, entry in enumerate(history, 1):
        print(f"  {number}. {summarize(entry)}")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "not described"


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` in JSON types; anything else, and numbers that JSON does not have, becomes text."""
    if depth > _MAX_DEPTH and isinstance(value, Mapping | list | tuple):
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    known = value is None or isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)
