"""Which quantizer costs the most accuracy: each quantized alone, all but each one, and how well its scale fits.

Single quantizers can be switched only in the float simulation (`fake_quantized`), so all of this is measured there. In
a `Diagnosis`, only the effect and the predictions of the whole network are also those of the integers. The float
network is the one inside the quantized network, with what bias correction, learned rounding or training wrote into its
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from swincompress_pl._deprecated import renamed
from swincompress_pl.evaluation_mode import standing_still
from swincompress_pl.quant.diagnosis.costs import Effect, QuantizerCost, cost_table, effect, measure_costs
from swincompress_pl.quant.diagnosis.errors import (
    Histogram,
    QuantizationError,
    checked_count,
    checked_labels,
    error_table,
    measure_errors,
    require_classes,
)
from swincompress_pl.quant.full_precision import full_precision
from swincompress_pl.quant.graph import float_logits
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.progress import Progress
from swincompress_pl.summaries import Summarized

DIAGNOSIS_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Summarized):
    """Everything that a report on one quantized network shows.

    `str(diagnosis)` has its tables, `diagnosis.summary()` a few lines, which a notebook shows.

    Attributes:
        method: Method of quantization, such as "searched".
        bits: The widths as a text, such as "W8A8".
        images: Number of images.
        simulated: The effect of the float simulation.
        integer: The effect of the integers; None for the method "affine", which has none.
        paired: Numbers of images with right and wrong predictions before and after quantization ("both_right",
            "right_to_wrong", "wrong_to_right", "both_wrong"), and with the same prediction ("same_predictions"). They
            are those of the integers, or of the simulation for "affine". None without labels.
        layers: Maps each layer to its weight bits and its number of weights.
        errors: The errors of all quantizers, in the network's order.
        costs: The costs of all quantizers, the largest first; empty if they were not measured.
        histograms: Histograms of the costliest quantizers, or of those with the largest error.
        without_signal: Layers that had no influence on the answers in calibration. The search for their scales
            minimized their own errors.
    """

    method: str
    bits: str
    images: int
    simulated: Effect
    integer: Effect | None
    paired: Mapping[str, int] | None
    layers: Mapping[str, tuple[int, int]] = field(repr=False)
    errors: tuple[QuantizationError, ...] = field(repr=False)
    costs: tuple[QuantizerCost, ...] = field(repr=False)
    histograms: tuple[Histogram, ...] = field(repr=False)
    without_signal: tuple[str, ...] = ()

    def facts(self) -> list[tuple[str, str]]:
        """Returns what quantization did to the answers, and what costs most."""
        found = [("quantized", f"{self.method}, {self.bits}, {len(self.layers)} layers")]
        if self.integer is not None:
            found.append(("integers", f"{self.integer} ({self.images:,} images)"))
        found.append(("float simulation", f"{self.simulated} ({self.images:,} images)"))
        if self.costs:
            worst = self.costs[0]
            found.append(("costliest alone", f"{worst.kind} {worst.name}, {worst.bits} bits: {worst.alone}"))
        if self.without_signal:
            found.append(("without influence in calibration", ", ".join(self.without_signal)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types, with a version; `from_dict` is the inverse."""
        layers = [{"name": name, "bits": bits, "weights": count} for name, (bits, count) in self.layers.items()]
        return {"version": DIAGNOSIS_VERSION, **asdict(self), "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """Restores a diagnosis; the inverse of `to_dict`.

        Args:
            data: What `to_dict` returned.

        Returns:
            The diagnosis.

        Raises:
            ValueError: If `data` has another version.
        """
        if data.get("version") != DIAGNOSIS_VERSION:
            raise ValueError(
                f"a diagnosis of version {DIAGNOSIS_VERSION} is expected, not {data.get('version')!r}; pass what "
                "quant.diagnose of this version of swincompress_pl gives"
            )
        plain = {key: value for key, value in data.items() if key != "version"}
        read = {
            "simulated": Effect(**data["simulated"]),
            "integer": None if data["integer"] is None else Effect(**data["integer"]),
            "layers": {layer["name"]: (layer["bits"], layer["weights"]) for layer in data["layers"]},
            "errors": tuple(QuantizationError(**error) for error in data["errors"]),
            "costs": tuple(QuantizerCost.from_dict(cost) for cost in data["costs"]),
            "without_signal": tuple(data.get("without_signal", ())),
            "histograms": tuple(Histogram(**{**each, "counts": tuple(each["counts"])}) for each in data["histograms"]),
        }
        return cls(**plain | read)

    def __str__(self) -> str:
        silent = f"without influence in calibration: {', '.join(self.without_signal)}" if self.without_signal else ""
        return "\n\n".join(part for part in (cost_table(self.costs), error_table(self.errors), silent) if part)


@renamed(batch="batch_size")
@full_precision()
def diagnose(
    quantized: QuantizedNetwork,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    costs: bool = True,
    histograms: int = 6,
    batch_size: int = 32,
    progress: Progress = False,
) -> Diagnosis:
    """Measures what quantization does to a network on some images, as a whole and for each quantizer.

    Args:
        quantized: What `quantize` returned.
        images: Normalized float images (N, C, H, W), at least one, on the network's device.
        labels: Class numbers (N,), integers, for top-1; None for none.
        costs: Whether to measure `quantizer_costs`, too, which takes about as many passes over the images as there are
            quantizers.
        histograms: For how many quantizers to make histograms: the costliest ones, or without costs those with the
            largest error.
        batch_size: Number of images per pass.
        progress: As in `quantize`.

    Returns:
        The diagnosis.

    Raises:
        TypeError: If the network is not quantized.
        ValueError: If images or labels do not fit the network, it gives features instead of classes, or `batch_size` or
            `histograms` is not an integer in its range.
    """
    labels = checked_labels(quantized, images, labels)
    batch_size = checked_count("batch_size", batch_size, least=1)
    histograms = checked_count("histograms", histograms, least=0)
    require_classes(quantized)
    images = images.float()
    with standing_still(quantized), torch.no_grad():
        parts = images.split(batch_size)
        expected = torch.cat([float_logits(quantized.graph, quantized.network, part) for part in parts])
        simulated = torch.cat([quantized.fake_quantized(part) for part in parts])
        integer = None if quantized.method == "affine" else torch.cat([quantized(part) for part in parts])
        found, samples = measure_errors(quantized, parts, progress)
        rows = measure_costs(quantized, images, labels, batch_size=batch_size, progress=progress) if costs else []
    by_error = sorted(found, key=lambda error: float("inf") if error.own_snr_db is None else error.own_snr_db)
    shown = [(row.kind, row.name) for row in (rows or by_error)][:histograms]
    nodes = {node.name: node for node in quantized.graph.weighted_nodes}
    return Diagnosis(
        method=quantized.method,
        bits=str(quantized.bits),
        images=len(images),
        simulated=effect(expected, simulated, labels),
        integer=None if integer is None else effect(expected, integer, labels),
        paired=None if labels is None else _paired(expected, simulated if integer is None else integer, labels),
        layers={
            name: (quantized.scales.weight_quantizer(node).bits, node.folded_weight(quantized.network, None).numel())
            for name, node in nodes.items()
        },
        errors=tuple(found),
        costs=tuple(rows),
        without_signal=quantized.without_signal,
        histograms=tuple(samples[key].histogram(key) for key in shown if key in samples),
    )


def _paired(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, int]:
    was, is_now = before.argmax(1) == labels, after.argmax(1) == labels
    counts = {
        "both_right": was & is_now,
        "right_to_wrong": was & ~is_now,
        "wrong_to_right": ~was & is_now,
        "both_wrong": ~(was | is_now),
        "same_predictions": before.argmax(1) == after.argmax(1),
    }
    return {name: int(images.sum()) for name, images in counts.items()}
