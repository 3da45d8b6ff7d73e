"""A Program as an ONNX graph whose integers equal the specification's to the bit, out of standard operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swincompress_pl import spec
from swincompress_pl.interop.arithmetic import held_type, widened
from swincompress_pl.interop.graph import Array, OnnxGraph
from swincompress_pl.spec.reference import tensors_of

OPSET, IR_VERSION = 18, 8  # onnxruntime 1.14 (2023) and later


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation to translate: its input values as the specification and as the graph know them."""

    graph: OnnxGraph
    op: spec.Operation
    tensors: Mapping[str, Array]
    inputs: tuple[spec.Value, ...]
    names: tuple[str, ...]
    output: spec.Value

    def attribute(self, key: str) -> Any:
        """An attribute of the operation."""
        return self.op.attributes[key]

    def tokens(self, number: int = 0) -> str:
        """Input `number` as (N, rows, channels)."""
        value, name = self.inputs[number], self.names[number]
        if len(value.shape) == 2:
            return name
        return self.graph.reshape(name, 0, value.rows, value.channels)

    def shaped(self, name: str, *given: int) -> str:
        """A value of the shape (N, *given) in the shape of the output."""
        return name if given == self.output.shape else self.graph.reshape(name, 0, *self.output.shape)


Translate = Callable[[Call], str]


def exact_graph(
    onnx: Any, program: spec.Program, kinds: Mapping[str, Translate], *, gather_elements: bool = False
) -> OnnxGraph:
    """The graph of a Program that `spec.check` accepts; a ProgramError names an operation without translation.

    Input "images", uint8 (N, *shape). Outputs: "logits" float32 and "integer_logits" int32, or for each named output
    its name, float32, and "integer_" and its name. gather_elements: as in `OnnxGraph`.
    """
    values = spec.check(program)
    graph = OnnxGraph(onnx, opset=OPSET, ir_version=IR_VERSION, gather_elements=gather_elements)
    graph.input(spec.INPUT_VALUE, "uint8", program.input.value.shape)
    names = {spec.INPUT_VALUE: spec.INPUT_VALUE}
    for op in program.operations:
        if op.kind not in kinds:
            raise spec.ProgramError(f"{op.kind} {op.name!r}: has no exact form in ONNX; kinds are {', '.join(kinds)}")
        graph.at(op.name)
        names[op.output] = kinds[op.kind](
            Call(
                graph=graph,
                op=op,
                tensors=tensors_of(program, op),
                inputs=tuple(values[name] for name in op.inputs),
                names=tuple(names[name] for name in op.inputs),
                output=values[op.output],
            )
        )
    graph.at("output")
    for output in program.outputs:
        _add_output(graph, names[output.value], values[output.value], output.name, output.shape, output.scale)
    if not program.outputs:
        last = program.operations[-1].output
        _add_output(graph, names[last], values[last], "logits", (values[last].channels,), program.logit_scale)
    return graph


def _add_output(graph: OnnxGraph, x: str, value: spec.Value, name: str, shape: tuple[int, ...], scale: float) -> None:
    x = x if shape == value.shape else graph.reshape(x, 0, *shape)
    integers = widened(graph, x, value.dtype, "int32")
    if spec.STORAGE[value.dtype] != held_type(value.dtype):
        integers = graph.cast(integers, spec.STORAGE[value.dtype])
    real = graph.node("Mul", graph.cast(integers, "float64"), graph.constant(scale, "float64"))
    graph.output(graph.cast(real, "float32"), name, "float32", shape)
    graph.output(integers, f"integer_{name}", spec.STORAGE[value.dtype], shape)
