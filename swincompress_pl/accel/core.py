"""From Programs to the C++ engine: the only module that knows the extension `_core`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import norm
from swincompress_pl.norm.integer import UNSIGNED_BYTES
from swincompress_pl.norm.kinds import check_operation
from swincompress_pl.norm.reference import tensors_of

try:
    from swincompress_pl.accel import _core
except ImportError as error:
    raise ImportError(
        f"the C++ engine swincompress_pl.accel._core cannot be loaded ({error}); build it with `pip install .`, or in "
        "a source tree: cmake -S . -B build/dev -DCMAKE_BUILD_TYPE=Release && cmake --build build/dev && "
        "cmake --install build/dev --prefix ."
    ) from error

THREADS_MAX = 256
_VALUE_TYPES = ("int8", "uint8", "int16", "int32")
# Their results cannot leave the narrow unsigned type that they declare, so that a byte holds them without saturation.
_PROVED_KINDS = ("add", "block_sum", "gather", "lif", "max_pool", "multiply")


def implementations() -> tuple[str, ...]:
    """The names of the kernel implementations that this CPU can run, best first.

    `load(path, implementation=...)` takes one of them; the environment variable SWINCOMPRESS_IMPLEMENTATION forces one
    where no argument does.
    """
    return tuple(_core.implementations())


def resolve_threads(threads: int | None) -> int:
    """`threads` if it lies in [1, 256], and the number of CPUs that this process may use for None.

    Raises TypeError for what is no integer and ValueError outside the range.
    """
    if threads is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(usable, THREADS_MAX)
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads is {threads!r}; it must be an integer in [1, {THREADS_MAX}], or None for all CPUs")
    if not 1 <= threads <= THREADS_MAX:
        raise ValueError(f"threads is {threads}; it must lie in [1, {THREADS_MAX}], or be None for all CPUs")
    return threads


def _require_engine_types(op: norm.Operation, inputs: Sequence[norm.Value], output: norm.Value) -> None:
    """Raises norm.ProgramError where `op` reads or writes a type that the C++ engine does not run.

    Spikes and counts (uint1 to uint7) may be read by any operation, and written where that needs no saturation.
    """
    known = (*_VALUE_TYPES, *UNSIGNED_BYTES)
    narrow = [value.dtype for value in inputs if value.dtype not in known]
    narrow += [output.dtype] if output.dtype not in (known if op.kind in _PROVED_KINDS else _VALUE_TYPES) else []
    if narrow:
        raise norm.ProgramError(
            f"{op.kind} {op.name!r}: type {narrow[0]}; the C++ engine runs 8-bit activations (int8, uint8) beside "
            "int16, int32 and counts of spikes, with weights of any width: swincompress_pl.accel.reference(path) runs "
            "this one"
        )


def _value(value: norm.Value) -> tuple[str, Sequence[int], int]:
    return norm.STORAGE[value.dtype], value.shape, value.reach


def _described(
    op: norm.Operation, inputs: Sequence[int], output: norm.Value, tensors: Mapping[str, npt.NDArray[Any]]
) -> _core.OperationDescription:
    return {
        "kind": op.kind,
        "name": op.name,
        "inputs": inputs,
        "output": _value(output),
        "attributes": op.attributes,
        "tensors": {role: np.ascontiguousarray(tensor) for role, tensor in tensors.items()},
    }


def program_engine(
    program: norm.Program, values: Mapping[str, norm.Value], *, implementation: str | None, threads: int | None
) -> _core.Engine:
    """The C++ engine of a Program whose values `norm.check` gave.

    Raises norm.ProgramError naming the first operation of a type that only the reference runs.
    """
    for op in program.operations:
        _require_engine_types(op, [values[name] for name in op.inputs], values[op.output])
    numbers = {norm.INPUT_VALUE: 0}
    operations = []
    for number, op in enumerate(program.operations, start=1):
        inputs = [numbers[name] for name in op.inputs]
        operations.append(_described(op, inputs, values[op.output], tensors_of(program, op)))
        numbers[op.output] = number
    image = program.input.value
    return _core.Engine([_value(image)], operations, implementation or "", resolve_threads(threads))


def operation_engine(
    op: norm.Operation,
    inputs: Sequence[norm.Value],
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    implementation: str | None = None,
    threads: int | None = 1,
) -> _core.Engine:
    """The C++ engine of a single operation, through the same code as whole Programs.

    `.run(arrays)` takes one (N, *shape) array an input, C-contiguous, and returns the output (N, *shape); unlike a
    Program's it may have any type. Raises norm.ProgramError for an operation that breaks a rule of the norm.
    """
    output = check_operation(op, inputs, tensors)
    _require_engine_types(op, inputs, output)
    return _core.Engine(
        [_value(value) for value in inputs],
        [_described(op, range(len(inputs)), output, tensors)],
        implementation or "",
        resolve_threads(threads),
    )
