"""A quantized network's diagnosis in a record: read from its plain data, checked, and summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from swincompress_pl.quant.diagnosis import Diagnosis, Effect, Histogram, QuantizationError, QuantizerCost
from swincompress_pl.report.plain import read_plain


def read_diagnosis(data: Mapping[str, Any] | Diagnosis) -> Diagnosis:
    """Reads `Diagnosis.to_dict()`; a ValueError for another version and for missing or ill-typed entries."""
    return read_plain(Diagnosis, data, "the diagnosis", _check)


def _check(diagnosis: Diagnosis) -> None:
    if diagnosis.images < 1:
        raise ValueError(f"a diagnosis on {diagnosis.images} images; there must be at least one")
    for histogram in diagnosis.histograms:
        if not (histogram.low < histogram.high and sum(histogram.counts) > 0):
            raise ValueError(f"the histogram of {histogram.name!r} is empty")
    bad = [cost.name for cost in diagnosis.costs if not math.isfinite(cost.alone.kl)]
    if bad:
        raise ValueError(f"the cost of {bad[0]!r} is not a finite number")


def packed_bytes(bits: int, weights: int) -> int:
    """The bytes of a layer's weights, packed."""
    return (weights * bits + 7) // 8


def all_packed_bytes(diagnosis: Diagnosis) -> int:
    """The bytes of all weights, packed."""
    return sum(packed_bytes(bits, weights) for bits, weights in diagnosis.layers.values())


def float_bytes(diagnosis: Diagnosis) -> int:
    """The bytes of the same weights in float32."""
    return 4 * sum(weights for _, weights in diagnosis.layers.values())


def result_of(diagnosis: Diagnosis) -> Effect:
    """The effect of the integers, or of the simulation if there are none."""
    return diagnosis.simulated if diagnosis.integer is None else diagnosis.integer


def label(row: QuantizerCost | QuantizationError | Histogram) -> str:
    """A name that distinguishes the quantizer of a layer's weight from that of its output."""
    return f"{row.name} (weight)" if row.kind == "weight" else row.name
