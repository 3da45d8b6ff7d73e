"""Mixed precision: the weight widths of all layers that cost the output least, within a budget of bytes or operations.

The choice of one width per layer is a multiple-choice knapsack problem. HiGHS (`scipy.optimize.milp`) solves it
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from swincompress_pl._deprecated import renamed
from swincompress_pl.arguments import as_float, shown
from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.progress import Progress
from swincompress_pl.quant.sensitivity import LayerSensitivity, Sensitivity, measure_sensitivity

# The largest loss that the solver sees, far above its absolute gap of 1e-6; and the cost of each bit less, for ties.
_LARGEST_LOSS, _TIE_BREAK = 1e4, 1e-5


def allocate(table: Sensitivity, sizes: Mapping[str, Mapping[int, int]], budget: int) -> Bits:
    """Finds the widths of least predicted loss whose sizes add up to at most `budget`.

    Among widths of equal loss (within 1e-9 of the largest loss) the widest are taken.

    Args:
        table: The losses, from `measure_sensitivity`.
        sizes: Maps each layer to {width: size}, in the unit of the budget, such as `table.sizes_bytes()` or
            `table.bit_operations()`. Layers with one width count as well.
        budget: The largest sum of the sizes.

    Returns:
        The widths. Its `layers` names only the layers whose width differs from the other fields.

    Raises:
        ValueError: If the budget is below the least size that can be reached, which the message tells, or if a size is
            missing or not an integer of 0 or more.
        RuntimeError: If the solver fails.
    """
    choices = [(layer, width, _size(sizes, layer.name, width)) for layer in table.layers for width in layer.loss]
    least = sum(min(size for layer, _, size in choices if layer is one) for one in table.layers)
    if least > budget:
        raise ValueError(f"a budget of {budget} cannot be reached; the least size of these widths is {least}")
    widest = max(choices, key=lambda choice: (len(choice[0].loss), choice[1]))[1]
    room = budget
    while True:
        chosen = _solve(table, choices, room)
        excess = sum(size for _, _, size in chosen) - budget
        if excess <= 0:
            break
        room -= excess  # the solver keeps bounds only within a tolerance, which must not exceed the budget
    outer = (table.layers[0].name, table.layers[-1].name)
    first_and_last = 8 if table.first_and_last is None else table.first_and_last
    usual = {layer.name: first_and_last if layer.name in outer else widest for layer, _, _ in chosen}
    return Bits(
        weights=widest,
        activations=table.activations,
        first_and_last=first_and_last,
        layers={layer.name: width for layer, width, _ in chosen if width != usual[layer.name]},
    )


@renamed(images="calibration_images")
def mixed_precision(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    size_bytes: int | None = None,
    size_part: float | None = None,
    bit_operations: int | None = None,
    widths: Sequence[int] = (4, 6, 8),
    activations: int = 8,
    first_and_last: int | None = 8,
    preprocessing: Mapping[str, Any] | None = None,
    calibration_images: int = 128,
    seed: int = 0,
    progress: Progress = False,
) -> Bits:
    """Chooses the weight width of every layer, with least predicted loss within one budget.

    The result goes to `quantize(model, calibration, bits=...)`. Give one of `size_bytes`, `size_part` and
    `bit_operations`. The engine packs weights of every width and computes in 8 bits, so narrow weights save memory and
    not time.

    Args:
        model: A float network with an adapter, or a `QuantizedNetwork`, whose float weights are measured.
        calibration: Batches as in `quantize`. They are read here and again by `quantize`, so pass a list or a loader
            and not an iterator.
        size_bytes: Budget for the bytes of all packed weights.
        size_part: The same budget as a part of the weights' float32 bytes; 4 bits everywhere take 0.125.
        bit_operations: Budget for the sum over all layers of the MACs per image times weight bits.
        widths: The widths to choose from, 2 to 8 bits.
        activations: Width of the activations, 2 to 8 bits.
        first_and_last: Width of the first layer and the classifier, which counts in the budget; None to choose it, too.
        preprocessing: Mapping with "mean" and "std", as in `quantize`; ignored for a `QuantizedNetwork`, which has its
            own.
        calibration_images: How many images of `calibration` are used, the first ones.
        seed: Seed of the sampling.
        progress: As in `quantize`.

    Returns:
        The widths.

    Raises:
        UnsupportedNetworkError: If the network has no adapter or no integer form.
        TypeError: If a calibration batch has another form.
        ValueError: If there is no budget, or several, or one that cannot be reached, in which case the message tells
            the least that can be; and as in `measure_sensitivity`.
        RuntimeError: If the solver fails.
    """
    given = {"size_bytes": size_bytes, "size_part": size_part, "bit_operations": bit_operations}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1 or not all(0 < (as_float(value) or 0) < math.inf for value in named.values()):
        raise ValueError(
            f"the budget is {shown(named) if named else 'missing'}; give one of {', '.join(given)}, above 0"
        )
    table = measure_sensitivity(
        model,
        calibration,
        widths=widths,
        activations=activations,
        first_and_last=first_and_last,
        preprocessing=preprocessing,
        calibration_images=calibration_images,
        seed=seed,
        progress=progress,
    )
    if bit_operations is not None:
        return allocate(table, table.bit_operations(), int(bit_operations))
    float_bytes = 4 * sum(layer.weights for layer in table.layers)
    budget = int(size_bytes if size_bytes is not None else (size_part or 0) * float_bytes)
    try:
        return allocate(table, table.sizes_bytes(), budget)
    except ValueError as error:
        raise ValueError(f"{error} bytes, of {float_bytes} in float32; allow more bytes, or narrower widths") from error


def _size(sizes: Mapping[str, Mapping[int, int]], name: str, width: int) -> int:
    size = sizes.get(name, {}).get(width)
    if type(size) is not int or size < 0:
        raise ValueError(f"the size of {name} at {width} bits is {size!r}; sizes are integers of 0 or more")
    return size


def _solve(
    table: Sensitivity, choices: Sequence[tuple[LayerSensitivity, int, int]], budget: int
) -> list[tuple[LayerSensitivity, int, int]]:
    """One choice per layer, of least loss, with sizes of at most `budget` up to the solver's tolerance."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    widest = max(width for _, width, _ in choices)
    loss = np.array([layer.loss[width] for layer, width, _ in choices])
    loss = loss * (_LARGEST_LOSS / max(loss.max(), np.finfo(float).tiny * _LARGEST_LOSS))
    loss = loss + _TIE_BREAK * np.array([widest - width for _, width, _ in choices])
    one_each = np.array([[layer is one for layer, _, _ in choices] for one in table.layers], dtype=float)
    sizes = np.array([float(size) for _, _, size in choices])
    unit = max(float(budget), 1.0) / 1e4  # makes the row's numbers moderate, well above the tolerance of 1e-6
    found = milp(
        loss,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] / unit, -np.inf, budget / unit)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None or found.status != 0:
        raise RuntimeError(f"the solver found no allocation for a budget of {budget}: {found.message}")
    return [choice for choice, taken in zip(choices, found.x, strict=True) if taken > 0.5]
