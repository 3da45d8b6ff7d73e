"""What calibration sees of a float network: ranges of quantized values, and samples of layers with sensitivities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import gradients
from swincompress_pl.quant.graph import Graph, Node, Passthrough, QuantizerSpec, Run, WeightedNode


def first_images(calibration: Iterable[Any], limit: int) -> list[Tensor]:
    """The first `limit` images of an iterable of batches (images, or a sequence or mapping that starts with them).

    Raises TypeError for batches of another form and ValueError for none at all, naming what was found.
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


@dataclass
class Ranges:
    """Extremes of one quantizer's values over all calibration images, per channel (C,), and some of its rows (R, C)."""

    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def magnitude(self) -> Tensor:
        """(C,) the largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def clip(self, percentile: float | None) -> Tensor:
        """(C,) the magnitude, at most a percentile of the magnitudes of the sampled values; None: no less than that."""
        if percentile is None:
            return self.magnitude
        values = self.rows.abs().flatten().sort().values
        rank = min(len(values) - 1, int(len(values) * percentile / 100))
        return self.magnitude.clamp(max=max(float(values[rank]), torch.finfo(values.dtype).tiny))

    def bounds(self, percentile: float | None) -> tuple[Tensor, Tensor]:
        """(C,) least and (C,) largest value, neither further from 0 than `clip`."""
        clip = self.clip(percentile)
        return self.low.clamp(min=-clip), self.high.clamp(max=clip)


class RangeObserver(Passthrough):
    """Keeps the true extremes of quantized values, where an outlier of one pixel counts, and a sample of rows."""

    def __init__(self, *, values_per_batch: int = 1 << 14, seed: int = 0) -> None:
        self.ranges: dict[str, Ranges] = {}
        self._values_per_batch = values_per_batch
        self._generator = torch.Generator().manual_seed(seed)

    def activation(self, spec: QuantizerSpec, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low, high = rows.amin(0), rows.amax(0)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError(
                f"activation quantizer {spec.name!r} sees NaN or infinite values in calibration; check the images "
                "and the weights before it"
            )
        count = max(1, self._values_per_batch // rows.shape[1])
        some = rows[torch.randint(len(rows), (count,), generator=self._generator).to(rows.device)]
        known = self.ranges.get(spec.name)
        if known is not None:
            low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
            some = torch.cat([known.rows, some])
        self.ranges[spec.name] = Ranges(low, high, some)
        return x


@dataclass
class LayerSample:
    """Rows of one weighted layer: inputs (R, K) and the sensitivity of the loss to each output (R, M)."""

    inputs: list[Tensor] = field(default_factory=list)
    sensitivity: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.inputs), torch.cat(self.sensitivity)


class LayerSampler(Passthrough):
    """Samples `rows_per_batch` random rows of every weighted layer, and their output gradients once they arrive."""

    def __init__(self, network: nn.Module, *, rows_per_batch: int, seed: int = 0) -> None:
        self.network, self.rows_per_batch = network, rows_per_batch
        self.samples: dict[str, LayerSample] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not isinstance(node, WeightedNode):
            return
        sample = self.samples.setdefault(node.name, LayerSample())
        with torch.no_grad():
            rows = output[..., 0].numel()
            picked = torch.randperm(rows, generator=self._generator)[: self.rows_per_batch].to(output.device)
            sample.inputs.append(node.sampled_rows(self.network, inputs[0], picked))
        output.register_hook(lambda grad: sample.sensitivity.append(grad.reshape(-1, grad.shape[-1])[picked].detach()))


def observe(graph: Graph, network: nn.Module, batches: Sequence[Tensor]) -> dict[str, Ranges]:
    """Extremes of every quantizer's values over the batches."""
    observer = RangeObserver()
    with torch.no_grad():
        for images in batches:
            Run(graph, network, observer)(images)
    return observer.ranges


def probe(logits: Tensor, signs: torch.Generator) -> Tensor:
    """sum_k r_k sqrt(p_k) log p_k over all images, with random signs r.

    The square of its gradient has the diagonal of the Gauss-Newton matrix of the KL divergence to the float output as
    its expectation (the gradient of that divergence itself is zero at the float network).
    """
    log_p = logits.float().log_softmax(-1)
    sign = torch.randint(0, 2, log_p.shape, generator=signs).to(log_p.device) * 2 - 1
    return (log_p * (log_p.detach() / 2).exp() * sign).sum()


def sample_layers(
    graph: Graph, network: nn.Module, batches: Sequence[Tensor], *, rows: int, seed: int = 0
) -> dict[str, LayerSample]:
    """Inputs and output sensitivities of every weighted layer, about `rows` rows each.

    The sensitivity is the gradient of a `probe`. Source: the objective of PTQ4ViT (arXiv 2111.12293) with a Hutchinson
    estimate.
    """
    sampler = LayerSampler(network, rows_per_batch=max(1, rows // len(batches)), seed=seed)
    signs = torch.Generator().manual_seed(seed + 1)
    with gradients(network.parameters(), wanted=False):
        for images in batches:
            with torch.enable_grad():
                logits = Run(graph, network, sampler)(images.detach().clone().requires_grad_(True))
                probe(logits, signs).backward()
    return sampler.samples
