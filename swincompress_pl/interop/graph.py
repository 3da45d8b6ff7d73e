"""An ONNX graph under construction: nodes in order, and constants that are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BATCH = "N"  # the dynamic axis


class OnnxGraph:
    """Collects nodes and constants; `model` makes an ONNX model of them.

    Args:
        onnx: The package, which is optional.
        opset: Version of the standard operators.
        ir_version: Version of the file format, which the oldest runtime must know.
        gather_elements: Look tables up by GatherElements, which onnxruntime runs about ten times as fast as Gather.
            onnx's reference evaluator cannot run it on tables of more than 64 entries.
    """

    def __init__(self, onnx: Any, *, opset: int, ir_version: int, gather_elements: bool = False) -> None:
        self._onnx, self.opset, self._ir_version = onnx, opset, ir_version
        self._gather_elements = gather_elements
        self._nodes: list[Any] = []
        self._constants: dict[str, str] = {}
        self._initializers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._place = ""  # what names of nodes and values begin with

    def at(self, place: str) -> None:
        """Names what follows after an operation of the Program."""
        self._place = place

    def constant(self, values: Array | int | float, dtype: str) -> str:
        """The name of a constant, (shape of `values`) of a NumPy type; the same values share one."""
        array = np.ascontiguousarray(np.asarray(values, dtype=dtype)).reshape(np.shape(values))
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        key = f"{array.dtype}_{'x'.join(map(str, array.shape)) or 'scalar'}_{digest}"
        if key not in self._constants:
            self._constants[key] = key
            self._initializers.append(self._onnx.numpy_helper.from_array(array, key))
        return key

    def look_up(self, values: Array, dtype: str, index: str, *shape: int) -> str:
        """Adds values[index] for int32 indices (N, *shape)."""
        if not self._gather_elements:
            name: str = self.node("Gather", self.constant(values, dtype), index)
            return name
        flat = self.node("GatherElements", self.constant(values, dtype), self.reshape(index, -1), axis=0)
        return self.reshape(flat, -1, *shape)

    def four_bits(self, values: Array) -> str:
        """The name of a constant of numbers in [-8, 7], two to a byte."""
        digest = hashlib.sha256(values.tobytes()).hexdigest()[:16]
        key = f"int4_{'x'.join(map(str, values.shape))}_{digest}"
        if key not in self._constants:
            self._constants[key] = key
            dtype = self._onnx.TensorProto.INT4
            self._initializers.append(self._onnx.helper.make_tensor(key, dtype, values.shape, values.reshape(-1)))
        return key

    def for_each_image(self, x: str, rows: Array, dtype: str) -> str:
        """Adds constant rows (R, C) as (N, R, C) for the N images of x (N, ...)."""
        ends = (self.constant(np.array([end]), "int64") for end in (0, 1))
        count = self.node("Slice", self.node("Shape", x), *ends)
        shape = self.node("Concat", count, self.constant(np.array(rows.shape), "int64"), axis=0)
        name: str = self.node("Expand", self.constant(rows[None], dtype), shape)
        return name

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a standard operator and returns the name of its output, or a list of names for several."""
        number = len(self._nodes)
        names = [f"{self._place}/{operator}_{number}{f'_{i}' if outputs > 1 else ''}" for i in range(outputs)]
        made = self._onnx.helper.make_node(
            operator, list(inputs), names, name=f"{self._place}/{operator}_{number}", **attributes
        )
        self._nodes.append(made)
        return names[0] if outputs == 1 else names

    def cast(self, x: str, dtype: str) -> str:
        """Adds a conversion to a NumPy type."""
        to = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        name: str = self.node("Cast", x, to=to)
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """Adds a reshape; 0 keeps the batch axis where it comes first, -1 follows from the others."""
        name: str = self.node("Reshape", x, self.constant(np.array(shape), "int64"))
        return name

    def transpose(self, x: str, *order: int) -> str:
        """Adds a transposition."""
        name: str = self.node("Transpose", x, perm=list(order))
        return name

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Declares an input (N, *shape)."""
        self._inputs.append(self._info(name, dtype, shape))

    def output(self, x: str, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Declares the value `x` as an output (N, *shape) under a name of its own."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [x], [name], name=f"output/{name}"))
        self._outputs.append(self._info(name, dtype, shape))

    def _info(self, name: str, dtype: str, shape: Sequence[int]) -> Any:
        helper = self._onnx.helper
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [BATCH, *shape])

    def model(self, name: str, *, producer: str, version: str, metadata: dict[str, str]) -> Any:
        """The model, an `onnx.ModelProto`."""
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, initializer=self._initializers)
        made = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self._ir_version,
            producer_name=producer,
            producer_version=version,
        )
        helper.set_model_props(made, metadata)
        return made
