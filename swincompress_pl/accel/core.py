"""From Programs and artifacts to engines of the C++ extension `_core`; an ImportError says how to build it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.printable import printable
from swincompress_pl.spec.reference import tensors_of

_HERE = Path(__file__).resolve().parent


def _hidden_package() -> Path | None:
    """The installed package that this folder hides, because it comes first on the path, without an engine."""
    root = _HERE.parents[1]
    found = PathFinder.find_spec(_HERE.parent.name, [entry for entry in sys.path if Path(entry).resolve() != root])
    return None if found is None or found.origin is None else Path(found.origin).parent


def _why_no_engine(error: ImportError) -> str:
    hidden, built = _hidden_package(), [file for file in _HERE.glob("_core.*") if file.suffix in (".so", ".pyd")]
    if hidden is not None and not built:
        return (
            f"{_HERE.parent} has no compiled engine, and hides the package that is installed in {hidden}; run in "
            f"another folder than {_HERE.parents[1]}, or install these sources in place: "
            f"pip install -e {_HERE.parents[1]}"
        )
    return (
        f"the C++ engine swincompress_pl.accel._core cannot be loaded ({error if built else 'it is not built'}); build "
        "it with `pip install .`, or in a source tree: cmake -S . -B build/dev -DCMAKE_BUILD_TYPE=Release && "
        "cmake --build build/dev && cmake --install build/dev --prefix ."
    )


try:
    from swincompress_pl.accel import _core
except ImportError as error:
    raise ImportError(_why_no_engine(error)) from error

THREADS_MAX = 256
Content = bytes | npt.NDArray[np.uint8]  # of an artifact
CodedError = _core.CodedError  # raised for an entropy-coded artifact, which only Python decodes


def implementations() -> tuple[str, ...]:
    """Returns the names of the kernel implementations that this CPU can run, the best first.

    `load(path, implementation=...)` takes one of them. Without that argument, the environment variable
    SWINCOMPRESS_IMPLEMENTATION decides; without both, the best one runs.

    Returns:
        The names, such as ("avx512_vnni", "avx2", "scalar").
    """
    return tuple(_core.implementations())


def resolve_threads(threads: int | None) -> int:
    """`threads`, or for None the number of CPUs that this process may use, at most 256.

    That number respects the affinity of the process and the CPU quotas of its control groups, rounded down. A TypeError
    is raised for what is not an integer, and a ValueError outside [1, 256].
    """
    if threads is None:
        return min(_core.usable_cpus(), THREADS_MAX)
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads is {threads!r}; it must be an integer in [1, {THREADS_MAX}], or None for all CPUs")
    if not 1 <= threads <= THREADS_MAX:
        raise ValueError(f"threads is {threads}; it must lie in [1, {THREADS_MAX}], or be None for all CPUs")
    return threads


def _value(value: spec.Value) -> tuple[str, Sequence[int], int]:
    return value.dtype, value.shape, value.reach


def _described(
    op: spec.Operation, inputs: Sequence[int], tensors: Mapping[str, npt.NDArray[Any]]
) -> _core.OperationDescription:
    return {
        "kind": op.kind,
        "name": op.name,
        "inputs": inputs,
        "dtype": op.dtype,
        "attributes": op.attributes,
        "tensors": {role: np.ascontiguousarray(tensor) for role, tensor in tensors.items()},
    }


def _engine(
    inputs: Sequence[spec.Value],
    operations: Sequence[_core.OperationDescription],
    implementation: str | None,
    threads: int | None,
    results: Sequence[int] = (),
) -> _core.Engine:
    """An engine; a ValueError for `implementation` and `threads`, a spec.ProgramError for what C++ refuses."""
    name, count = _core.select(implementation or ""), resolve_threads(threads)
    try:
        return _core.Engine([_value(value) for value in inputs], operations, name, count, results)
    except ValueError as error:
        raise spec.ProgramError(printable(str(error))) from error


def program_engine(
    program: spec.Program,
    *,
    implementation: str | None,
    threads: int | None,
    tunings: Mapping[int, tuple[int, int]] | None = None,
) -> _core.Engine:
    """The C++ engine of a Program that `spec.check` accepts; `tunings` as in `artifact_engine`.

    A spec.ProgramError names the first operation of a type that only the reference runs.
    """
    numbers = {spec.INPUT_VALUE: 0}
    operations = []
    for number, op in enumerate(program.operations, start=1):
        described = _described(op, [numbers[name] for name in op.inputs], tensors_of(program, op))
        if tunings is not None and number - 1 in tunings:
            described["tuning"] = tunings[number - 1]
        operations.append(described)
        numbers[op.output] = number
    results = [numbers[output.value] for output in program.outputs]
    return _engine([program.input.value], operations, implementation, threads, results)


def operation_engine(
    op: spec.Operation,
    inputs: Sequence[spec.Value],
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    implementation: str | None = None,
    threads: int | None = 1,
) -> _core.Engine:
    """The C++ engine of a single operation, through the same code as whole Programs.

    `.run(arrays)` takes one C-contiguous array (N, *shape) per input and returns the output (N, *shape), of any type. A
    spec.ProgramError is raised for an operation that breaks a rule of the specification.
    """
    return _engine(inputs, [_described(op, range(len(inputs)), tensors)], implementation, threads)


def layer_engine(
    kind: str,
    attributes: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any]],
    x: spec.Value,
    dtype: str,
    *,
    neuron_steps: int | None,
    tuning: tuple[int, int],
    implementation: str,
    threads: int,
) -> _core.Engine:
    """The C++ engine of one layer from `x` to `dtype`, with neurons of so many time steps behind it if any.

    `tuning` is (bytes, percent), as the extension takes it. Errors are those of `operation_engine`.
    """
    op = spec.Operation(kind=kind, name="layer", inputs=("x",), output="y", dtype=dtype, attributes=attributes)
    layer = _described(op, [0], tensors)
    layer["tuning"] = tuning
    operations = [layer]
    if neuron_steps is not None:
        channels = attributes["channels"]
        threshold = {"threshold": np.full(channels, 2**20, np.int32)}
        neurons = spec.Operation(
            kind="lif",
            name="neurons",
            inputs=("y",),
            output="spikes",
            dtype="uint1",
            attributes={
                "steps": neuron_steps, "repeated": 0, "decay": 2**15, "input_decay": 1, "soft_reset": 0,
                "fraction_bits": 8,
            },
        )  # fmt: skip
        zeros = {role: np.zeros(channels, np.int32) for role in ("reset", "bias")}
        operations.append(_described(neurons, [1], threshold | zeros))
    return _engine([x], operations, implementation, threads)


def artifact_engine(
    content: Content, implementation: str, threads: int, tunings: Mapping[int, tuple[int, int]] | None = None
) -> tuple[_core.Engine, _core.ModelFacts]:
    """The C++ engine of an artifact's bytes, read and proved in C++; the bytes are not kept.

    An array is used up: its memory goes back to the system as the engine grows, and what it holds is lost.

    Raises CodedError for an entropy-coded artifact, and ValueError for other bytes or a broken rule of the
    specification. `tunings`: (bytes, percent) by the number of the operation.
    """
    return _core.load(content, implementation, threads, isinstance(content, np.ndarray), tunings or {})


def read_artifact(content: Content) -> tuple[str, dict[str, npt.NDArray[Any]]]:
    """(description as JSON, tensors by key) of an artifact's bytes, by the same reader.

    The rules of the specification are not checked. Raises CodedError and ValueError as `artifact_engine`.
    """
    return _core.read(content)


def parse_content(content: bytes) -> tuple[str | None, str | None]:
    """(description, storage) of the decoded content of an entropy-coded artifact, each as JSON, None where it lacks it.

    Numbers stay as they are written. Raises ValueError for what the reader of headers does not accept as JSON.
    """
    return _core.parse_content(content)
