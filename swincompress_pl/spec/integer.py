"""The integer primitives of the specification: ranges, requantization, exponential, reciprocal square root.

Everything here is exact integer arithmetic on NumPy arrays. Some functions use float64 as a tool, for matrix products
and for a first guess of a square root. Their results are still the exact integers, by the bounds that they state.
`spec.md` derives each rule.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]

# The types that fit a byte, narrowest first.
SIGNED_BYTES = tuple(f"int{bits}" for bits in range(2, 9))
UNSIGNED_BYTES = tuple(f"uint{bits}" for bits in range(1, 9))  # uint1: spikes

# Closed ranges of every type a value may have. -128 is excluded: with it AVX2's 16-bit pair sums may saturate.
LIMITS: dict[str, tuple[int, int]] = {
    **{dtype: (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) for bits, dtype in enumerate(SIGNED_BYTES, start=2)},
    **{dtype: (0, 2**bits - 1) for bits, dtype in enumerate(UNSIGNED_BYTES, start=1)},
    "int16": (-32767, 32767),
    "int32": (-(2**31 - 1), 2**31 - 1),
}
# The NumPy (and torch) type that holds a value: types below 8 bits live in whole bytes.
STORAGE: dict[str, str] = {
    **dict.fromkeys(SIGNED_BYTES, "int8"),
    **dict.fromkeys(UNSIGNED_BYTES, "uint8"),
    "int16": "int16",
    "int32": "int32",
}
ITEMSIZE = {dtype: np.dtype(storage).itemsize for dtype, storage in STORAGE.items()}

MULTIPLIER_BITS = 22
SHIFT_MAX = 52
ACCUMULATOR_BOUND = 2**31

# Exponential: steps per octave, and the argument from which every exponential is 0 (9 octaves: 255 * 2**-9 < 1/2).
EXP_STEPS = 32
EXP_ZERO = 9 * EXP_STEPS
EXP_TABLE: npt.NDArray[np.uint16] = np.array(
    [math.floor(65280 * 2 ** (-i / EXP_STEPS) + 0.5) for i in range(EXP_STEPS)], dtype=np.uint16
)
FINE_EXP_ZERO = 16 * EXP_STEPS  # where 16 bits have nothing left
RECIPROCAL_BITS = 24
SOFTMAX_BITS = 40

# LayerNorm: fractional bits of the normalized value, and the widest row whose bounds hold (see `layer_norm`).
NORMALIZED_FRACTION_BITS = 16
LAYER_NORM_CHANNELS_MAX = 4096


def multiplier(real: float | npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Converts real factors to the integer pairs (mult, shift) whose `mult * 2**-shift` is nearest to them.

    A factor that would need a shift above 52, that is one below about `2**-31`, becomes (0, 1). Over an int32
    accumulator such a factor moves the result by less than one step.

    Args:
        real: Factors of any shape, finite, in `[0, 2**21 - 1)`.

    Returns:
        mult, int32 in `[2**21, 2**22)` or 0, and shift, uint8 in [1, 52], both of the shape of `real`.

    Raises:
        ValueError: If a factor is outside the range or not finite.
    """
    values = np.asarray(real, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or (values >= 2**21 - 1).any():
        worst = values.flat[int(np.argmax(~np.isfinite(values) | (values < 0) | (values >= 2**21 - 1)))]
        raise ValueError(
            f"requantization factor {worst!r} is outside [0, 2**21 - 1); recalibrate the scales it comes from"
        )
    mantissa, exponent = np.frexp(values)
    mult = np.floor(mantissa * 2**MULTIPLIER_BITS + 0.5).astype(np.int64)
    carried = mult == 2**MULTIPLIER_BITS
    mult = np.where(carried, 2 ** (MULTIPLIER_BITS - 1), mult)
    shift = MULTIPLIER_BITS - (exponent.astype(np.int64) + carried)
    dead = (mult == 0) | (shift > SHIFT_MAX)
    return np.where(dead, 0, mult).astype(np.int32), np.where(dead, 1, shift).astype(np.uint8)


def saturate(values: IntArray, dtype: str) -> IntArray:
    """Clamps values to the range of `dtype` and converts them to the array type that holds it."""
    low, high = LIMITS[dtype]
    return np.clip(values, low, high).astype(STORAGE[dtype])


def shift_right_rounded(values: IntArray, shift: IntArray | np.int64 | int) -> Int64Array:
    """floor(values / 2**shift + 1/2) for int64 values and shift >= 1: one rounding, half up."""
    wide_shift = np.asarray(shift, dtype=np.int64)
    rounded: Int64Array = (values.astype(np.int64) + (np.int64(1) << (wide_shift - 1))) >> wide_shift
    return rounded


def requantize(accumulator: IntArray, mult: IntArray, shift: IntArray, dtype: str) -> IntArray:
    """clamp((accumulator * mult + 2**(shift-1)) >> shift): the one way from an accumulator to a value.

    Accumulators lie in the range of int32; their last axis broadcasts against mult and shift. |accumulator| * mult is
    below 2**53, so a float64 twin of the product is exact.
    """
    product = accumulator.astype(np.int64) * mult.astype(np.int64)
    return saturate(shift_right_rounded(product, shift), dtype)


def integer_matmul(a: IntArray, b: IntArray) -> Int64Array:
    """The exact product of two integer arrays whose every partial sum stays below 2**53 in magnitude.

    Products of int8 that are bounded by 2**31 satisfy this. Sums of integers below 2**53 are exact in float64 in any
    order, so the fast BLAS product is the integer product.
    """
    product: Int64Array = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    return product


def exponential(distance: IntArray, mult: IntArray, shift: IntArray) -> npt.NDArray[np.uint8]:
    """255 * exp(-x) for x = distance * (unit of x), rounded to uint8; 255 at distance 0 and 0 from nine octaves on.

    The distance is the row's maximum minus the logit, in [0, 2**31), in units of the accumulator. (mult, shift) turn it
    into 32nds of an octave.
    """
    # A floor of a floor equals one rounding of mantissa / 2**(8 + octave), and everything fits 16 bits.
    rounded: npt.NDArray[np.uint8] = ((_mantissa(distance, mult, shift, EXP_ZERO) + 128) >> 8).astype(np.uint8)
    return rounded


def fine_exponential(distance: IntArray, mult: int, shift: int) -> npt.NDArray[np.uint16]:
    """65280 * exp(-x), floored to 16 bits; 0 from sixteen octaves on. As `exponential`, for a distance below 2**32."""
    mantissa = _mantissa(distance, np.int64(mult), np.int64(shift), FINE_EXP_ZERO)
    return mantissa.astype(np.uint16)


def _mantissa(distance: IntArray, mult: IntArray | np.int64, shift: IntArray | np.int64, zero: int) -> Int64Array:
    """floor(65280 * 2**-octaves), with octaves in steps of 1/32 and at most `zero` steps."""
    product = distance.astype(np.int64) * mult.astype(np.int64)
    steps = np.minimum(shift_right_rounded(product, shift), zero)
    mantissa: Int64Array = EXP_TABLE[steps % EXP_STEPS].astype(np.int64) >> (steps // EXP_STEPS)
    return mantissa


def isqrt(n: Int64Array) -> Int64Array:
    """floor(sqrt(n)) for n in [0, 2**62)."""
    root = np.floor(np.sqrt(n.astype(np.float64))).astype(np.int64)
    root -= root * root > n  # the guess is at most one off on either side
    root += (root + 1) * (root + 1) <= n
    return root


def reciprocal_sqrt(variance: Int64Array) -> tuple[Int64Array, Int64Array]:
    """(r, t) with r * 2**(t - 54) equal to 1 / sqrt(variance) up to a relative error below 2**-22.

    The variance lies in [1, 2**62), r in [2**23, 2**24) and t in [0, 30]. The variance is multiplied by 4**t into
    [2**60, 2**62); then the root and the division are floored.
    """
    normalized = variance.astype(np.int64)
    t = np.zeros_like(normalized)
    for step in (16, 8, 4, 2, 1):
        small = normalized < np.int64(1) << np.int64(62 - 2 * step)
        normalized = np.where(small, normalized << np.int64(2 * step), normalized)
        t += step * small
    return np.int64(2**54 - 1) // isqrt(normalized), t
