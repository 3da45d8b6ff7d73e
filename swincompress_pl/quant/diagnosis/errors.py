"""How far the values of every quantizer and weight lie from the float network's, and how well each scale fits them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from swincompress_pl._deprecated import renamed
from swincompress_pl.arguments import integer
from swincompress_pl.evaluation_mode import standing_still
from swincompress_pl.quant.full_precision import full_precision
from swincompress_pl.quant.graph import Delegating, Passthrough, QuantizerSpec, Run, WeightedNode
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.progress import Progress, track
from swincompress_pl.quant.quantizers import affine_range
from swincompress_pl.quant.scales import Scales
from swincompress_pl.text_table import show, text_table

# Quantizers of more bits than this have no error that a better scale could reduce.
_WIDEST = 16
_PERCENTILE = 99.99
_SAMPLED_VALUES = 1 << 17
_HISTOGRAM_BINS = 80
Key = tuple[str, str]  # ("activation", name of a quantizer) or ("weight", name of a layer)


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """How far the values of one quantizer, or of one layer's weights, lie from the float ones, and how the scale fits.

    If a quantizer has several scales (q, k and v, the rows of a weight), the most clipped one counts.

    Attributes:
        name: Name of the quantizer, or of the layer.
        kind: "activation" or "weight".
        bits: Its width.
        signed: Whether its codes have a sign.
        snr_db: Signal-to-noise ratio in decibels against the float network at the same place, with all errors before
            it; None if there is no signal or no noise.
        own_snr_db: The same for the rounding and clipping of this quantizer alone.
        clipped_percent: Share of the values that are clipped, in percent.
        used_codes: Number of different codes that occur.
        codes: Number of codes that there are.
        clip_to_max: The largest value that the scale can express over the largest magnitude; below 1 it clips. None
            for the method "affine", or if all values are 0.
        clip_to_p9999: The same over the 99.99th percentile of the magnitudes of a sample.
    """

    name: str
    kind: str
    bits: int
    signed: bool
    snr_db: float | None
    own_snr_db: float | None
    clipped_percent: float
    used_codes: int
    codes: int
    clip_to_max: float | None
    clip_to_p9999: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A histogram of the float values of one quantizer or layer, in steps of its scale.

    Attributes:
        name: Name of the quantizer, or of the layer.
        kind: "activation" or "weight".
        low: Where the first bin begins, in steps.
        high: Where the last bin ends, in steps.
        counts: Number of values in each bin; all bins are equally wide.
        clip_low: The least code.
        clip_high: The largest code.
    """

    name: str
    kind: str
    low: float
    high: float
    counts: tuple[int, ...]
    clip_low: int
    clip_high: int


@renamed(batch="batch_size")
@full_precision()
def quantization_errors(
    quantized: QuantizedNetwork, images: Tensor, *, batch_size: int = 32, progress: Progress = False
) -> list[QuantizationError]:
    """Measures the errors of every activation quantizer of up to 16 bits and of every layer's weights.

    Args:
        quantized: What `quantize` returned.
        images: Normalized float images (N, C, H, W), at least one, on the network's device.
        batch_size: Number of images per pass.
        progress: As in `quantize`.

    Returns:
        The errors in the network's order, the weights of a layer before the quantizer of its output.

    Raises:
        TypeError: If the network is not quantized.
        ValueError: If the images do not fit the network, or `batch_size` is not an integer of 1 or more.
    """
    checked_labels(quantized, images, None)
    batch_size = checked_count("batch_size", batch_size, least=1)
    with standing_still(quantized), torch.no_grad():
        return measure_errors(quantized, images.float().split(batch_size), progress)[0]


def error_table(errors: Sequence[QuantizationError]) -> str:
    """Formats errors as a table for a terminal, which is also valid Markdown.

    Args:
        errors: What `quantization_errors` returned.

    Returns:
        The table; "" if there are no errors.
    """
    header = ["quantizer", "kind", "bits", "SNR, dB", "own SNR, dB", "clipped", "codes used"]
    header += ["clip / max", "clip / p99.99"]
    rows = [
        [
            e.name,
            e.kind,
            f"{'' if e.signed else 'u'}{e.bits}",
            show(e.snr_db, ".1f"),
            show(e.own_snr_db, ".1f"),
            f"{e.clipped_percent:.3f} %",
            f"{e.used_codes} / {e.codes}",
            show(e.clip_to_max, ".3f"),
            show(e.clip_to_p9999, ".3f"),
        ]
        for e in errors
    ]
    return text_table(header, rows) if rows else ""


def checked_labels(quantized: QuantizedNetwork, images: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels on the images' device; a TypeError or ValueError is raised for what does not fit."""
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


def checked_count(name: str, value: int, *, least: int) -> int:
    """`value` as an integer of at least `least`; a ValueError that names it is raised for anything else."""
    return integer(name, value, least=least)


def require_classes(quantized: QuantizedNetwork) -> None:
    """Raises a ValueError for a network that gives features or maps, whose cost depends on the head outside it."""
    if quantized.graph.embeds:
        raise ValueError(
            f"{type(quantized.network).__name__} gives features and not classes, so no divergence can be measured; "
            "use quantization_errors"
        )


def first_nodes(quantized: QuantizedNetwork) -> dict[Key, int]:
    """{quantizer or weight: index of the first node that it acts on}, in the network's order."""
    first: dict[Key, int] = {}
    for number, node in enumerate(quantized.graph.nodes):
        if isinstance(node, WeightedNode):
            first["weight", node.name] = number
        if node.quantizer is not None and quantized.graph.quantizers[node.quantizer].bits <= _WIDEST:
            first.setdefault(("activation", node.quantizer), number)
    return first


def decibels(signal: float, noise: float) -> float | None:
    """10 log10 of signal to noise power; None if there is no noise or no signal."""
    return 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10()) if signal > 0 and noise > 0 else None


class Tally:
    """Sums over the values of one quantizer or weight: errors, clipping, codes, and a sample in units of the step."""

    def __init__(self, low: int, high: int, *, samples: int) -> None:
        self.low, self.high, self.samples = low, high, samples
        self.sums = dict.fromkeys(("signal", "noise", "own_signal", "own_noise"), 0.0)
        self.clipped = self.values = 0
        self.largest = 0.0
        self.used = torch.zeros(high - low + 1, dtype=torch.bool)
        self.sample: list[Tensor] = []

    def add(self, expected: Tensor, before: Tensor, after: Tensor, expected_steps: Tensor, steps: Tensor) -> None:
        """Adds the values of some images.

        `expected` are those of the float network, `before` and `after` those of the quantized network on both sides of
        the rounding here. `expected_steps` and `steps` are `expected` and `before` in steps of the scale.
        """
        pairs = {"signal": expected, "noise": after - expected, "own_signal": before, "own_noise": after - before}
        for name, value in pairs.items():
            self.sums[name] += float(value.double().square().sum())
        codes = steps.round()
        self.clipped += int(((codes < self.low) | (codes > self.high)).sum())
        self.values += codes.numel()
        self.used[(codes.clamp(self.low, self.high) - self.low).long().flatten().unique().cpu()] = True
        self.largest = max(self.largest, float(expected_steps.abs().max()))
        stride = -(-expected_steps.numel() // self.samples)
        self.sample.append(expected_steps.flatten()[::stride].float().cpu())

    def histogram(self, key: Key) -> Histogram:
        """The histogram of the sample, for the quantizer or weight `key`."""
        values = torch.cat(self.sample)
        low, high = float(values.min()), float(values.max())
        high = high if high > low else low + 1.0
        counts = torch.histc(values, _HISTOGRAM_BINS, low, high).long().tolist()
        return Histogram(
            name=key[1], kind=key[0], low=low, high=high, counts=tuple(counts), clip_low=self.low, clip_high=self.high
        )

    def error(self, key: Key, *, bits: int, symmetric: bool) -> QuantizationError:
        """The error that the sums give, for the quantizer or weight `key`."""
        magnitudes = torch.cat(self.sample).abs().sort().values
        percentile = float(magnitudes[min(len(magnitudes) - 1, int(len(magnitudes) * _PERCENTILE / 100))])
        return QuantizationError(
            name=key[1],
            kind=key[0],
            bits=bits,
            signed=self.low < 0,
            snr_db=decibels(self.sums["signal"], self.sums["noise"]),
            own_snr_db=decibels(self.sums["own_signal"], self.sums["own_noise"]),
            clipped_percent=100 * self.clipped / self.values,
            used_codes=int(self.used.sum()),
            codes=len(self.used),
            clip_to_max=self.high / self.largest if symmetric and self.largest else None,
            clip_to_p9999=self.high / percentile if symmetric and percentile else None,
        )


class _Kept(Passthrough):
    """The float network; keeps the values that would be quantized, in order."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        self.values.append(x)
        return x


class _Compared(Delegating):
    """The quantized network; compares every value with the float ones, which come in the same order."""

    def __init__(self, scales: Scales, expected: Iterable[Tensor], tallies: dict[Key, Tally], samples: int) -> None:
        super().__init__(scales)
        self.scales, self.expected, self.tallies, self.samples = scales, iter(expected), tallies, samples

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        expected, after = next(self.expected), self.scales.activation(spec, x)
        if spec.bits <= _WIDEST:
            scale, offset = self.scales.activation_quantizer(spec), torch.zeros((), device=x.device)
            low, high = (-spec.q_max if spec.signed else 0), spec.q_max
            if scale.affine and spec.searched:
                sizes = torch.tensor(spec.segments, device=x.device)
                (low, high), offset = affine_range(spec.bits), scale.zero_point.repeat_interleave(sizes)
            step = scale.channel_scales()
            if spec.can_center:
                offset = offset + scale.centering / step
            tally = self.tallies.setdefault(("activation", spec.name), Tally(low, high, samples=self.samples))
            tally.add(expected, x, after, expected / step + offset, x / step + offset)
        return after


def measure_errors(
    quantized: QuantizedNetwork, parts: Sequence[Tensor], progress: Progress = False
) -> tuple[list[QuantizationError], dict[Key, Tally]]:
    """The errors in the network's order, a weight before the quantizer of its output, and the sums behind them."""
    tallies: dict[Key, Tally] = {}
    scales = quantized.scales.fixed(quantized.graph, quantized.network)
    samples = max(1, _SAMPLED_VALUES // len(parts))
    for part in track(parts, "measuring errors", progress):
        kept = _Kept()
        Run(quantized.graph, quantized.network, kept)(part)
        compared = _Compared(scales, kept.values, tallies, samples)
        Run(quantized.graph, quantized.network, compared)(part)
    symmetric = quantized.method != "affine"
    errors = []
    for key in first_nodes(quantized):
        if key[0] == "weight":
            errors.append(_weight_error(quantized, scales, key, tallies))
        else:
            spec = quantized.graph.quantizers[key[1]]
            errors.append(tallies[key].error(key, bits=spec.bits, symmetric=symmetric or not spec.searched))
    return errors, tallies


def _weight_error(
    quantized: QuantizedNetwork, scales: Scales, key: Key, tallies: dict[Key, Tally]
) -> QuantizationError:
    graph = quantized.graph
    node = next(node for node in graph.weighted_nodes if node.name == key[1])
    spec = graph.spec_of(node.inputs[0])
    equalization = None if spec is None else scales.equalizations.get(spec.name)
    weight = node.folded_weight(quantized.network, equalization)
    scale = scales.weight_quantizer(node)
    low, high = affine_range(scale.bits) if scale.affine else (-scale.q_max, scale.q_max)
    steps = weight.flatten(1) / scale.step[:, None] + (scale.zero_point[:, None] if scale.affine else 0)
    tally = tallies[key] = Tally(low, high, samples=_SAMPLED_VALUES)
    tally.add(weight, weight, scale(weight), steps, steps)
    return tally.error(key, bits=scale.bits, symmetric=not scale.affine)
