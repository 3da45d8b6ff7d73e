"""One kernel alone: a layer in every implementation, timed inside an engine and checked against the reference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import accel
from swincompress_pl.report.latency import Latency
from swincompress_pl.spec import INPUT_VALUE, InputDescription, Operation, Program, multiplier
from swincompress_pl.spec.operations import linear

_LAYER = "layer"


@dataclass(frozen=True, kw_only=True)
class KernelBench:
    """The time of one layer in one implementation.

    Attributes:
        implementation: Name of the kernels.
        macs: Multiply-accumulates per call.
        latency: Times of the layer.
        answers_equal: Whether the integers equal those of the specification.
        peak_gmacs_per_second: What as many threads reach with operands in registers; the best of all rounds.
    """

    implementation: str
    macs: int
    latency: Latency
    answers_equal: bool
    peak_gmacs_per_second: float

    @property
    def gmacs_per_second(self) -> float:
        """Billions of multiply-accumulates per second."""
        return self.macs / self.latency.median_ms / 1e6

    @property
    def peak_share(self) -> float:
        """The part of the peak that the layer reaches, 0 to about 1."""
        return self.gmacs_per_second / self.peak_gmacs_per_second

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures in JSON types."""
        return {
            "implementation": self.implementation,
            "macs": self.macs,
            "gmacs_per_second": self.gmacs_per_second,
            "peak_gmacs_per_second": self.peak_gmacs_per_second,
            "latency": self.latency.to_dict(),
            "equal_to_norm": self.answers_equal,
        }


def bench_linear(
    *, rows: int, outputs: int, inputs: int, threads: int = 1, implementation: str | None = None, rounds: int = 20
) -> list[KernelBench]:
    """Times a linear layer from uint8 to int8, (rows, inputs) x (outputs, inputs), inside an engine's profile.

    `implementation` is one of `accel.implementations()`; None measures all of them, in turns.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, rows, 1, inputs), dtype=np.uint8)
    module = SimpleNamespace(weight=rng.standard_normal((outputs, inputs)), bias=rng.standard_normal(outputs))
    # One step of the output is a tenth of the deviation of a sum of `inputs` products: the results fill int8's range.
    output_scale = 148 * math.sqrt(inputs) / 40
    names = [implementation] if implementation is not None else list(accel.implementations())
    layers = {
        name: accel.export_layer(module, 1.0, output_scale, implementation=name, threads=threads) for name in names
    }
    tensors = layers[names[0]].tensors
    expected = linear(images[0, :, 0], **tensors, dtype="int8")
    equal = {name: bool(np.array_equal(layer(images[0, :, 0]), expected)) for name, layer in layers.items()}
    engines = _engines(linear_program(tensors, rows=rows), names, threads)
    samples: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for _ in range(rounds):
        for name, engine in engines.items():
            profile = engine.profile(images)
            samples[name].append(_layer_ms(profile))
            peaks[name] = max(peaks[name], profile.peak_gmacs_per_s or 0.0)
    return [
        KernelBench(
            implementation=name,
            macs=rows * outputs * inputs,
            latency=Latency(samples_ms=tuple(samples[name]), threads=threads),
            answers_equal=equal[name],
            peak_gmacs_per_second=peaks[name],
        )
        for name in names
    ]


def _engines(program: Program, implementations: Sequence[str], threads: int) -> dict[str, accel.Engine]:
    with tempfile.TemporaryDirectory() as directory:
        file = accel.export(program, Path(directory) / "layer.safetensors")
        return {name: accel.load(file, threads=threads, implementation=name) for name in implementations}


def _layer_ms(profile: accel.Profile) -> float:
    """The time of the layer's step; an engine may join the layer with the next operation."""
    return next(row.time_ms for row in profile if _LAYER in row.operation.split("+"))


def linear_program(layer: Mapping[str, npt.NDArray[Any]], *, rows: int) -> Program:
    """A Program of images (rows, 1, K): the given linear layer to int8, the mean over the rows, and one int32 logit.

    `layer` has a weight (N, K), bias, mult and shift. Mean and head are there because a Program must end in logits;
    they are not timed.
    """
    outputs, inputs = layer["weight"].shape
    tensors = {f"{_LAYER}.{role}": tensor for role, tensor in layer.items()}
    tensors |= {"head.weight": np.ones((1, outputs), dtype=np.int8), "head.bias": np.zeros(1, dtype=np.int32)}
    for name, channels, factor in (("mean", outputs, 1 / rows), ("head", 1, 1.0)):
        mult, shift = multiplier(np.full(channels, factor))
        tensors |= {f"{name}.mult": mult, f"{name}.shift": shift}

    def operation(kind: str, name: str, source: str, dtype: str, roles: str, **attributes: int) -> Operation:
        keys = {role: f"{name}.{role}" for role in roles.split()}
        return Operation(
            kind=kind, name=name, inputs=(source,), output=name, dtype=dtype, attributes=attributes, tensors=keys
        )

    return Program(
        input=InputDescription(height=rows, width=1, channels=inputs),
        operations=(
            operation("linear", _LAYER, INPUT_VALUE, "int8", "weight bias mult shift", channels=outputs),
            operation("mean", "mean", _LAYER, "int8", "mult shift"),
            operation("linear", "head", "mean", "int32", "weight bias mult shift", channels=1),
        ),
        tensors=tensors,
        logit_scale=1.0,
    )
