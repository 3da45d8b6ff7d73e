"""What calibration measures in a float network: ranges of values, and samples of layers with sensitivities."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import gradients
from swincompress_pl.quant.full_precision import ordinary
from swincompress_pl.quant.graph import Graph, Node, Passthrough, QuantizerSpec, Run, WeightedNode
from swincompress_pl.quant.probe import Probe

# How many images are calibrated on together at most, and how many bytes a backward pass may keep for them.
_IMAGES_TOGETHER, _BYTES_TOGETHER = 8, 1 << 30
# How many values of a quantizer are sampled for a percentile: per micro-batch, and in total.
_VALUES_PER_BATCH, _VALUES = 1 << 14, 1 << 18
# The weight of the errors of an output without sensitivity. The largest weight of the others is about 1.
_UNHEARD = 2.0**-20


def first_images(calibration: Iterable[Any], limit: int) -> list[Tensor]:
    """The first `limit` images of an iterable of batches, each a tensor of images or a sequence that starts with one.

    A TypeError that names what was found is raised for batches of another form, and a ValueError if there are none.
    """
    batches: list[Tensor] = []
    count = 0
    for batch in calibration:
        images = batch[0] if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) else batch
        if not isinstance(images, Tensor) or images.ndim not in (4, 5) or not images.is_floating_point():
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"calibration batch holds {shape}; give batches as the network takes them: normalized float images "
                f"(N, C, H, W), or events (N, T, C, H, W), alone or first in a tuple (images, labels)"
            )
        batches.append(images[: limit - count])
        count += len(batches[-1])
        if count >= limit:
            break
    if count == 0:
        raise ValueError("calibration is empty; give at least one batch of images")
    return batches


def joined(batches: Sequence[Tensor], device: torch.device) -> Tensor:
    """All images in one tensor, in float32; a ValueError is raised for images of several sizes."""
    shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise ValueError(f"calibration has images of {shapes[0]} and {shapes[1]}; give images of one size")
    return torch.cat([ordinary(batch, device) for batch in batches])


def micro_batches(graph: Graph, network: nn.Module, images: Tensor) -> list[Tensor]:
    """`images` in parts, whose size depends only on the graph; the network must be in eval mode.

    So the samples from them, and the memory that they take, do not depend on the batches of the caller.
    """
    each = bytes_of_backward(graph, network, images[:1])
    return list(images.split(max(1, min(_IMAGES_TOGETHER, _BYTES_TOGETHER // each))))


def bytes_of_backward(graph: Graph, network: nn.Module, image: Tensor) -> int:
    """About how many bytes the network keeps per image for a backward pass, at least 1.

    This is the difference between two images and one.
    """

    def kept_of(images: Tensor) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Run(graph, network, Passthrough())(images.clone().requires_grad_(True))
        return sum(sizes)

    with gradients(network.parameters(), wanted=False):
        return max(1, kept_of(torch.cat([image, image])) - kept_of(image))


@dataclass
class Ranges:
    """The extremes (C,) of one quantizer's values over all calibration images, per channel, and some rows (R, C)."""

    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude of each channel, (C,)."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def clip(self, percentile: float | None) -> Tensor:
        """The magnitude of each channel, (C,), at most the percentile of the sampled magnitudes unless that is None."""
        if percentile is None:
            return self.magnitude
        values = self.rows.abs().flatten().sort().values
        rank = min(len(values) - 1, int(len(values) * percentile / 100))
        return self.magnitude.clamp(max=max(float(values[rank]), torch.finfo(values.dtype).tiny))

    def bounds(self, percentile: float | None) -> tuple[Tensor, Tensor]:
        """The least and the largest value of each channel, (C,) each, neither further from 0 than `clip`."""
        clip = self.clip(percentile)
        return self.low.clamp(min=-clip), self.high.clamp(max=clip)


class RangeObserver(Passthrough):
    """Keeps the true extremes of the values, where an outlier of one pixel counts, and a sample of rows."""

    def __init__(self, *, values_per_batch: int, seed: int = 0) -> None:
        self.ranges: dict[str, Ranges] = {}
        self._values_per_batch = values_per_batch
        self._generator = torch.Generator().manual_seed(seed)

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        """Observes a value; a ValueError that names its quantizer is raised for NaN or infinite values."""
        rows = x.reshape(-1, x.shape[-1])
        low, high = rows.amin(0), rows.amax(0)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError(
                f"activation quantizer {spec.name!r} sees NaN or infinite values in calibration; check the images "
                "and the weights before it"
            )
        some = self._sample(rows)
        known = self.ranges.get(spec.name)
        if known is not None:
            low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
            some = torch.cat([known.rows, some])
        self.ranges[spec.name] = Ranges(low, high, some)
        return x

    def _sample(self, rows: Tensor) -> Tensor:
        if not self._values_per_batch:
            return rows[:0]
        count = max(1, self._values_per_batch // rows.shape[1])
        return rows[torch.randint(len(rows), (count,), generator=self._generator).to(rows.device)]


@dataclass
class LayerSample:
    """Sampled rows of one weighted layer: inputs (R, K), and the sensitivity of the loss to each output (R, M)."""

    inputs: list[Tensor] = field(default_factory=list)
    sensitivity: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The inputs, and the weights of the errors of each output: `usable` sensitivities."""
        return torch.cat(self.inputs), usable(torch.cat(self.sensitivity))

    @property
    def has_signal(self) -> bool:
        """Whether the sensitivities tell anything: at least one is not 0, and all are finite."""
        return any(bool(part.any()) for part in self.sensitivity) and all(
            bool(torch.isfinite(part).all()) for part in self.sensitivity
        )


def without_signal(samples: Mapping[str, LayerSample]) -> tuple[str, ...]:
    """The layers whose sensitivities tell nothing; if there are any, a warning names the first one."""
    silent = tuple(name for name, sample in samples.items() if not sample.has_signal)
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(samples)} layers have no influence on the network's answers on the calibration "
            f"images; the first is {silent[0]}. So the search cannot see what rounding them costs, and minimizes their "
            "own errors. Is the network trained, and do the images differ?",
            stacklevel=2,
        )
    return silent


def usable(sensitivity: Tensor) -> Tensor:
    """The sensitivities (R, M) as weights of errors, whose squares neither vanish nor overflow.

    They are multiplied by a power of two, which does not change the comparison of errors. An output without
    sensitivities gets the same tiny weight in all rows. If all outputs have none, or a value is not finite, all weights
    are 1.
    """
    largest = sensitivity.abs().max()
    if not (torch.isfinite(largest) and largest > 0):
        return torch.ones_like(sensitivity)
    half, odd = divmod(-math.frexp(float(largest))[1], 2)  # two factors, neither of which leaves the range of float32
    scaled = sensitivity * 2.0**half * 2.0 ** (half + odd)
    return torch.where(scaled.any(0), scaled, _UNHEARD)


class LayerSampler(Passthrough):
    """Samples `rows_per_batch` random rows of every weighted layer, and later the gradients of their outputs."""

    def __init__(self, network: nn.Module, *, rows_per_batch: int, seed: int = 0) -> None:
        self.network, self.rows_per_batch = network, rows_per_batch
        self.samples: dict[str, LayerSample] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Samples a layer's input, and registers a hook for the gradient of its output."""
        if not isinstance(node, WeightedNode):
            return
        sample = self.samples.setdefault(node.name, LayerSample())
        with torch.no_grad():
            rows = output[..., 0].numel()
            picked = torch.randperm(rows, generator=self._generator)[: self.rows_per_batch].to(output.device)
            sample.inputs.append(node.sampled_rows(self.network, inputs[0], picked))
        output.register_hook(lambda grad: sample.sensitivity.append(grad.reshape(-1, grad.shape[-1])[picked].detach()))


def observe(
    graph: Graph, network: nn.Module, batches: Sequence[Tensor], *, percentile: float | None = None
) -> dict[str, Ranges]:
    """The extremes of every quantizer's values over the batches, and some of the values if a percentile needs them."""
    sampled = 0 if percentile is None else min(_VALUES_PER_BATCH, _VALUES // len(batches))
    observer = RangeObserver(values_per_batch=sampled)
    with torch.no_grad():
        for images in batches:
            Run(graph, network, observer)(images)
    return observer.ranges


def sample_layers(
    graph: Graph, network: nn.Module, batches: Sequence[Tensor], *, rows: int, seed: int = 0
) -> dict[str, LayerSample]:
    """The inputs and output sensitivities of every weighted layer, about `rows` rows each.

    The sensitivity is the gradient of a `Probe`. Source: the objective of PTQ4ViT (arXiv 2111.12293), with a Hutchinson
    estimate.
    """
    sampler = LayerSampler(network, rows_per_batch=max(1, rows // len(batches)), seed=seed)
    probe = Probe.of(graph, network, batches, seed=seed + 1)
    with gradients(network.parameters(), wanted=False):
        for images in batches:
            with torch.enable_grad():
                logits = Run(graph, network, sampler)(images.detach().clone().requires_grad_(True))
                probe(logits).backward()
    return sampler.samples
