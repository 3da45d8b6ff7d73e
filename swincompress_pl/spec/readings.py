"""The two readings of a network that is trained with integers: counts in one step, or binary spikes in D steps.

Neurons of such a network give counts of 0 to D: results with the attribute `largest`. A count of c stands for c spikes
in D binary time steps (Yao et al., arXiv 2411.16061; Luo et al., arXiv 2407.20708). As sums over counts are sums over
these spikes, both give the same integers. docs/explanation/spec.md derives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl.spec.integer import UNSIGNED_BYTES
from swincompress_pl.spec.program import Operation, Program, ProgramError
from swincompress_pl.spec.reference import check, tensors_of
from swincompress_pl.spec.spiking import AS_IT_IS

_LAYERS = ("linear", "conv2d")
_CHARGING = (*_LAYERS, "requantize")  # operations that may give counts


def binary_steps(program: Program) -> Program:
    """The same network in binary time steps: every count becomes the spikes of an integrate-and-fire neuron.

    Layers over counts become layers over spikes of D steps. `integrate` then sums over the steps, and `fire` spikes.
    The logits are the same integers.

    Args:
        program: A Program with counts (results with the attribute `largest`).

    Returns:
        The Program in binary steps; its values with time are (D, rows..., channels).

    Raises:
        ProgramError: If the Program breaks a rule, if no operation gives counts, or if one that gives or reads them has
            no such form.
    """
    unrolling = _Unrolling(program)
    for op in program.operations:
        unrolling.take(op)
    if not unrolling.steps:
        raise ProgramError(
            "the program has no counts of spikes, so it has only one reading; networks that are trained with integers, "
            "such as E-SpikeFormer, have two"
        )
    return replace(program, operations=tuple(unrolling.operations), tensors=unrolling.tensors)


class _Unrolling:
    """Writes the operations of a Program in binary steps, one by one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.operations: list[Operation] = []
        self.tensors: dict[str, npt.NDArray[Any]] = {}
        self.steps: dict[str, int] = {}  # of the values that are spikes now
        self.values = check(program)
        self._summed: dict[str, str] = {}

    def take(self, op: Operation) -> None:
        """Appends what stands for an operation."""
        tensors = tensors_of(self.program, op)
        over_spikes = any(name in self.steps for name in op.inputs)
        if op.kind in _LAYERS and over_spikes:
            self._layer(op, tensors)
        elif "largest" in op.attributes:
            self._charge(op, tensors)
        else:
            inputs = tuple(self._counts(name) for name in op.inputs)
            self._append(replace(op, inputs=inputs), tensors)

    def _layer(self, op: Operation, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """A layer over spikes, the sum over its steps with the bias, and the neurons behind it, if there are some."""
        (source,) = op.inputs
        bias, channels = tensors["bias"], len(tensors["mult"])
        if bias.ndim > 1:
            raise ProgramError(f"{op.kind} {op.name!r}: its bias differs by position; binary steps add one per channel")
        attributes = {key: value for key, value in op.attributes.items() if key != "largest"}
        sums, charge = f"{op.output}.steps", f"{op.output}.charge"
        self._append(
            replace(op, output=sums, dtype="int32", attributes=attributes),
            {"weight": tensors["weight"], "bias": np.zeros_like(bias), **_unscaled(channels)},
        )
        fires = "largest" in op.attributes
        scaled = _unscaled(channels) if fires else {role: tensors[role] for role in ("mult", "shift")}
        summed = Operation(
            kind="integrate",
            name=f"{op.name}.integrate",
            inputs=(sums,),
            output=charge if fires else op.output,
            dtype="int32" if fires else op.dtype,
            attributes={"steps": self.steps[source]},
        )
        self._append(summed, {"bias": bias, **scaled})
        if fires:
            self._fire(op, charge, tensors)

    def _charge(self, op: Operation, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Neurons that read a stream, or a layer over real values."""
        if op.kind not in _CHARGING:
            raise ProgramError(f"{op.kind} {op.name!r}: gives counts, which has no form in binary steps")
        if op.kind == "requantize":
            return self._fire(op, op.inputs[0], tensors)
        charge = f"{op.output}.charge"
        attributes = {key: value for key, value in op.attributes.items() if key != "largest"}
        rest = {role: tensors[role] for role in ("weight", "bias")} | _unscaled(len(tensors["mult"]))
        self._append(replace(op, output=charge, dtype="int32", attributes=attributes), rest)
        return self._fire(op, charge, tensors)

    def _fire(self, op: Operation, charge: str, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        steps = int(op.attributes["largest"])
        neurons = Operation(
            kind="fire",
            name=f"{op.name}.fire",
            inputs=(charge,),
            output=op.output,
            dtype="uint1",
            attributes={"steps": steps},
        )
        self._append(neurons, {role: tensors[role] for role in ("mult", "shift")})
        self.steps[op.output] = steps

    def _counts(self, name: str) -> str:
        """The counts of a value of spikes, for an operation that reads them as numbers, such as an attention."""
        if name not in self.steps:
            return name
        if name not in self._summed:
            value, self._summed[name] = self.values[name], f"{name}.counts"
            assert value.dtype in UNSIGNED_BYTES
            sum_of_steps = Operation(
                kind="integrate",
                name=f"{name}.counts",
                inputs=(name,),
                output=f"{name}.counts",
                dtype=value.dtype,
                attributes={"steps": self.steps[name], "largest": value.reach},
            )
            none = {"bias": np.zeros(value.channels, np.int32)}
            self._append(sum_of_steps, none | _unscaled(value.channels))
        return self._summed[name]

    def _append(self, op: Operation, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        keys = {}
        for role, tensor in tensors.items():
            shared = op.tensors.get(role)
            same = shared is not None and self.program.tensors[shared] is tensor
            keys[role] = shared if same and shared is not None else f"{op.output}.{role}.{op.kind}"
            self.tensors[keys[role]] = tensor
        self.operations.append(replace(op, tensors=keys))


def _unscaled(channels: int) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a requantization that leaves the numbers as they are."""
    mult, shift = AS_IT_IS
    return {"mult": np.full(channels, mult, np.int32), "shift": np.full(channels, shift, np.uint8)}
