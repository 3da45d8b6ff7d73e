"""A network as the specification sees it: a list of operations over named integer values, with their integer tensors.

A Program is plain data. Adapters build it, `accel` writes and runs it, and `reference.run` defines what it means.
Values are in single-assignment form: every operation reads earlier values and writes one new value. The input is the
value `images`. The result is the output of the last operation, or several named values.
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

# Version 2 has named outputs. A Program without them is of version 1.
NORM_VERSIONS = (1, 2)
INPUT_VALUE = "images"
# The limits of a Program, the same in every reader (spec.md, section 11).
OPERATIONS_MAX = 10_000
OUTPUTS_MAX = 256
OUTPUT_TYPES = ("int8", "int16", "int32")
ELEMENTS_MAX = 2**32  # of a value
NAME_BYTES_MAX = 1024  # of the name of an operation, a value, a tensor or a class
PREPARED_BYTES_FREE, PREPARED_RATIO_MAX = 2**26, 8
# A positive number as float.hex writes it.
_SCALE = re.compile(r"0x[01](\.[0-9a-f]{0,13})?p[+-]?[0-9]{1,4}")

Json = TypeVar("Json", dict[str, Any], list[Any], str)


class ProgramError(ValueError):
    """A Program contradicts itself or breaks a bound of the specification; the message names the operation."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """Type and shape of a value, for one image.

    Attributes:
        dtype: A type of the specification, a key of `LIMITS`.
        shape: (rows..., channels), without the batch axis.
        largest: The bound that `check` has proved for spikes and their sums; None stands for the type's own limit.

    Raises:
        ProgramError: If the type is unknown, a size is not a positive integer, or there are more than `2**32` elements.
    """

    dtype: str
    shape: tuple[int, ...]
    largest: int | None = None

    @property
    def reach(self) -> int:
        """The largest magnitude that an element can have."""
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
        """The number of tokens: the product of all axes but the last."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def channels(self) -> int:
        """The length of the last axis."""
        return self.shape[-1]

    @property
    def size_bytes(self) -> int:
        """The bytes that the value takes in memory, per image."""
        return self.rows * self.channels * ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step of a Program.

    Attributes:
        kind: What it computes, a key of `spec.kinds.KINDS`, such as "linear".
        name: Its name in messages and profiles.
        inputs: Names of the values that it reads, each `images` or the output of an earlier operation.
        output: Name of the value that it writes.
        dtype: Type of the output.
        attributes: Integers and pairs of integers that the kind asks for, such as `channels`.
        tensors: Maps a role ("weight", "bias", ...) to a key of `Program.tensors`. Several operations may share a key.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    dtype: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One named result of a Program, such as a feature map.

    Attributes:
        name: Its name, unique in the Program and not empty.
        value: Name of the value that it gives, which an operation writes: int8, int16 or int32.
        scale: Real value of one step: the result in float is `integers * scale`.
        shape: Its shape for one image, channels last, such as (height, width, channels). It has the channels of the
            value, and as many elements.
    """

    name: str
    value: str
    scale: float
    shape: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """Returns the fields as JSON-able data."""
        return {
            "name": self.name,
            "value": self.value,
            "scale": float(self.scale).hex(),
            "shape": list(self.shape),
        }


@dataclass(frozen=True, kw_only=True)
class InputDescription:
    """What an engine takes, and how it is made from an image.

    The input is uint8 pixels (N, height, width, channels). With `time_steps` it is uint8 counts of events
    (N, time_steps, height, width, channels).

    Attributes:
        height: Rows of an image, in pixels.
        width: Columns of an image, in pixels.
        channels: Color channels, or polarities of events.
        time_steps: Number of frames of events; None for images.
        preprocessing: How a picture becomes pixels: height, width, resize, crop_mode, interpolation, mean and std, as
            far as known. No arithmetic depends on it, as mean and std are already folded into the first layer.
    """

    height: int
    width: int
    channels: int = 3
    time_steps: int | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> Value:
        """Type and shape of one image."""
        time = () if self.time_steps is None else (self.time_steps,)
        return Value(dtype="uint8", shape=(*time, self.height, self.width, self.channels))

    def describe(self) -> dict[str, Any]:
        """Returns the fields as JSON-able data; `from_description` is the inverse."""
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
        """Rebuilds what `describe` gave.

        Args:
            given: The description.

        Returns:
            The input description.

        Raises:
            ProgramError: If the type or the order of the axes is unknown.
            KeyError: If an entry is missing.
            TypeError: If `preprocessing` is not a dictionary.
        """
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


@dataclass(frozen=True, kw_only=True, repr=False)
class Program:
    """A network in integers. `spec.check` proves it; construction proves nothing.

    Attributes:
        input: What the network takes.
        operations: The steps in order; without `outputs`, the last one gives the int32 logits.
        tensors: Integer arrays by key.
        logit_scale: Real value of one step of the logits: the logits in float are `int32 * logit_scale`. It is 1 with
            `outputs`, which have scales of their own.
        classes: Names of the classes in the order of the logits, or None, as with `outputs`.
        origin: How the network was made, as JSON-able data; `models.rebuild` reads it.
        outputs: The named results of a Program that gives no logits but, for example, feature maps; () for logits.
    """

    input: InputDescription
    operations: tuple[Operation, ...]
    tensors: Mapping[str, npt.NDArray[Any]]
    logit_scale: float
    classes: tuple[str, ...] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __reduce__(self) -> tuple[Any, ...]:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return _made_of, (
            type(self),
            given | {"tensors": dict(self.tensors)},
        )  # a proxy can be neither pickled nor copied

    def __repr__(self) -> str:
        taken = f"{self.input.value.dtype} {self.input.value.shape}"
        size_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return f"Program({len(self.operations)} operations, input {taken}, {size_bytes:,} bytes of tensors)"

    def describe(self) -> dict[str, Any]:
        """Returns everything but the tensors as JSON-able data; `Program.from_description` is the inverse."""
        given: dict[str, Any] = {"outputs": [output.describe() for output in self.outputs]}
        if not self.outputs:
            classes = list(self.classes) if self.classes is not None else None
            given = {"logit_scale": float(self.logit_scale).hex(), "classes": classes}
        return {
            "norm_version": 2 if self.outputs else 1,
            "input": self.input.describe(),
            **given,
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
        """Rebuilds a Program; it is not checked.

        Args:
            description: What `describe` gave.
            tensors: Integer arrays by key.

        Returns:
            The Program.

        Raises:
            ProgramError: If an entry is missing or ill-typed (the message names it), the version is another one, or
                there are more than 10,000 operations.
        """
        try:
            version = description["norm_version"]
            if type(version) is not int or version not in NORM_VERSIONS:
                raise ProgramError(
                    f"program of specification version {version!r}; this package runs versions 1 and 2: "
                    "export the model again with this package, or install the package that wrote it"
                )
            operations = _typed(description, "operations", list)
            if len(operations) > OPERATIONS_MAX:
                raise ProgramError(f"program of {len(operations)} operations; it must have 1 to {OPERATIONS_MAX}")
            return cls(
                input=InputDescription.from_description(_typed(description, "input", dict)),
                operations=tuple(_operation(entry) for entry in operations),
                tensors={_name(key, "tensor"): tensor for key, tensor in tensors.items()},
                origin=_typed(description, "origin", dict),
                **(_logits(description) if version == 1 else _outputs(description)),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProgramError(f"program description is incomplete or ill-typed: {error!r}") from error

    @property
    def time_steps(self) -> int | None:
        """The time steps of a spiking network; None for any other, and where neurons give counts."""
        found = (op.attributes.get("steps") for op in self.operations if op.kind in ("lif", "fire"))
        return next(found, self.input.time_steps)

    @property
    def parameter_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def prepared_bytes(self, op: Operation) -> int:
        """Estimates the bytes that an engine makes of an operation's tensors.

        Rows of weights are rounded up, and biases of an attention are spread to all pairs of tokens. A tensor that
        several operations read is copied for each of them.

        Args:
            op: An operation of this Program.

        Returns:
            The number of bytes.
        """
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
    """An entry of a description; a TypeError for another type, a KeyError if it is missing."""
    found = given[key]
    if not isinstance(found, kind):
        raise TypeError(f"entry {key!r} is not a {kind.__name__}")
    return found


def _name(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise TypeError(f"a {what} is {type(given).__name__}, not a string")
    size_bytes = len(given.encode("utf-8", errors="surrogatepass"))
    if size_bytes > NAME_BYTES_MAX:
        raise ProgramError(f"a {what} of {size_bytes} bytes; at most {NAME_BYTES_MAX} are read")
    return given


def _scale(text: str) -> float:
    try:
        return float.fromhex(text if _SCALE.fullmatch(text) else "nan")
    except OverflowError:
        return math.inf  # `check` refuses it, as it refuses NaN


def _logits(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a description of version 1 says of its result, as fields of a Program."""
    classes = description["classes"]
    return {
        "logit_scale": _scale(_typed(description, "logit_scale", str)),
        "classes": None
        if classes is None
        else tuple(_name(text, "class name") for text in _typed(description, "classes", list)),
    }


def _outputs(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a description of version 2 says of its results, as fields of a Program."""
    entries = _typed(description, "outputs", list)
    if not 1 <= len(entries) <= OUTPUTS_MAX:
        raise ProgramError(f"program of {len(entries)} outputs; it must have 1 to {OUTPUTS_MAX}")
    outputs = tuple(
        Output(
            name=_name(entry["name"], "name of an output"),
            value=_name(entry["value"], "name of a value"),
            scale=_scale(_typed(entry, "scale", str)),
            shape=tuple(_size(size) for size in _typed(entry, "shape", list)),
        )
        for entry in entries
    )
    return {"logit_scale": 1.0, "outputs": outputs}


def _size(given: Any) -> int:
    if type(given) is not int:
        raise TypeError(f"a size is {type(given).__name__}, not an integer")
    return given


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
