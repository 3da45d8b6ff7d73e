"""A network as the specification sees it: a list of operations over named integer values, with their integer tensors.

A Program is plain data. Adapters build it, `accel` writes and runs it, `reference.run` defines what it means. Values
are in single-assignment form: every operation reads earlier values and writes one new one; the input is the value
`images`, the result the output of the last operation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from swincompress_pl.spec.integer import ITEMSIZE, LIMITS

NORM_VERSION = 1
INPUT_VALUE = "images"
# What a Program may hold at most, the same in every reader (spec.md, section 11).
OPERATIONS_MAX = 10_000
ELEMENTS_MAX = 2**32  # of a value
NAME_BYTES_MAX = 1024  # of an operation, a value, a tensor, a class
PREPARED_BYTES_FREE, PREPARED_RATIO_MAX = 2**26, 8
# As float.hex writes a positive number.
_SCALE = re.compile(r"0x[01](\.[0-9a-f]{0,13})?p[+-]?[0-9]{1,4}")

Json = TypeVar("Json", dict[str, Any], list[Any], str)


class ProgramError(ValueError):
    """A Program contradicts itself or breaks a bound of the specification; the message names the operation."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """Type and per-image shape of a value: (rows..., channels); the batch axis is left out.

    largest: what no value is beyond, as `check` has proved it for spikes and their sums; None: the type's own limit.
    """

    dtype: str
    shape: tuple[int, ...]
    largest: int | None = None

    @property
    def reach(self) -> int:
        """The largest magnitude that is possible."""
        return LIMITS[self.dtype][1] if self.largest is None else self.largest

    def __post_init__(self) -> None:
        if self.dtype not in LIMITS:
            raise ProgramError(f"value of type {self.dtype!r}; types are {', '.join(LIMITS)}")
        if not self.shape or any(type(size) is not int or size < 1 for size in self.shape):
            raise ProgramError(f"value of shape {self.shape}; every size must be a positive integer")
        if math.prod(self.shape) > ELEMENTS_MAX:
            raise ProgramError(f"value of shape {self.shape}; at most {ELEMENTS_MAX} elements are possible")

    @property
    def rows(self) -> int:
        """Number of tokens: the product of all axes but the last."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def channels(self) -> int:
        return self.shape[-1]

    @property
    def size_bytes(self) -> int:
        return self.rows * self.channels * ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step. `tensors` maps a role ("weight", "bias", ...) to a key of `Program.tensors`; several may share a
    key."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    dtype: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InputDescription:
    """What the engine takes: uint8 pixels (N, height, width, channels), and how they were made from an image; or, with
    `time_steps`, uint8 counts of events (N, time_steps, height, width, channels).

    `preprocessing` is information for the user (resize, crop, interpolation, mean, std); mean and std are already
    folded into the first layer.
    """

    height: int
    width: int
    channels: int = 3
    time_steps: int | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> Value:
        time = () if self.time_steps is None else (self.time_steps,)
        return Value(dtype="uint8", shape=(*time, self.height, self.width, self.channels))

    def describe(self) -> dict[str, Any]:
        """As JSON-able data; `from_description` is the inverse."""
        events = {} if self.time_steps is None else {"time_steps": self.time_steps}
        return {
            "dtype": "uint8",
            "axes": "NTHWC" if events else "NHWC",
            **events,
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "preprocessing": dict(self.preprocessing),
        }

    @classmethod
    def from_description(cls, given: Mapping[str, Any]) -> InputDescription:
        """Raises ProgramError for a type or an order of axes that is not known, KeyError for a missing entry."""
        if given["dtype"] != "uint8" or given["axes"] not in ("NHWC", "NTHWC"):
            raise ProgramError(
                f"program input is {given['dtype']} {given['axes']}; only uint8 NHWC (images) and NTHWC (events) are "
                "known"
            )
        return cls(
            height=given["height"],
            width=given["width"],
            channels=given["channels"],
            time_steps=given["time_steps"] if given["axes"] == "NTHWC" else None,
            preprocessing=_typed(given, "preprocessing", dict),
        )


@dataclass(frozen=True, kw_only=True)
class Program:
    """operations in order; tensors by key; logit_scale turns the int32 result into float logits."""

    input: InputDescription
    operations: tuple[Operation, ...]
    tensors: Mapping[str, npt.NDArray[Any]]
    logit_scale: float
    classes: tuple[str, ...] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __reduce__(self) -> tuple[Any, ...]:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return _made_of, (
            type(self),
            given | {"tensors": dict(self.tensors)},
        )  # a proxy can be neither pickled nor copied

    def describe(self) -> dict[str, Any]:
        """Everything but the tensors as JSON-able data; `Program.from_description` is the inverse."""
        return {
            "norm_version": NORM_VERSION,
            "input": self.input.describe(),
            "logit_scale": float(self.logit_scale).hex(),
            "classes": list(self.classes) if self.classes is not None else None,
            "origin": dict(self.origin),
            "operations": [
                {
                    "kind": op.kind,
                    "name": op.name,
                    "inputs": list(op.inputs),
                    "output": op.output,
                    "dtype": op.dtype,
                    "attributes": dict(op.attributes),
                    "tensors": dict(op.tensors),
                }
                for op in self.operations
            ],
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Program:
        """Rebuilds a Program; raises ProgramError naming the missing or ill-typed entry."""
        try:
            version = description["norm_version"]
            if type(version) is not int or version != NORM_VERSION:
                raise ProgramError(
                    f"program of norm version {version!r}; this package runs version {NORM_VERSION}: "
                    "export the model again"
                )
            operations, classes = _typed(description, "operations", list), description["classes"]
            if len(operations) > OPERATIONS_MAX:
                raise ProgramError(f"program of {len(operations)} operations; it must have 1 to {OPERATIONS_MAX}")
            return cls(
                input=InputDescription.from_description(_typed(description, "input", dict)),
                operations=tuple(_operation(entry) for entry in operations),
                tensors={_name(key, "tensor"): tensor for key, tensor in tensors.items()},
                logit_scale=_scale(_typed(description, "logit_scale", str)),
                classes=None
                if classes is None
                else tuple(_name(text, "class name") for text in _typed(description, "classes", list)),
                origin=_typed(description, "origin", dict),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProgramError(f"program description is incomplete or ill-typed: {error!r}") from error

    @property
    def time_steps(self) -> int | None:
        """Of a spiking network; None for any other."""
        found = (op.attributes.get("steps") for op in self.operations if op.kind == "lif")
        return next(found, self.input.time_steps)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def prepared_bytes(self, op: Operation) -> int:
        """What an engine makes of an operation's tensors: rows of weights are rounded up, biases of attention are
        spread to all pairs of tokens, and a tensor that several operations read is copied for each."""
        tensors = {role: self.tensors[key] for role, key in op.tensors.items() if key in self.tensors}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if "weight" in tensors:
            weight = tensors["weight"]
            rows = max(1, weight.shape[0] if weight.shape else 1)
            size += 2 * (-rows // 64 * -64) * (-(weight.size // rows) // 64 * -64)
        if "bias_table" in tensors and "bias_index" in tensors:
            size += max(1, *tensors["bias_table"].shape[:1]) * tensors["bias_index"].nbytes
        return size


def _typed(given: Mapping[str, Any], key: str, kind: type[Json]) -> Json:
    """An entry of a description; TypeError for another type, KeyError for none."""
    found = given[key]
    if not isinstance(found, kind):
        raise TypeError(f"entry {key!r} is no {kind.__name__}")
    return found


def _name(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise TypeError(f"a {what} is {type(given).__name__}, no text")
    size_bytes = len(given.encode("utf-8", errors="surrogatepass"))
    if size_bytes > NAME_BYTES_MAX:
        raise ProgramError(f"a {what} of {size_bytes} bytes; at most {NAME_BYTES_MAX} are read")
    return given


def _scale(text: str) -> float:
    try:
        return float.fromhex(text if _SCALE.fullmatch(text) else "nan")
    except OverflowError:
        return math.inf  # which `check` refuses, as it does what is no number


def _made_of(cls: type[Program], given: dict[str, Any]) -> Program:
    return cls(**given)


def _operation(entry: Mapping[str, Any]) -> Operation:
    tensors, attributes = _typed(entry, "tensors", dict), _typed(entry, "attributes", dict)
    return Operation(
        kind=_name(entry["kind"], "kind"),
        name=_name(entry["name"], "name"),
        inputs=tuple(_name(item, "name of an input") for item in _typed(entry, "inputs", list)),
        output=_name(entry["output"], "name of an output"),
        dtype=_name(entry["dtype"], "type"),
        attributes=dict(attributes),
        tensors={role: _name(key, "name of a tensor") for role, key in tensors.items()},
    )
