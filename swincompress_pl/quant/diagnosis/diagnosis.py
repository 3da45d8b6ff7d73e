"""Which quantizer costs the most accuracy: each one quantized alone, all but each one, and how well its scale fits.

All of it looks at the float simulation (`fake_quantized`), where single quantizers can be switched; only the
predictions of the whole network in a `Diagnosis` are the integer norm's. The float network is the one inside the
quantized network, with what bias correction, learned rounding or training wrote into its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from swincompress_pl.quant.diagnosis.inspection import divergence, show, standing_still, text_table
from swincompress_pl.quant.diagnosis.quantization_errors import (
    Histogram,
    Key,
    QuantizationError,
    error_table,
    first_nodes,
    measure_errors,
)
from swincompress_pl.quant.graph.graph import Passthrough, Run, WeightedNode, float_logits
from swincompress_pl.quant.graph.quantizer_spec import QuantizerSpec
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.scales import Scales
from swincompress_pl.spec import INPUT_VALUE

DIAGNOSIS_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A quantized network against the float one: mean KL divergence in nats, agreement of predictions and, with labels,
    top-1, both in percent."""

    kl: float
    agreement_percent: float
    top1_percent: float | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizerCost:
    """What one activation quantizer (kind "activation") or one layer's weights ("weight") cost.

    alone: only this one quantized. others: everything but this one quantized.
    """

    name: str
    kind: str
    bits: int
    alone: Effect
    others: Effect

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that a report on one quantized network shows; plain data through `to_dict`.

    simulated: the float simulation against the float network; integer: the norm, None for method "affine". paired:
    counts of right and wrong predictions before and after (integers, or the simulation where there are none), None
    without labels. layers: {layer: (weight bits, number of weights)}.
    """

    method: str
    bits: str
    images: int
    simulated: Effect
    integer: Effect | None
    paired: Mapping[str, int] | None
    layers: Mapping[str, tuple[int, int]]
    errors: tuple[QuantizationError, ...]
    costs: tuple[QuantizerCost, ...]
    histograms: tuple[Histogram, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types, with a version."""
        layers = [{"name": name, "bits": bits, "weights": count} for name, (bits, count) in self.layers.items()]
        return {"version": DIAGNOSIS_VERSION, **asdict(self), "layers": layers}

    def __str__(self) -> str:
        return "\n\n".join(part for part in (cost_table(self.costs), error_table(self.errors)) if part)


def diagnose(
    quantized: QuantizedNetwork,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    costs: bool = True,
    histograms: int = 6,
    batch: int = 32,
    progress: bool = False,
) -> Diagnosis:
    """Everything known about a quantized network on some images.

    images: normalized float (N, C, H, W). labels: (N,) classes. costs: also `quantizer_costs`, which takes about as
    many passes over the images as there are quantizers. histograms: of so many quantizers, the costliest ones (with
    costs) or those of most error. batch: images at a time. Raises ValueError for images or labels that do not fit.
    """
    labels = _checked(quantized, images, labels)
    with standing_still(quantized), torch.no_grad():
        parts = images.split(batch)
        expected = torch.cat([float_logits(quantized.graph, quantized.network, part) for part in parts])
        simulated = torch.cat([quantized.fake_quantized(part) for part in parts])
        integer = None if quantized.method == "affine" else torch.cat([quantized(part) for part in parts])
        found, samples = measure_errors(quantized, parts)
        rows = _costs(quantized, images, labels, batch=batch, progress=progress) if costs else []
    by_error = sorted(found, key=lambda error: float("inf") if error.own_snr_db is None else error.own_snr_db)
    shown = [(row.kind, row.name) for row in (rows or by_error)][:histograms]
    nodes = {node.name: node for node in quantized.graph.weighted_nodes}
    return Diagnosis(
        method=quantized.method,
        bits=str(quantized.bits),
        images=len(images),
        simulated=_effect(expected, simulated, labels),
        integer=None if integer is None else _effect(expected, integer, labels),
        paired=None if labels is None else _paired(expected, simulated if integer is None else integer, labels),
        layers={
            name: (quantized.scales.weight_quantizer(node).bits, node.folded_weight(quantized.network, None).numel())
            for name, node in nodes.items()
        },
        errors=tuple(found),
        costs=tuple(rows),
        histograms=tuple(samples[key].histogram(key) for key in shown if key in samples),
    )


def quantizer_costs(
    quantized: QuantizedNetwork,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch: int = 32,
    progress: bool = False,
) -> list[QuantizerCost]:
    """What every activation quantizer of up to 16 bits and every weight costs, the largest KL divergence alone first.

    images: normalized float (N, C, H, W). labels: (N,) classes, for top-1. batch: images at a time. It takes about as
    many passes over the images as there are quantizers. Raises ValueError for images or labels that do not fit.
    """
    labels = _checked(quantized, images, labels)
    with standing_still(quantized), torch.no_grad():
        return _costs(quantized, images, labels, batch=batch, progress=progress)


def quantization_errors(quantized: QuantizedNetwork, images: Tensor, *, batch: int = 32) -> list[QuantizationError]:
    """The error and the fit of every activation quantizer of up to 16 bits, in the network's order, and of every weight
    after its input.

    images: normalized float (N, C, H, W). Raises ValueError for images that do not fit.
    """
    _checked(quantized, images, None)
    with standing_still(quantized), torch.no_grad():
        return measure_errors(quantized, images.split(batch))[0]


def cost_table(costs: Sequence[QuantizerCost]) -> str:
    """`quantizer_costs` for a terminal; "" for none."""
    labelled = any(cost.alone.top1_percent is not None for cost in costs)
    header = ["quantizer", "kind", "bits", "alone: KL", "agreement"] + ["top-1"] * labelled
    header += ["all others: KL", "agreement"] + ["top-1"] * labelled
    rows = [[c.name, c.kind, str(c.bits), *_cells(c.alone, labelled), *_cells(c.others, labelled)] for c in costs]
    return text_table(header, rows) if rows else ""


def _cells(effect: Effect, labelled: bool) -> list[str]:
    top1 = [show(effect.top1_percent, ".2f") + " %"] if labelled else []
    return [f"{effect.kl:.3g}", f"{effect.agreement_percent:.2f} %", *top1]


def _checked(quantized: QuantizedNetwork, images: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels where the images are."""
    if not isinstance(quantized, QuantizedNetwork):
        raise TypeError(f"{type(quantized).__name__} is not quantized; pass what quant.quantize gives")
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not len(images):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images is {shape}; give at least one normalized float image (N, C, H, W)")
    quantized.pixels(images)  # refuses images of another normalization
    if labels is None:
        return None
    if tuple(labels.shape) != (len(images),) or labels.is_floating_point():
        raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}; give one class number for each image")
    return labels.to(images.device)


def _effect(expected: Tensor, logits: Tensor, labels: Tensor | None) -> Effect:
    same = logits.argmax(1) == expected.argmax(1)
    return Effect(
        kl=float(divergence(expected, logits).mean()),
        agreement_percent=100 * float(same.double().mean()),
        top1_percent=None if labels is None else 100 * float((logits.argmax(1) == labels).double().mean()),
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


class _Only(Passthrough):
    """Quantizes one value or weight, or everything but that one; None: nothing, or everything."""

    def __init__(self, scales: Scales, key: Key | None, *, others: bool = False) -> None:
        self.scales, self.key, self.others = scales, key, others
        self._equalizations = scales.equalizations

    @property
    def equalizations(self) -> Mapping[str, Tensor]:
        return self._equalizations

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        taken = (("activation", spec.name) == self.key) != self.others
        return self.scales.activation(spec, x) if taken else x

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        taken = (("weight", node.name) == self.key) != self.others
        return self.scales.weight(node, weight) if taken else weight


def _costs(
    quantized: QuantizedNetwork, images: Tensor, labels: Tensor | None, *, batch: int, progress: bool
) -> list[QuantizerCost]:
    """A run with one quantizer apart shares everything before that one with the float or the whole quantized run."""
    graph, network = quantized.graph, quantized.network
    scales = quantized.scales.fixed(graph, network)
    end = len(graph.nodes)
    first = first_nodes(quantized)
    logits: dict[tuple[Key, bool], list[Tensor]] = {(key, others): [] for key in first for others in (False, True)}
    expected = []
    for part in track(list(images.split(batch)), "measuring quantizers", transient=True, disable=not progress):
        expected.append(float_logits(graph, network, part))
        for others in (False, True):
            values: Mapping[str, Tensor] = {INPUT_VALUE: part}
            done, common = 0, Run(graph, network, _Only(scales, None, others=others))
            for key, start in sorted(first.items(), key=lambda item: item[1]):
                values, done = common.advance(values, range(done, start)), start
                apart = Run(graph, network, _Only(scales, key, others=others)).advance(values, range(start, end))
                logits[key, others].append(apart[graph.nodes[-1].output].flatten(1))
    whole = torch.cat(expected)
    effects = {name: _effect(whole, torch.cat(parts), labels) for name, parts in logits.items()}
    bits = {key: _bits(quantized, key) for key in first}
    costs = [
        QuantizerCost(name=key[1], kind=key[0], bits=bits[key], alone=effects[key, False], others=effects[key, True])
        for key in first
    ]
    return sorted(costs, key=lambda cost: -cost.alone.kl)


def _bits(quantized: QuantizedNetwork, key: Key) -> int:
    if key[0] == "activation":
        return quantized.graph.quantizers[key[1]].bits
    return next(
        quantized.scales.weight_quantizer(node).bits for node in quantized.graph.weighted_nodes if node.name == key[1]
    )
