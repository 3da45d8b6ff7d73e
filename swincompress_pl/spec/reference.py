"""Checks a Program and runs it in NumPy: the definition with which every other interpreter is compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swincompress_pl.spec.integer import STORAGE, IntArray
from swincompress_pl.spec.kinds import KINDS, prove_operation
from swincompress_pl.spec.program import (
    INPUT_VALUE,
    NAME_BYTES_MAX,
    OPERATIONS_MAX,
    OUTPUT_TYPES,
    OUTPUTS_MAX,
    PREPARED_BYTES_FREE,
    PREPARED_RATIO_MAX,
    InputDescription,
    Operation,
    Output,
    Program,
    ProgramError,
    Value,
)


def tensors_of(program: Program, op: Operation) -> dict[str, IntArray]:
    """The tensors of one operation by role; a ProgramError names a key that the Program lacks."""
    missing = [key for key in op.tensors.values() if key not in program.tensors]
    if missing:
        raise ProgramError(f"{op.kind} {op.name!r}: tensor {missing[0]!r} is not in the program")
    return {role: program.tensors[key] for role, key in op.tensors.items()}


def check(program: Program) -> dict[str, Value]:
    """Proves that a Program follows the specification and cannot overflow on any input.

    Args:
        program: The Program to check.

    Returns:
        Type and shape of every value, by its name.

    Raises:
        ProgramError: If an operation or a named output breaks a rule, or if the Program is too large or, without named
            outputs, does not end in int32 logits. The message names the first wrong one, the entry and the bound.
    """
    return _proved(program)[0]


def _proved(program: Program) -> tuple[dict[str, Value], list[int | None]]:
    """The result of `check`, and the largest magnitude of each operation's accumulators."""
    reaches = []
    values = {INPUT_VALUE: program.input.value}
    if not program.operations:
        raise ProgramError("program without operations")
    if len(program.operations) > OPERATIONS_MAX:
        raise ProgramError(f"program of {len(program.operations)} operations; at most {OPERATIONS_MAX} are accepted")
    _require_bounded(program)  # first, because proving oversized tensors would cost as much as preparing them
    for op in program.operations:
        unknown = [name for name in op.inputs if name not in values]
        if unknown:
            raise ProgramError(f"{op.kind} {op.name!r}: reads {unknown[0]!r}, which no earlier operation writes")
        if op.output in values:
            raise ProgramError(f"{op.kind} {op.name!r}: writes {op.output!r} a second time")
        inputs = [values[name] for name in op.inputs]
        values[op.output], reach = prove_operation(op, inputs, tensors_of(program, op))
        reaches.append(reach)
    if program.outputs:
        _check_outputs(program, values)
    else:
        _check_logits(program, values[program.operations[-1].output])
    return values, reaches


def _check_logits(program: Program, result: Value) -> None:
    if result.dtype != "int32" or result.rows != 1:
        raise ProgramError(
            f"program ends in {result.dtype} of shape {result.shape}; it must end in int32 logits (classes,)"
        )
    if program.classes is not None and len(program.classes) != result.channels:
        raise ProgramError(f"program has {result.channels} logits but names {len(program.classes)} classes")
    if not (np.isfinite(program.logit_scale) and program.logit_scale > 0):
        raise ProgramError(f"logit_scale is {program.logit_scale}; it must be positive and finite")


def _check_outputs(program: Program, values: Mapping[str, Value]) -> None:
    if program.classes is not None or program.logit_scale != 1:
        raise ProgramError("program with named outputs has classes or a logit_scale, which only logits have")
    if len(program.outputs) > OUTPUTS_MAX:
        raise ProgramError(f"program of {len(program.outputs)} outputs; it must have 1 to {OUTPUTS_MAX}")
    names, given = set[str](), set[str]()
    for output in program.outputs:
        if not output.name or output.name in names:
            raise ProgramError(f"output {output.name!r}: its name is {'taken' if output.name else 'empty'}")
        if len(output.name.encode("utf-8", errors="surrogatepass")) > NAME_BYTES_MAX:
            raise ProgramError(f"output {output.name!r}: its name is longer than {NAME_BYTES_MAX} bytes")
        if output.value == INPUT_VALUE or output.value not in values:
            raise ProgramError(f"output {output.name!r}: gives {output.value!r}, which no operation writes")
        if output.value in given:
            raise ProgramError(f"output {output.name!r}: gives {output.value!r}, as an earlier output does")
        _check_output(output, values[output.value])
        names.add(output.name)
        given.add(output.value)


def _check_output(output: Output, value: Value) -> None:
    if value.dtype not in OUTPUT_TYPES:
        raise ProgramError(f"output {output.name!r}: is {value.dtype}; it must be one of {', '.join(OUTPUT_TYPES)}")
    sizes = all(type(size) is int and size >= 1 for size in output.shape)
    fits = sizes and bool(output.shape) and output.shape[-1] == value.channels
    if not fits or math.prod(output.shape) != value.rows * value.channels:
        raise ProgramError(f"output {output.name!r}: has shape {output.shape}, but its value is {value.shape}")
    if not (np.isfinite(output.scale) and output.scale > 0):
        raise ProgramError(f"output {output.name!r}: its scale is {output.scale}; it must be positive and finite")


def _require_bounded(program: Program) -> None:
    """Raises ProgramError if an engine would need far more memory for the tensors than they take themselves."""
    prepared = sum(program.prepared_bytes(op) for op in program.operations)
    limit = PREPARED_BYTES_FREE + PREPARED_RATIO_MAX * program.parameter_bytes
    if prepared > limit:
        raise ProgramError(
            f"its operations make {prepared} bytes of their tensors; at most {limit} are accepted for tensors of its "
            "size"
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one operation costs for one image.

    Attributes:
        operation: The operation.
        macs: Multiply-accumulates.
        output: Type and shape of its output.
        parameter_bytes: Bytes of the tensors that no earlier operation uses.
        accumulator_reach: Largest magnitude that its accumulators can reach, as `check` proves it; None for kinds
            without such a proof.
    """

    operation: Operation
    macs: int
    output: Value
    parameter_bytes: int
    accumulator_reach: int | None


def costs(program: Program) -> list[Cost]:
    """Returns MACs, output and parameter bytes of every operation of a Program, for one image.

    A tensor that several operations share is counted for the first of them.

    Args:
        program: The Program; it is checked first.

    Returns:
        One entry per operation, in order.

    Raises:
        ProgramError: As `check`.
    """
    values, reaches = _proved(program)
    seen: set[str] = set()
    table = []
    for op, reach in zip(program.operations, reaches, strict=True):
        tensors = tensors_of(program, op)
        inputs = [values[name] for name in op.inputs]
        fresh = {key for key in op.tensors.values() if key not in seen}
        seen |= fresh
        table.append(
            Cost(
                operation=op,
                macs=KINDS[op.kind].macs(inputs, values[op.output], op.attributes, tensors),
                output=values[op.output],
                parameter_bytes=sum(program.tensors[key].nbytes for key in fresh),
                accumulator_reach=reach,
            )
        )
    return table


def check_images(taken: InputDescription, images: npt.NDArray[np.uint8]) -> None:
    """Raises TypeError or ValueError unless `images` is a uint8 array (N, ...) of the shape that is taken."""
    shape = taken.value.shape
    expected = ", ".join(map(str, shape))
    what = "raw uint8 pixels" if taken.time_steps is None else "uint8 counts of events"
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images are {kind}; pass {what} (N, {expected}), not normalized floats")
    if images.ndim != len(shape) + 1 or images.shape[1:] != shape:
        remedy = _remedy(images.shape, shape)
        raise ValueError(f"images have shape {images.shape}; expected (N, {expected}), channels last{remedy}")


def _remedy(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """How to turn images into the shape (N, *shape), if the mistake can be recognized."""
    *size, channels = shape
    if found == shape:
        return ". It is one image: pass images[None]"
    if found[1:] == (*size[:-2], channels, *size[-2:]):
        return ". They have channels first: pass np.moveaxis(images, -3, -1)"
    if found[1:] == tuple(size):
        one = "images[..., None]"
        given = one if channels == 1 else f"np.repeat({one}, {channels}, axis=-1), the same in every channel"
        return f". They have no axis of channels: pass {given}"
    if len(found) == 5 and len(shape) == 4 and found[1] != shape[0]:
        return _time_remedy(found, shape)
    if len(found) == len(shape) + 1 and found[-1] == channels:
        return "; resize them"
    return ""


def _time_remedy(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The remedy for events whose second axis is not that of the time steps."""
    time_steps, height, width, channels = shape
    first, fits = found[0] == time_steps, found[2:] == shape[1:]
    if first and found[2:] == (channels, height, width):
        return ". Time steps come second: pass np.moveaxis(images, (0, 2), (1, -1)), which puts the channels last, too"
    if first and found[-1] == channels:
        return f". Time steps come second: pass np.moveaxis(images, 0, 1){'' if fits else ', and resize them'}"
    if fits:
        return f". It takes {time_steps} time steps, not {found[1]}: quantize and export again for {found[1]}"
    return f". Time steps come second, and it takes {time_steps} of them"


def steps(program: Program, images: npt.NDArray[np.uint8]) -> Iterator[tuple[Operation, IntArray]]:
    """Runs a Program and yields each operation with its output; values are dropped after their last use.

    The Program is taken as correct: call `check` first.

    Args:
        program: The Program to run.
        images: uint8, (N, height, width, channels), or (N, time steps, height, width, channels) for events.

    Yields:
        The operation and its output, with the batch as first axis.

    Raises:
        TypeError: If `images` is not a uint8 array.
        ValueError: If `images` has another shape; the message says how to mend it.
    """
    check_images(program.input, images)
    last_use = {name: number for number, op in enumerate(program.operations) for name in op.inputs}
    values: dict[str, IntArray] = {INPUT_VALUE: images}
    for number, op in enumerate(program.operations):
        inputs = [values[name] for name in op.inputs]
        output = KINDS[op.kind].run(inputs, tensors_of(program, op), op.attributes, op.dtype)
        values = {name: value for name, value in values.items() if last_use.get(name, -1) > number}
        if op.output in last_use:
            values[op.output] = output
        yield op, output


def run(program: Program, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Runs a Program that gives logits: the definition of its result.

    The Program is taken as correct: call `check` first.

    Args:
        program: The Program to run.
        images: uint8, (N, height, width, channels), or (N, time steps, height, width, channels) for events. N may be 0.

    Returns:
        int32 logits (N, classes).

    Raises:
        TypeError: If `images` is not a uint8 array.
        ValueError: If `images` has another shape, or the Program has named outputs; the message says how to mend it.
    """
    if program.outputs:
        raise ValueError(f"the program has {len(program.outputs)} named outputs and no logits; use spec.run_outputs")
    check_images(program.input, images)
    if images.shape[0] == 0:
        classes = check(program)[program.operations[-1].output].channels
        return np.zeros((0, classes), dtype=np.int32)
    for _, output in steps(program, images):
        logits = output
    return np.ascontiguousarray(logits.reshape(images.shape[0], -1), dtype=np.int32)


def run_outputs(program: Program, images: npt.NDArray[np.uint8]) -> dict[str, IntArray]:
    """Runs a Program with named outputs: the definition of its results.

    The Program is taken as correct: call `check` first.

    Args:
        program: The Program to run.
        images: uint8, (N, height, width, channels), or (N, time steps, height, width, channels) for events. N may be 0.

    Returns:
        The integers (N, *shape) of each output by its name, in the order of `Program.outputs` and of its type.

    Raises:
        TypeError: If `images` is not a uint8 array.
        ValueError: If `images` has another shape, or the Program has no named outputs; the message says how to mend it.
    """
    if not program.outputs:
        raise ValueError("the program gives logits and has no named outputs; use spec.run")
    check_images(program.input, images)
    count = images.shape[0]
    if count == 0:
        values = check(program)
        return {o.name: np.zeros((0, *o.shape), STORAGE[values[o.value].dtype]) for o in program.outputs}
    wanted = {output.value for output in program.outputs}
    found = {op.output: value for op, value in steps(program, images) if op.output in wanted}
    return {o.name: np.ascontiguousarray(found[o.value].reshape(count, *o.shape)) for o in program.outputs}
