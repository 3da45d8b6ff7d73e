"""From the real parameters of an operation to its integers: LayerNorm's gain and offset, the entries of a table.

`spec.multiplier` does the same for requantization. `spec.md` derives the rules.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swincompress_pl.spec.integer import MULTIPLIER_BITS, NORMALIZED_FRACTION_BITS, IntArray, saturate

FloatArray = npt.NDArray[np.float64]
EPSILON_MAX = 2**58
OFFSET_MAX = 2**60

# The int8 code that each of the 256 entries of a table stands for, entry i for the byte i.
TABLE_CODES: FloatArray = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)


def _fixed_point(values: FloatArray, *, fraction_bits: int) -> tuple[npt.NDArray[np.int32], int]:
    """Integers below 2**22 and one shift, with integer * 2**(fraction_bits - shift) nearest to the values."""
    largest = float(np.abs(values).max())
    bits = 28 if largest == 0 else min(28, MULTIPLIER_BITS - int(np.frexp(largest)[1]))
    if round(largest * 2.0**bits) >= 2**MULTIPLIER_BITS:
        bits -= 1
    shift = bits + fraction_bits
    if shift < 1:
        raise ValueError(f"gain {largest:.3g} is too large for its output scale; recalibrate it")
    return np.rint(values * 2.0**bits).astype(np.int32), shift


def layer_norm_integers(
    weight: FloatArray, bias: FloatArray, *, eps: float, input_scale: float, output_scale: FloatArray | float
) -> tuple[dict[str, int], dict[str, IntArray]]:
    """The integers of a `layer_norm` operation with the given real parameters.

    Args:
        weight: (C,), finite.
        bias: (C,), finite.
        eps: What the layer adds to the variance of the real input.
        input_scale: Real value of one integer step of the input, positive.
        output_scale: Real value of one integer step of the output, positive; one number, or (C,) for one per channel.

    Returns:
        The attributes (epsilon, shift) and the tensors (gain, offset) of the operation.

    Raises:
        ValueError: If a parameter is too large for the specification's integers at these scales.
    """
    gain, shift = _fixed_point(weight / output_scale, fraction_bits=NORMALIZED_FRACTION_BITS)
    offset = np.rint(bias / output_scale * 2.0**shift)
    if not (np.abs(offset) <= OFFSET_MAX).all():
        worst = int(np.argmax(np.abs(offset)))
        raise ValueError(f"bias {bias.flat[worst]:.3g} is too large for its output scale; recalibrate it")
    codes = len(weight) / input_scale
    epsilon = eps * (codes * codes)
    if not epsilon <= EPSILON_MAX:
        raise ValueError(f"eps {eps:.3g} is too large for input scale {input_scale:.3g}; recalibrate it")
    return {"epsilon": round(epsilon), "shift": shift}, {"gain": gain, "offset": offset.astype(np.int64)}


def table_values(real: FloatArray, scale: float, dtype: str) -> IntArray:
    """The entries of a `table` of type `dtype`, from the real results (256,) for `TABLE_CODES`; `scale` is one step."""
    # Clip the floats first: a conversion of what is beyond int64 is undefined.
    return saturate(np.clip(np.floor(real / scale + 0.5), -(2.0**31), 2.0**31).astype(np.int64), dtype)
