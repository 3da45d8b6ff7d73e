"""What each quantizer costs compared with the float network: each one alone, and all of them but one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from swincompress_pl._deprecated import renamed
from swincompress_pl.evaluation_mode import standing_still
from swincompress_pl.quant.diagnosis.errors import Key, checked_count, checked_labels, first_nodes, require_classes
from swincompress_pl.quant.full_precision import full_precision
from swincompress_pl.quant.graph import Delegating, QuantizerSpec, Run, WeightedNode, float_logits
from swincompress_pl.quant.graph.outputs import joined
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.progress import Progress, track
from swincompress_pl.quant.scales import Scales
from swincompress_pl.spec import INPUT_VALUE
from swincompress_pl.text_table import show, text_table


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How a quantized network differs from the float one on some images.

    Attributes:
        kl: Mean KL divergence from the float network's classes, in nats.
        agreement_percent: Share of images with the same predicted class, in percent.
        top1_percent: Top-1 accuracy of the quantized network, in percent; None without labels.
    """

    kl: float
    agreement_percent: float
    top1_percent: float | None = None

    def __str__(self) -> str:
        top1 = "" if self.top1_percent is None else f", top-1 {self.top1_percent:.2f} %"
        return f"{self.agreement_percent:.2f} % same predictions as in float, KL {self.kl:.3g}{top1}"


@dataclass(frozen=True, kw_only=True)
class QuantizerCost:
    """What one activation quantizer, or the weights of one layer, cost.

    Attributes:
        name: Name of the quantizer, or of the layer.
        kind: "activation" or "weight".
        bits: Its width.
        alone: The effect if only this one is quantized.
        others: The effect if everything but this one is quantized.
    """

    name: str
    kind: str
    bits: int
    alone: Effect
    others: Effect

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizerCost:
        """Restores a cost; the inverse of `to_dict`.

        Args:
            data: What `to_dict` returned.

        Returns:
            The cost.
        """
        return cls(**{**data, "alone": Effect(**data["alone"]), "others": Effect(**data["others"])})


@renamed(batch="batch_size")
@full_precision()
def quantizer_costs(
    quantized: QuantizedNetwork,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = False,
) -> list[QuantizerCost]:
    """Measures what every activation quantizer of up to 16 bits and every layer's weights cost.

    This takes about as many passes over the images as there are quantizers.

    Args:
        quantized: What `quantize` returned.
        images: Normalized float images (N, C, H, W), at least one, on the network's device.
        labels: Class numbers (N,), integers, for top-1; None for none.
        batch_size: Number of images per pass.
        progress: As in `quantize`.

    Returns:
        The costs, with the largest KL divergence alone first.

    Raises:
        TypeError: If the network is not quantized.
        ValueError: If images or labels do not fit the network, it gives features instead of classes, or `batch_size` is
            not an integer of 1 or more.
    """
    labels = checked_labels(quantized, images, labels)
    batch_size = checked_count("batch_size", batch_size, least=1)
    require_classes(quantized)
    with standing_still(quantized), torch.no_grad():
        return measure_costs(quantized, images.float(), labels, batch_size=batch_size, progress=progress)


def cost_table(costs: Sequence[QuantizerCost]) -> str:
    """Formats costs as a table for a terminal, which is also valid Markdown.

    Args:
        costs: What `quantizer_costs` returned.

    Returns:
        The table; "" if there are no costs.
    """
    labelled = any(cost.alone.top1_percent is not None for cost in costs)
    header = ["quantizer", "kind", "bits", "alone: KL", "agreement"] + ["top-1"] * labelled
    header += ["all others: KL", "agreement"] + ["top-1"] * labelled
    rows = [[c.name, c.kind, str(c.bits), *_cells(c.alone, labelled), *_cells(c.others, labelled)] for c in costs]
    return text_table(header, rows) if rows else ""


def _cells(effect: Effect, labelled: bool) -> list[str]:
    top1 = [show(effect.top1_percent, ".2f") + " %"] if labelled else []
    return [f"{effect.kl:.3g}", f"{effect.agreement_percent:.2f} %", *top1]


def divergence(float_logits: Tensor, logits: Tensor) -> Tensor:
    """The KL divergence of each image's classes from the float ones, (N,), in nats, at least 0."""
    expected, found = float_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).clamp(min=0)


def effect(expected: Tensor, logits: Tensor, labels: Tensor | None) -> Effect:
    """The effect of quantization, from float logits, quantized logits and labels."""
    same = logits.argmax(1) == expected.argmax(1)
    return Effect(
        kl=float(divergence(expected, logits).mean()),
        agreement_percent=100 * float(same.double().mean()),
        top1_percent=None if labels is None else 100 * float((logits.argmax(1) == labels).double().mean()),
    )


class _Only(Delegating):
    """Quantizes only one value or weight, or everything but that one; with None, nothing or everything."""

    def __init__(self, scales: Scales, key: Key | None, *, others: bool = False) -> None:
        super().__init__(scales)
        self.key, self.others = key, others

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        return self.inner.activation(spec, x) if self._taken("activation", spec.name) else x

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return self.inner.weight(node, weight) if self._taken("weight", node.name) else weight

    def _taken(self, *key: str) -> bool:
        return (key == self.key) != self.others


def measure_costs(
    quantized: QuantizedNetwork, images: Tensor, labels: Tensor | None, *, batch_size: int, progress: Progress
) -> list[QuantizerCost]:
    """The costs of all quantizers.

    What comes before a quantizer is the same as in the float run, or in the quantized one, and is computed only once.
    """
    graph, network = quantized.graph, quantized.network
    scales = quantized.scales.fixed(graph, network)
    end = len(graph.nodes)
    first = first_nodes(quantized)
    logits: dict[tuple[Key, bool], list[Tensor]] = {(key, others): [] for key in first for others in (False, True)}
    expected = []
    for part in track(list(images.split(batch_size)), "measuring quantizers", progress):
        expected.append(float_logits(graph, network, part))
        for others in (False, True):
            values: Mapping[str, Tensor] = {INPUT_VALUE: part}
            done, common = 0, Run(graph, network, _Only(scales, None, others=others))
            for key, start in sorted(first.items(), key=lambda item: item[1]):
                values, done = common.advance(values, range(done, start)), start
                apart = Run(graph, network, _Only(scales, key, others=others)).advance(values, range(start, end))
                logits[key, others].append(joined(common.results(apart)))
    whole = torch.cat(expected)
    effects = {name: effect(whole, torch.cat(parts), labels) for name, parts in logits.items()}
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
