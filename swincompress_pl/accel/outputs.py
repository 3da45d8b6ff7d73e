"""What an engine gives: logits, or named outputs such as the feature maps of a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """One result of an engine.

    Attributes:
        name: Its name; "logits" where the artifact names no outputs.
        shape: Its shape for one image, channels last: (height, width, channels), (rows, channels) or (channels,).
        dtype: Type of its integers: "int8", "int16" or "int32".
        scale: Real value of one step: the result in float is `integers * scale`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float


def single_output(name: str, channels: int, scale: float) -> tuple[EngineOutput, ...]:
    """The one output of an artifact without named ones."""
    return (EngineOutput(name=name, shape=(channels,), dtype="int32", scale=scale),)


def named_outputs(program: spec.Program, values: Mapping[str, spec.Value]) -> tuple[EngineOutput, ...]:
    """The named outputs of a checked Program with these values; () if it gives logits."""
    return tuple(
        EngineOutput(name=o.name, shape=o.shape, dtype=values[o.value].dtype, scale=o.scale) for o in program.outputs
    )


def by_name(
    outputs: Sequence[EngineOutput], arrays: Sequence[npt.NDArray[Any]], images: int
) -> dict[str, npt.NDArray[Any]]:
    """The arrays (images, *shape) of the outputs by their names."""
    pairs = zip(outputs, arrays, strict=True)
    return {output.name: array.reshape(images, *output.shape) for output, array in pairs}


def equal_results(first: Any, second: Any) -> bool:
    """Whether two results of `run_integer` are the same integers, in arrays or by name."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    return bool(np.array_equal(first, second))


def empty(outputs: Sequence[EngineOutput]) -> dict[str, npt.NDArray[Any]]:
    """What no images give, by name."""
    return {output.name: np.zeros((0, *output.shape), output.dtype) for output in outputs}
