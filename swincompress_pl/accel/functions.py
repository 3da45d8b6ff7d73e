"""Single quantized operations on NumPy arrays, without a network around them.

Each is one operation of the specification (`spec.md`), and every implementation gives the same bits. Every call makes
an engine, which checks the bounds and packs the weights again; `export_layer` does so once for a layer. C-contiguous
arrays are not copied. Signed types leave out their lowest value, so int8 values lie in [-127, 127].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.accel.core import operation_engine
from swincompress_pl.spec.integer import EXP_STEPS, LIMITS, IntArray
from swincompress_pl.spec.lowering import TABLE_CODES, layer_norm_integers, table_values

FloatArray = npt.NDArray[np.floating]
Scale = float | FloatArray
_REAL_MAX = 1e30  # bounds scales and parameters, and its inverse bounds scales from below, so that no float overflows
_FACTOR_MAX = 2.0**21 - 1  # of `spec.multiplier`


def linear(
    x: IntArray,
    weight: IntArray,
    bias: IntArray | None = None,
    *,
    scale: Scale,
    dtype: str = "int8",
    implementation: str | None = None,
    threads: int | None = 1,
) -> IntArray:
    """Runs a linear layer: round((x weight^T + bias) * scale), saturated to `dtype`.

    Args:
        x: Integers, int8 or uint8, (..., K).
        weight: Weights, int8, (M, K).
        bias: Biases, int32, (M,), in steps of input scale times weight scale; None for zeros.
        scale: Input scale times weight scale over output scale: one number, or (M,) for one per output channel, in
            `[1e-30, 2**21 - 1)`. It is rounded to 22 significant bits; one below about `2**-31` becomes 0.
        dtype: Type of the result: "int8", "uint8", "int16" or "int32".
        implementation: One of `implementations()`; None for the best, or for what SWINCOMPRESS_IMPLEMENTATION says.
        threads: Number of threads, 1 to 256; None for all CPUs.

    Returns:
        Integers of type `dtype`, (..., M).

    Raises:
        TypeError: If an array is of another type, or `threads` is not an integer.
        ValueError: If a shape, a value or an option does not fit; the message names the argument.
        spec.ProgramError: If a sum of these weights and biases could reach `2**31`.
    """
    x, weight = _integers(x, "x", "int8", "uint8"), _integers(weight, "weight", "int8")
    _require_dtype(dtype, "int8", "uint8", "int16", "int32")
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight has shape {weight.shape}; it must be (outputs, inputs), at least one of each")
    outputs, depth = weight.shape
    if x.ndim < 1 or x.shape[-1] != depth:
        raise ValueError(f"x has shape {x.shape}; it must be (..., {depth}) for a weight of shape {weight.shape}")
    bias = np.zeros(outputs, np.int32) if bias is None else _integers(bias, "bias", "int32")
    if bias.shape != (outputs,):
        raise ValueError(f"bias has shape {bias.shape}; it must be ({outputs},) for a weight of shape {weight.shape}")
    tensors = {"weight": weight, "bias": bias, **_factors(scale, outputs)}
    return _run("linear", "linear", x, dtype, implementation, threads, {"channels": outputs}, tensors)


def matmul(
    a: IntArray,
    b: IntArray,
    *,
    scale: Scale | None = None,
    dtype: str | None = None,
    implementation: str | None = None,
    threads: int | None = 1,
) -> IntArray:
    """Multiplies matrices: round(a b * scale), saturated to `dtype`, or the exact int32 sums without a scale.

    Every call transposes and packs each matrix of `b`.

    Args:
        a: Integers, int8 or uint8, (..., M, K).
        b: Integers, int8, (..., K, N). The leading axes of `a` and `b` broadcast as in `numpy.matmul`.
        scale: Scale of `a` times scale of `b` over output scale: one number, or (N,) for one per column, in
            `[1e-30, 2**21 - 1)`; None for the exact sums.
        dtype: Type of the result: "int8", "uint8", "int16" or "int32"; None for "int8" with a scale and "int32"
            without, where it is the only choice.
        implementation: One of `implementations()`; None for the best, or for what SWINCOMPRESS_IMPLEMENTATION says.
        threads: Number of threads, 1 to 256; None for all CPUs.

    Returns:
        Integers of type `dtype`, (..., M, N).

    Raises:
        TypeError: If an array is of another type, or `threads` is not an integer.
        ValueError: If a shape, a value or an option does not fit; the message names the argument.
        spec.ProgramError: If a sum with this `b` could reach `2**31`.
    """
    a, b = _integers(a, "a", "int8", "uint8"), _integers(b, "b", "int8")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2] or 0 in b.shape[-2:]:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; they must be (..., M, K) and (..., K, N), K and N at least 1"
        )
    if scale is None and dtype not in (None, "int32"):
        raise ValueError(f"dtype is {dtype!r} without a scale; give a scale, or take the exact sums as int32")
    dtype = dtype or ("int32" if scale is None else "int8")
    _require_dtype(dtype, "int8", "uint8", "int16", "int32")
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError as error:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; the axes before the last two differ") from error
    (rows, depth), outputs = a.shape[-2:], b.shape[-1]
    requantization = {"bias": np.zeros(outputs, np.int32), **_factors(1.0 if scale is None else scale, outputs)}

    def product(part: IntArray, matrix: IntArray) -> IntArray:
        tensors = {"weight": np.ascontiguousarray(matrix.T), **requantization}
        return _run("matmul", "linear", part, dtype, implementation, threads, {"channels": outputs}, tensors)

    result = np.empty((*batch, rows, outputs), dtype)
    if result.size == 0:
        product(np.zeros((0, depth), a.dtype), np.zeros((depth, outputs), np.int8))  # raises errors of the options
        return result
    spread = np.broadcast_to(a, (*batch, rows, depth))
    for index in np.ndindex(b.shape[:-2]):
        # `a` is taken whole along an axis where b repeats, so that b is packed once for it
        picked = (slice(None) if size == 1 else at for at, size in zip(index, b.shape[:-2], strict=True))
        place = (..., *picked, slice(None), slice(None))
        result[place] = product(np.ascontiguousarray(spread[place]), b[index])
    return result


def softmax(x: IntArray, *, scale: float, implementation: str | None = None, threads: int | None = 1) -> IntArray:
    """Computes the softmax over the last axis, in units of 1/255.

    Exponentials have 32 steps per octave and 16 bits, so a probability is off by at most 2/255 + C/65280. The values of
    a row need not sum to 255.

    Args:
        x: Integers, int8, uint8, int16 or int32, (..., C), with C in [1, 65536].
        scale: Real value of one step of `x`, at least 1e-30 and below 45,426.
        implementation: One of `implementations()`; None for the best, or for what SWINCOMPRESS_IMPLEMENTATION says.
        threads: Number of threads, 1 to 256; None for all CPUs.

    Returns:
        Probabilities in units of 1/255, uint8, (..., C).

    Raises:
        TypeError: If `x` is of another type, or `threads` is not an integer.
        ValueError: If a shape, a value or an option does not fit; the message names the argument.
        spec.ProgramError: If a row has more than 65536 values.
    """
    x = _rows(_integers(x, "x", "int8", "uint8", "int16", "int32"))
    steps = EXP_STEPS * math.log2(math.e)
    mult, shift = spec.multiplier(steps * _one_scale(scale, "scale", below=_FACTOR_MAX / steps))
    return _run("softmax", "softmax", x, "uint8", implementation, threads, {"mult": int(mult), "shift": int(shift)})


def layernorm(
    x: IntArray,
    weight: FloatArray | None = None,
    bias: FloatArray | None = None,
    *,
    eps: float = 1e-5,
    input_scale: float,
    output_scale: Scale,
    dtype: str = "int8",
    implementation: str | None = None,
    threads: int | None = 1,
) -> IntArray:
    """Normalizes the last axis: round((weight * (x - mean) / sqrt(variance + eps) + bias) / output_scale).

    Args:
        x: Integers, int8 or int16, (..., C), in steps of `input_scale`, with C in [1, 4096].
        weight: Real factors (C,), at most 1e30 in magnitude; None for ones.
        bias: Real offsets (C,), at most 1e30 in magnitude; None for zeros.
        eps: What is added to the variance of the real values, 0 to 1e30.
        input_scale: Real value of one step of `x`, in `[1e-30, 1e30)`.
        output_scale: Real value of one step of the result: one number, or (C,) for one per channel, in
            `[1e-30, 1e30)`.
        dtype: Type of the result: "int8" or "int16".
        implementation: One of `implementations()`; None for the best, or for what SWINCOMPRESS_IMPLEMENTATION says.
        threads: Number of threads, 1 to 256; None for all CPUs.

    Returns:
        Integers of type `dtype`, (..., C), saturated.

    Raises:
        TypeError: If `x` is of another type, or `threads` is not an integer.
        ValueError: If a shape, a value or an option does not fit, or a parameter is too large for these scales.
        spec.ProgramError: If a row has more than 4096 values.
    """
    x = _rows(_integers(x, "x", "int8", "int16"))
    _require_dtype(dtype, "int8", "int16")
    channels = x.shape[-1]
    if not 0 <= eps <= _REAL_MAX:
        raise ValueError(f"eps is {eps!r}; it must be at least 0 and finite")
    attributes, tensors = layer_norm_integers(
        _parameter(weight, "weight", channels, 1.0),
        _parameter(bias, "bias", channels, 0.0),
        eps=eps,
        input_scale=_one_scale(input_scale, "input_scale"),
        output_scale=_scales(output_scale, "output_scale", channels),
    )
    return _run("layernorm", "layer_norm", x, dtype, implementation, threads, attributes, tensors)


def gelu(
    x: IntArray,
    *,
    input_scale: float,
    output_scale: float,
    dtype: str = "int8",
    implementation: str | None = None,
    threads: int | None = 1,
) -> IntArray:
    """Computes round(gelu(x * input_scale) / output_scale), saturated to `dtype`, by a table of 256 values.

    The GELU is the exact one, with the error function.

    Args:
        x: Integers, int8, of any shape.
        input_scale: Real value of one step of `x`, in `[1e-30, 1e30)`.
        output_scale: Real value of one step of the result, in `[1e-30, 1e30)`.
        dtype: Type of the result: "int8", "uint8" or "int16".
        implementation: One of `implementations()`; None for the best, or for what SWINCOMPRESS_IMPLEMENTATION says.
        threads: Number of threads, 1 to 256; None for all CPUs.

    Returns:
        Integers of type `dtype`, of the shape of `x`.

    Raises:
        TypeError: If `x` is of another type, or `threads` is not an integer.
        ValueError: If a value or an option does not fit; the message names the argument.
    """
    x = _integers(x, "x", "int8")
    _require_dtype(dtype, "int8", "uint8", "int16")
    real = TABLE_CODES * _one_scale(input_scale, "input_scale")
    real = real * np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in real])
    values = table_values(real, _one_scale(output_scale, "output_scale"), dtype)
    column = x.reshape(-1, 1)
    return _run("gelu", "table", column, dtype, implementation, threads, {}, {"values": values}).reshape(x.shape)


def _run(
    name: str,
    kind: str,
    x: IntArray,
    dtype: str,
    implementation: str | None,
    threads: int | None,
    attributes: Mapping[str, int],
    tensors: Mapping[str, IntArray] | None = None,
) -> IntArray:
    """Runs one operation on the rows of x (..., C) as one image, so that threads share them; `name` is for errors."""
    tensors = tensors or {}
    op = spec.Operation(
        kind=kind,
        name=name,
        inputs=("x",),
        output="y",
        dtype=dtype,
        attributes=attributes,
        tensors={role: role for role in tensors},
    )
    channels = x.shape[-1]
    value = spec.Value(dtype=x.dtype.name, shape=(max(1, x.size // channels), channels))
    engine = operation_engine(op, [value], tensors, implementation=implementation, threads=threads)
    shape = (*x.shape[:-1], attributes.get("channels", channels))
    return np.zeros(shape, dtype) if x.size == 0 else engine.run([x.reshape(1, *value.shape)]).reshape(shape)


def _integers(given: IntArray, name: str, *dtypes: str) -> IntArray:
    """The array, checked, C-contiguous and aligned; it is copied only if it is not."""
    array = np.asarray(given)
    if array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        raise TypeError(f"{name} is {array.dtype}; it must be {' or '.join(dtypes)}: quantize it first")
    low, high = LIMITS[array.dtype.name]
    if array.size and array.dtype.kind == "i" and int(array.min()) < low:
        raise ValueError(f"{name} holds {low - 1}; {array.dtype} values lie in [{low}, {high}]: clip it to that")
    return np.require(array, requirements=["C", "A"])


def _rows(x: IntArray) -> IntArray:
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {x.shape}; it must be (..., channels), at least one channel")
    return x


def _require_dtype(dtype: str, *allowed: str) -> None:
    if dtype not in allowed:
        raise ValueError(f"dtype is {dtype!r}; the result may be {', '.join(allowed)}")


def _one_scale(scale: float, name: str, below: float = _REAL_MAX) -> float:
    if np.ndim(scale) != 0:
        raise ValueError(f"{name} has shape {np.shape(scale)}; it must be one number")
    return float(_scales(scale, name, 1, below))


def _scales(scale: Scale, name: str, channels: int, below: float = _REAL_MAX) -> npt.NDArray[np.float64]:
    """The scales as an array, () or (channels,), each checked to lie in [1e-30, below)."""
    values = np.asarray(scale, dtype=np.float64)
    if values.shape not in ((), (channels,)):
        raise ValueError(f"{name} has shape {values.shape}; it must be one number or ({channels},)")
    right = (values >= 1 / _REAL_MAX) & (values < below)
    if not right.all():
        wrong = float(values.flat[int(np.argmin(right))])
        raise ValueError(f"{name} is {wrong!r}; it must be positive (at least 1e-30) and below {below:.6g}")
    return values


def _factors(scale: Scale, channels: int) -> dict[str, IntArray]:
    mult, shift = spec.multiplier(np.broadcast_to(_scales(scale, "scale", channels, _FACTOR_MAX), (channels,)))
    return {"mult": mult, "shift": shift}


def _parameter(given: FloatArray | None, name: str, channels: int, default: float) -> npt.NDArray[np.float64]:
    values = np.full(channels, default) if given is None else np.asarray(given, dtype=np.float64)
    if values.shape != (channels,):
        raise ValueError(f"{name} has shape {values.shape}; it must be ({channels},), one value per channel of x")
    if not (np.abs(values) <= _REAL_MAX).all():
        raise ValueError(f"{name} holds NaN, infinite or huge values (beyond 1e30); train or load the layer first")
    return values
