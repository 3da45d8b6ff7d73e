"""Cases for tests/cpp/kernel_cases.cpp: operations and whole Programs, their inputs, and the specified outputs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import numpy as np
import numpy.typing as npt

from support.program_cases import operation_cases, small_program
from support.random_operations import random_cases
from support.spiking_programs import pictures, spiking_cases, spiking_program
from support.whole_programs import PROGRAMS, images_of
from swincompress_pl import spec
from swincompress_pl.accel import core
from swincompress_pl.spec.kinds import KINDS

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """What the C++ engine is made of and called with, as `_core.Engine` takes it, and the bytes it must give."""

    label: str
    values: Sequence[tuple[str, Sequence[int], int]]
    operations: Sequence[dict[str, Any]]
    arrays: Sequence[Array]
    expected: Array


def _engine_arguments(make: Callable[[], object]) -> tuple[Any, Any]:
    """What `make` hands to the extension's engine; raises spec.ProgramError where that refuses it."""
    with mock.patch.object(core._core, "Engine", wraps=core._core.Engine) as engine:
        make()
    return engine.call_args.args[:2]


def operation_case(
    op: spec.Operation, inputs: Sequence[spec.Value], tensors: dict[str, Array], arrays: Sequence[Array], label: str
) -> EngineCase:
    values, operations = _engine_arguments(lambda: core.operation_engine(op, inputs, tensors))
    expected = KINDS[op.kind].run(arrays, tensors, op.attributes, op.dtype)
    return EngineCase(label=label, values=values, operations=operations, arrays=arrays, expected=expected)


def program_case(program: spec.Program, images: Array, label: str) -> EngineCase:
    values, operations = _engine_arguments(lambda: core.program_engine(program, implementation=None, threads=1))
    return EngineCase(
        label=label, values=values, operations=operations, arrays=[images], expected=spec.run(program, images)
    )


def engine_cases(count: int, seed: int) -> Iterator[EngineCase]:
    """`count` random operations of each of the three generators of these tests that the engine can run, and every
    whole Program of the tests."""
    for case in random_cases(seed, count):
        yield operation_case(case.operation, case.inputs, case.tensors, case.arrays, str(case))
    for spiking in spiking_cases(count, seed):
        yield operation_case(spiking.operation, spiking.values, spiking.tensors, spiking.arrays, str(spiking.operation))
    for op, arrays, tensors, value in operation_cases(count, seed):
        try:
            yield operation_case(op, [value] * len(arrays), tensors, arrays, str(op))
        except spec.ProgramError:  # a type that only the reference runs
            continue
    yield from program_cases(seed)


def program_cases(seed: int) -> Iterator[EngineCase]:
    rng = np.random.default_rng(seed)
    for family, make in PROGRAMS.items():
        program = make()
        yield program_case(program, images_of(program, 3), family)
    program = small_program(seed)
    yield program_case(program, images_of(program, 5), "small program")
    for steps in (1, 3):
        for events in (False, True):
            program = spiking_program(seed, steps=steps, events=events)
            images = pictures(rng, 3, program.input.value.shape)
            yield program_case(program, images, f"spiking program, {steps} steps, events: {events}")


class _Writer:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def integers(self, *values: int) -> None:
        self._file.write(struct.pack(f"={len(values)}q", *values))

    def list(self, values: Sequence[int]) -> None:
        self.integers(len(values), *values)

    def bytes(self, content: bytes) -> None:
        self.integers(len(content))
        self._file.write(content)

    def text(self, text: str) -> None:
        self.bytes(text.encode())

    def array(self, array: Array) -> None:
        self.bytes(np.ascontiguousarray(array).tobytes())

    def value(self, dtype: str, shape: Sequence[int], largest: int) -> None:
        self.text(dtype)
        self.list(shape)
        self.integers(largest)

    def operation(self, given: dict[str, Any]) -> None:
        self.text(given["kind"])
        self.text(given["name"])
        self.list(given["inputs"])
        self.text(given["dtype"])
        self.integers(len(given["attributes"]))
        for key, value in given["attributes"].items():
            self.text(key)
            self.integers(not isinstance(value, int))
            self.list([value] if isinstance(value, int) else value)
        self.integers(len(given["tensors"]))
        for role, tensor in given["tensors"].items():
            self.text(role)
            self.text(tensor.dtype.name)
            self.list(tensor.shape)
            self.array(tensor)


def write_cases(path: Path, cases: Iterator[EngineCase]) -> int:
    """Writes the file of kernel_cases.cpp and returns how many cases it has."""
    count = 0
    with path.open("wb") as file:
        writer = _Writer(file)
        for case in cases:
            count += 1
            writer.text(case.label)
            writer.integers(len(case.arrays[0]), len(case.values))
            for value in case.values:
                writer.value(*value)
            writer.integers(len(case.operations))
            for operation in case.operations:
                writer.operation(operation)
            for array in case.arrays:
                writer.array(array)
            writer.array(case.expected)
    return count
