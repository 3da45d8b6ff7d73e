"""One quantized `nn.Linear` or `nn.Conv2d` as a callable on NumPy arrays, without a network around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.accel import _core
from swincompress_pl.accel.core import operation_engine, resolve_threads
from swincompress_pl.spec.integer import LIMITS, saturate
from swincompress_pl.spec.kinds import check_operation

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.floating]
_INPUT_TYPES = ("int8", "uint8")


def _float_array(parameter: Any, name: str) -> npt.NDArray[np.float64]:
    """The values of an array, or of a torch parameter, which is recognized by its methods."""
    detached = parameter.detach().cpu() if hasattr(parameter, "detach") else parameter
    values = np.asarray(detached, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values; train or load the layer first")
    return values


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _positive_scale(scale: float | None, name: str) -> float:
    if scale is None:
        return 1.0
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{name} is {scale!r}; it must be a positive finite number")
    return float(scale)


def _convolution_attributes(module: Any) -> dict[str, Any]:
    for name, plain in (("groups", (1,)), ("dilation", (1, (1, 1)))):
        value = getattr(module, name, 1)
        if value not in plain:
            raise ValueError(f"convolution with {name}={value}; export_layer takes {name}=1 only")
    padding = module.padding
    if isinstance(padding, str):
        raise ValueError(f"convolution with padding={padding!r}; give it as numbers")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"convolution with padding_mode={module.padding_mode!r}; the engine pads with zeros only")
    return {"stride": list(_pair(module.stride)), "padding": list(_pair(padding))}


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """A linear layer or convolution in the integers of the specification: `y = requantize(x_q weight_q + bias_q)`.

    `export_layer` makes it. A call takes int8 or uint8 arrays, (..., K) for a linear layer or (N, H, W, C) for a
    convolution, and returns int8 arrays of the same layout. With uint8 the accumulators reach twice as far; the first
    such call checks that they fit.

    Attributes:
        operation: The operation of the specification.
        tensors: Its integers: weight, bias, mult and shift.
        weight_scale: (M,), real value of one step of the weights, per output channel.
        input_scale: Real value of one step of the input.
        output_scale: Real value of one step of the output.
        implementation: Name of the kernels that run.
        threads: Number of threads.
    """

    operation: spec.Operation
    tensors: dict[str, npt.NDArray[Any]] = field(repr=False)
    weight_scale: npt.NDArray[np.float64] = field(repr=False)
    input_scale: float
    output_scale: float
    implementation: str
    threads: int
    _engines: dict[spec.Value, _core.Engine] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_engines": {}}  # a copy makes its own when it needs them

    @property
    def weight_q(self) -> npt.NDArray[np.int8]:
        """The weight, int8 (M, K), or (M, kh, kw, C) of a convolution."""
        return self.tensors["weight"]

    @property
    def bias_q(self) -> npt.NDArray[np.int32]:
        """The bias, int32 (M,), in steps of input_scale * weight_scale."""
        return self.tensors["bias"]

    @property
    def mult(self) -> npt.NDArray[np.int32]:
        """(M,), with `shift` the factor `input_scale * weight_scale / output_scale = mult * 2**-shift`."""
        return self.tensors["mult"]

    @property
    def shift(self) -> npt.NDArray[np.uint8]:
        """(M,), see `mult`."""
        return self.tensors["shift"]

    def quantize_input(self, x: FloatArray, dtype: str = "int8") -> IntArray:
        """Converts floats to the integers that a call takes: round(x / input_scale), clamped to the range of `dtype`.

        Args:
            x: Floats of any shape, finite.
            dtype: "int8" or "uint8".

        Returns:
            Integers of type `dtype` and of the shape of `x`.

        Raises:
            ValueError: If `dtype` is another type, or `x` holds NaN or infinite values.
        """
        if dtype not in _INPUT_TYPES:
            raise ValueError(f"dtype is {dtype!r}; the layer takes {' or '.join(_INPUT_TYPES)}")
        scaled = np.asarray(x, dtype=np.float64) / self.input_scale
        if not np.isfinite(scaled).all():
            raise ValueError("input holds NaN or infinite values; remove them, as no integer stands for them")
        return saturate(np.clip(np.rint(scaled), *LIMITS[dtype]).astype(np.int64), dtype)

    def dequantize_output(self, y: IntArray) -> npt.NDArray[np.float32]:
        """Converts the integers of a result to the real values for which they stand: y * output_scale.

        Args:
            y: What a call returned.

        Returns:
            float32 of the shape of `y`.
        """
        return (y * self.output_scale).astype(np.float32)

    def __call__(self, x: IntArray) -> npt.NDArray[np.int8]:
        """Runs the layer.

        Args:
            x: int8 in [-127, 127] or uint8, (..., K) for a linear layer, (N, H, W, C) for a convolution.

        Returns:
            int8, (..., M) or (N, H', W', M).

        Raises:
            TypeError: If `x` is of another type.
            ValueError: If `x` has another shape or holds -128.
            spec.ProgramError: If the accumulators may overflow with uint8, or the kernel is larger than the image.
        """
        x = np.ascontiguousarray(x)
        if x.dtype.name not in _INPUT_TYPES:
            raise TypeError(f"input is {x.dtype}; the layer takes int8 or uint8: use quantize_input")
        if x.dtype == np.int8 and x.size and int(x.min()) < LIMITS["int8"][0]:
            raise ValueError("input holds -128; int8 values lie in [-127, 127]: use quantize_input")
        is_linear = self.operation.kind == "linear"
        if x.ndim < 1 or (not is_linear and x.ndim != 4) or x.shape[-1] != self.weight_q.shape[-1]:
            expected = f"(..., {self.weight_q.shape[1]})" if is_linear else f"(N, H, W, {self.weight_q.shape[3]})"
            raise ValueError(f"input has shape {x.shape}; it must be {expected}")
        batch = x.reshape(-1, x.shape[-1]) if is_linear else x
        if 0 in x.shape[:-1] and is_linear:
            return np.zeros((*x.shape[:-1], self.weight_q.shape[0]), dtype=np.int8)
        y: npt.NDArray[np.int8] = self._engine(spec.Value(dtype=x.dtype.name, shape=batch.shape[1:])).run([batch])
        return y.reshape(*x.shape[:-1], -1) if is_linear else y

    def _engine(self, value: spec.Value) -> _core.Engine:
        """The engine of an input type and shape, made on first use."""
        if value not in self._engines:
            self._engines[value] = operation_engine(
                self.operation, [value], self.tensors, implementation=self.implementation, threads=self.threads
            )
        return self._engines[value]


def export_layer(
    module: Any,
    input_scale: float | None = None,
    output_scale: float | None = None,
    *,
    implementation: str | None = None,
    threads: int = 1,
) -> QuantizedLayer:
    """Quantizes one `torch.nn.Linear` or `torch.nn.Conv2d` to int8 and returns it as a callable on NumPy arrays.

    The weights get one symmetric scale per output channel, by their maximum.

    Args:
        module: An object with `weight` and `bias`, and for a convolution with `stride` and `padding`. Groups and
            dilation must be 1.
        input_scale: Real value of one integer step of the input; None for 1.0.
        output_scale: Real value of one integer step of the output; None for 1.0.
        implementation: One of `implementations()`; None for the best.
        threads: Number of threads, 1 to 256.

    Returns:
        The layer.

    Raises:
        TypeError: If the module has no weight with 2 or 4 axes, or `threads` is not an integer.
        ValueError: If a scale, a weight or an option of the layer is one that cannot run; the message names it.
        spec.ProgramError: If an accumulator may overflow.
    """
    if not hasattr(module, "weight"):
        raise TypeError(f"{type(module).__name__} has no weight; export_layer takes an nn.Linear or nn.Conv2d")
    weight = _float_array(module.weight, "weight")
    if weight.ndim not in (2, 4) or weight.size == 0:
        raise TypeError(f"weight has shape {weight.shape}; export_layer takes an nn.Linear (2 axes) or nn.Conv2d (4)")
    scale_in, scale_out = _positive_scale(input_scale, "input_scale"), _positive_scale(output_scale, "output_scale")
    attributes: dict[str, Any] = {"channels": weight.shape[0]}
    if weight.ndim == 4:
        attributes |= {"kernel": list(weight.shape[2:]), **_convolution_attributes(module)}
        weight = weight.transpose(0, 2, 3, 1)  # the specification puts channels last
    rows = np.abs(weight).reshape(weight.shape[0], -1).max(axis=1)
    weight_scale = np.where(rows > 0, rows, 127.0) / 127.0
    weight_q = np.rint(weight / weight_scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
    given = getattr(module, "bias", None)
    bias = np.zeros(weight.shape[0]) if given is None else _float_array(given, "bias")
    bias_q = np.clip(np.rint(bias / (scale_in * weight_scale)), *LIMITS["int32"]).astype(np.int32)
    mult, shift = spec.multiplier(scale_in * weight_scale / scale_out)
    operation = spec.Operation(
        kind="linear" if weight.ndim == 2 else "conv2d",
        name=type(module).__name__,
        inputs=("x",),
        output="y",
        dtype="int8",
        attributes=attributes,
    )
    tensors: dict[str, npt.NDArray[Any]] = {
        "weight": np.ascontiguousarray(weight_q),
        "bias": bias_q,
        "mult": mult,
        "shift": shift,
    }
    smallest_input = weight_q.shape[1:]  # the bounds do not depend on the size of the input
    check_operation(operation, [spec.Value(dtype="int8", shape=smallest_input)], tensors)
    return QuantizedLayer(
        operation=operation,
        tensors=tensors,
        weight_scale=weight_scale,
        input_scale=scale_in,
        output_scale=scale_out,
        implementation=_core.select(implementation or ""),
        threads=resolve_threads(threads),
    )
