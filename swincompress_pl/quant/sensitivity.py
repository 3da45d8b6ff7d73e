"""What it costs the network's output to round the weights of one layer to a number of bits.

The loss of a layer at a width is the Gauss-Newton estimate of the KL divergence to the float output, 1/2 dW' F dW, with
the Fisher matrix F of the layer's weights. The losses of several layers add up, to second order and as far as their
errors are independent. Source of the form: HAWQ-V3 (arXiv 2011.10680), which uses the trace of the Hessian for F.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl._deprecated import renamed
from swincompress_pl.arguments import integer, numbers
from swincompress_pl.evaluation_mode import standing_still
from swincompress_pl.quant.bits import WIDTHS, Bits
from swincompress_pl.quant.calibration import (
    LayerSample,
    first_images,
    joined,
    micro_batches,
    observe,
    sample_layers,
    without_signal,
)
from swincompress_pl.quant.full_precision import float32_network, full_precision
from swincompress_pl.quant.graph import Graph, Node, Passthrough, Run, WeightedNode
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.preprocessing import check_fit, preprocessing_of
from swincompress_pl.quant.probe import Probe
from swincompress_pl.quant.progress import Progress, track
from swincompress_pl.quant.search import LayerProblem, best_equalization
from swincompress_pl.summaries import Tabulated
from swincompress_pl.text_table import text_table

# The number of independent draws of the Fisher matrix. The relative error of an estimate from n draws is sqrt(2 / n).
_PROBES = 64


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What the widths of one layer cost.

    Attributes:
        name: Name of the layer, its module path.
        weights: Its number of weights.
        macs: Its multiply-accumulates for one image.
        loss: Maps a width in bits to the predicted KL divergence, in nats per image, with only this layer rounded.

    Raises:
        ValueError: If a width is not 2 to 8, or a loss is negative or not finite.
    """

    name: str
    weights: int
    macs: int
    loss: Mapping[int, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", {int(width): float(loss) for width, loss in sorted(self.loss.items())})
        if not self.loss or not set(self.loss) <= set(WIDTHS):
            raise ValueError(f"{self.name}: losses at {list(self.loss)} bits; widths are {WIDTHS[0]} to {WIDTHS[-1]}")
        bad = [loss for loss in self.loss.values() if not (math.isfinite(loss) and loss >= 0)]
        if bad:
            raise ValueError(f"{self.name}: a loss of {bad[0]}; losses are finite and at least 0. Check its weights")

    def size_bytes(self, width: int) -> int:
        """Returns the bytes of the packed weights at a width.

        Args:
            width: Width in bits.

        Returns:
            The number of bytes.
        """
        return (self.weights * width + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Tabulated):
    """What `measure_sensitivity` found, for every linear layer and convolution; `str(table)` is a table of the losses.

    Attributes:
        layers: The layers in the network's order. A layer with one width is fixed to it.
        activations: Width of the activations, in bits.
        first_and_last: Width to which the first and the last layer are fixed, in bits; None if they are free.

    Raises:
        ValueError: If there are no layers, or two of one name.
    """

    layers: tuple[LayerSensitivity, ...] = field(repr=False)
    activations: int = 8
    first_and_last: int | None = 8

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"sensitivity has {len(names)} layers with {len(set(names))} names; give at least one layer, each with "
                "a name of its own"
            )

    def sizes_bytes(self) -> dict[str, dict[int, int]]:
        """Returns {layer: {width: bytes of its packed weights}}, without steps and biases, which have one width."""
        return {layer.name: {width: layer.size_bytes(width) for width in layer.loss} for layer in self.layers}

    def bit_operations(self) -> dict[str, dict[int, int]]:
        """Returns {layer: {width: MACs per image times weight bits}}."""
        return {layer.name: {width: layer.macs * width for width in layer.loss} for layer in self.layers}

    def loss_of(self, bits: Bits) -> float:
        """Predicts the loss of a choice of widths.

        Args:
            bits: The widths; each must have been measured, or a KeyError is raised.

        Returns:
            The predicted KL divergence to the float output, in nats per image.
        """
        return sum(layer.loss[width] for layer, width in self._chosen(bits))

    def size_bytes_of(self, bits: Bits) -> int:
        """Counts the bytes of all packed weights.

        Args:
            bits: The widths.

        Returns:
            The number of bytes.
        """
        return sum(layer.size_bytes(width) for layer, width in self._chosen(bits))

    def bit_operations_of(self, bits: Bits) -> int:
        """Counts the bit operations of all layers.

        Args:
            bits: The widths.

        Returns:
            The sum over the layers of MACs per image times weight bits.
        """
        return sum(layer.macs * width for layer, width in self._chosen(bits))

    def _chosen(self, bits: Bits) -> list[tuple[LayerSensitivity, int]]:
        ends = (self.layers[0].name, self.layers[-1].name)
        return [(layer, bits.of_layer(layer.name, outer=layer.name in ends)) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Returns the table in JSON types; `from_dict` is the inverse."""
        layers = [
            {"name": layer.name, "weights": layer.weights, "macs": layer.macs}
            | {"loss": {str(width): loss for width, loss in layer.loss.items()}}
            for layer in self.layers
        ]
        return {"activations": self.activations, "first_and_last": self.first_and_last, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Restores a table; the inverse of `to_dict`.

        Args:
            data: What `to_dict` returned.

        Returns:
            The table.
        """
        layers = [
            LayerSensitivity(**{**layer, "loss": {int(width): loss for width, loss in layer["loss"].items()}})
            for layer in data["layers"]
        ]
        return cls(layers=tuple(layers), activations=data["activations"], first_and_last=data["first_and_last"])

    def __str__(self) -> str:
        widths = sorted({width for layer in self.layers for width in layer.loss})
        rows = [
            [layer.name, f"{layer.weights:,}", f"{layer.macs:,}"]
            + [f"{layer.loss[width]:.3g}" if width in layer.loss else "-" for width in widths]
            for layer in self.layers
        ]
        return text_table(["layer", "weights", "MACs", *(f"KL at W{width}" for width in widths)], rows)


@renamed(images="calibration_images")
@full_precision()
def measure_sensitivity(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    widths: Sequence[int] = (4, 6, 8),
    activations: int = 8,
    first_and_last: int | None = 8,
    preprocessing: Mapping[str, Any] | None = None,
    calibration_images: int = 128,
    rows: int = 256,
    seed: int = 0,
    progress: Progress = False,
) -> Sensitivity:
    """Measures what it costs to round the weights of one layer alone, for each layer and each width.

    The cost is an estimate of the KL divergence to the float output, in nats per image. The weights take the steps for
    which `quantize` would search. The loss of a wider width is never above that of a narrower one, whose step it could
    use. The network stays as it is.

    Args:
        model: A float network with an adapter, or a `QuantizedNetwork`, whose float weights are measured.
        calibration: Batches as in `quantize`.
        widths: The widths to measure, 2 to 8 bits.
        activations: Width of the activations, 2 to 8 bits; the search for steps scales its inputs accordingly.
        first_and_last: The one width at which the first layer and the classifier are measured, which fixes them to it;
            None measures them at `widths`.
        preprocessing: Mapping with "mean" and "std", as in `quantize`; ignored for a `QuantizedNetwork`, which has its
            own.
        calibration_images: How many images of `calibration` are used, the first ones.
        rows: Number of sampled rows per layer for the search for steps. It is smaller than in `quantize`, because the
            losses need no fine steps.
        seed: Seed of the sampling.
        progress: As in `quantize`.

    Returns:
        The losses of all layers.

    Raises:
        UnsupportedNetworkError: If the network has no adapter or no integer form.
        TypeError: If a calibration batch has another form.
        ValueError: If an argument is outside its range; or if calibration is empty, has NaN or infinite values or
            images of several sizes, or does not fit the preprocessing.
    """
    widths = _checked_widths(widths)
    calibration_images = integer("calibration_images", calibration_images, least=1)
    rows, seed = integer("rows", rows, least=1), integer("seed", seed, least=0)
    bits = Bits(activations=activations, first_and_last=8 if first_and_last is None else first_and_last)
    network = float32_network(model.network if isinstance(model, QuantizedNetwork) else model)
    found, assumed = preprocessing_of(
        network, model.preprocessing if isinstance(model, QuantizedNetwork) else preprocessing
    )
    shell = QuantizedNetwork(network, preprocessing=found, bits=bits)
    batches = first_images(calibration, calibration_images)
    images = joined(batches, next(network.parameters()).device)
    check_fit(batches[0], shell.preprocessing, assumed=assumed)
    shell.check_pixels(images)
    nodes = shell.graph.weighted_nodes
    measured = {node.name: sorted(set(widths)) for node in nodes}
    if first_and_last is not None:
        measured |= {node.name: [first_and_last] for node in (nodes[0], nodes[-1])}
    with standing_still(network):
        parts = micro_batches(shell.graph, network, images)
        changes = _changes(shell.graph, network, parts, measured, rows=rows, seed=seed, progress=progress)
        losses = _fisher_losses(shell.graph, network, parts, changes, seed=seed, progress=progress)
        macs = _macs(shell.graph, network, images[:1])
    layers = []
    for node in nodes:
        least = math.inf
        loss = {width: (least := min(least, losses[node.name, width])) for width in measured[node.name]}
        weights = node.folded_weight(network, None).numel()
        layers.append(LayerSensitivity(name=node.name, weights=weights, macs=macs[node.name], loss=loss))
    return Sensitivity(layers=tuple(layers), activations=activations, first_and_last=first_and_last)


def _checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    wanted = f"integers from {WIDTHS[0]} to {WIDTHS[-1]}, e.g. (4, 6, 8)"
    return tuple(int(width) for width in numbers("widths", widths, lambda width: width in WIDTHS, wanted))


def _changes(
    graph: Graph,
    network: nn.Module,
    batches: Sequence[Tensor],
    widths: Mapping[str, Sequence[int]],
    *,
    rows: int,
    seed: int,
    progress: Progress,
) -> dict[tuple[str, int], Tensor]:
    """{(layer, width): the change (M, K...) of the weight when it is rounded at the searched steps}."""
    ranges = observe(graph, network, batches)
    samples = sample_layers(graph, network, batches, rows=rows, seed=seed)
    without_signal(samples)
    changes = {}
    for node in track(graph.weighted_nodes, "searching steps", progress):
        sample, spec = samples.pop(node.name), graph.spec_of(node.inputs[0])
        bounds = ranges[spec.name].bounds(None) if spec is not None and spec.equalized else None
        for width in widths[node.name]:
            q_max = 2 ** (width - 1) - 1
            changes[node.name, width] = _change(
                network, node, sample, bounds, q_max, 127 if spec is None else spec.q_max
            )
    return changes


def _change(
    network: nn.Module,
    node: WeightedNode,
    sample: LayerSample,
    bounds: tuple[Tensor, Tensor] | None,
    q_max: int,
    input_q_max: int,
) -> Tensor:
    """The change of one weight.

    `bounds` are the least and the largest values, (K,) each, of an input whose channels get ratios.
    """
    x, sensitivity = sample.rows
    float_weight = node.folded_weight(network, None)
    weight, ratios = float_weight.flatten(1), torch.ones(())
    if bounds is not None:
        ratios, _ = best_equalization(
            x, weight, sensitivity, bounds, center=False, q_max=input_q_max, weight_q_max=q_max
        )
        x, weight = x / ratios, weight * ratios
    problem = LayerProblem(
        x=x,
        weight=weight,
        sensitivity=sensitivity,
        magnitude=None,
        weight_q_max=q_max,
        step=node.exact_step(weight, q_max),
    )
    rounded = problem.quantized_weight(problem.best_step(x)) / ratios.to(weight)
    return rounded.reshape(float_weight.shape) - float_weight


class _Leaves(Passthrough):
    """The float network, with a leaf tensor for every weight that takes its gradient."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return self.weights.setdefault(node.name, weight.detach().clone().requires_grad_(True))


class _Outputs(Passthrough):
    """The float network; counts the values of every layer's output."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.values[node.name] = output.numel()


def _fisher_losses(
    graph: Graph,
    network: nn.Module,
    batches: Sequence[Tensor],
    changes: Mapping[tuple[str, int], Tensor],
    *,
    seed: int,
    progress: Progress,
) -> dict[tuple[str, int], float]:
    """1/2 dW' F dW per layer and width, in nats per image.

    One probe is the gradient of sum_k r_k sqrt(p_k) log p_k over some images, with random signs r. The expectation of
    the square of its product with dW is the dW' F dW of these images. In contrast to a sum over single outputs, this
    takes into account that the errors of all tokens come from one weight and add up.
    """
    images, probe = torch.cat(list(batches)), Probe.of(graph, network, batches, seed=seed + 2)
    parts = images.split(max(1, min(len(batches[0]), len(images) // _PROBES)))
    total = dict.fromkeys(changes, 0.0)
    for part in track(parts, "measuring layers", progress):
        leaves = _Leaves()
        with torch.enable_grad():
            probe(Run(graph, network, leaves)(part)).backward()
        for (name, width), change in changes.items():
            gradient = leaves.weights[name].grad
            if gradient is not None:
                total[name, width] += 0.5 * float((gradient * change).sum()) ** 2
    return {key: value / len(images) for key, value in total.items()}


def _macs(graph: Graph, network: nn.Module, image: Tensor) -> dict[str, int]:
    """{layer: MACs for one image}."""
    outputs = _Outputs()
    with torch.no_grad():
        Run(graph, network, outputs)(image)
        depths = {node.name: node.folded_weight(network, None)[0].numel() for node in graph.weighted_nodes}
    return {name: outputs.values[name] * depth for name, depth in depths.items()}
