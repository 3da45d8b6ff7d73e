"""Post-training quantization: from a float network and some images to a `QuantizedNetwork`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl._deprecated import renamed, renamed_attributes
from swincompress_pl.arguments import choice, flag, integer, number, optional, options, shown
from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.history import class_names_of
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.masks import refuse_filled_masks
from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.calibration import (
    Ranges,
    first_images,
    joined,
    micro_batches,
    observe,
    sample_layers,
    without_signal,
)
from swincompress_pl.quant.fidelity import check_graph
from swincompress_pl.quant.folding import with_plain_layers
from swincompress_pl.quant.full_precision import bring_to_float32, full_precision
from swincompress_pl.quant.graph import Graph
from swincompress_pl.quant.graph.spiking_nodes import CountNode, NeuronNode
from swincompress_pl.quant.layerwise import LayerwiseSearch
from swincompress_pl.quant.network import METHODS, QuantizedNetwork
from swincompress_pl.quant.preprocessing import check_fit, preprocessing_of
from swincompress_pl.quant.progress import Progress
from swincompress_pl.quant.quantizers import affine_range
from swincompress_pl.quant.rounding import Learning, round_blocks
from swincompress_pl.quant.search import max_step
from swincompress_pl.quant.silent_hooks import warn_of_silent_hooks
from swincompress_pl.registry import UnsupportedNetworkError

# 16-bit values and logits keep the true maximum and leave room above it: a bit costs nothing there, but clipping does.
HEADROOM = 2.0
# A bias must stay below 2**30 accumulator steps at export; two bits of distance are kept.
_BIAS_STEPS = 2.0**28
_DEAD_ROW_STEPS = 256.0
ROUNDINGS = ("nearest", "second_order", "learned")


@renamed(balance="equalize", shift="center")
@renamed_attributes(balance="equalize", shift="center")
@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What the method "searched" does in addition to its search for scales.

    Each option can be switched on or off alone. `bias_correction` and the roundings "second_order" and "learned" write
    to the network's own parameters.

    Attributes:
        equalize: Whether the channels of a LayerNorm output get ranges of their own. The layers around it absorb the
            ratios, so they cost nothing when the network runs. Source: RepQ-ViT (arXiv 2212.08254), with more ratios.
        center: Whether the codes of LayerNorm's outputs and of GELU's input and output may stand for the value plus a
            constant, where that makes the error smaller. Biases and GELU's table absorb the constant, and the codes of
            GELU's output then need no sign.
        bias_correction: Whether each layer's bias takes up the mean error of its output. Source: Nagel et al. (arXiv
            1906.04721).
        rounding: How weights are rounded: "nearest" rounds each alone. "second_order" takes the other weights of the
            layer into account (GPTQ, arXiv 2210.17323). "learned" then trains the rounding of each block against its
            float output (in the manner of BRECQ, arXiv 2102.05426). The last two also correct the biases.
        learning: The details of "learned": a `Learning`, or a mapping of its fields.
        rows: Number of sampled rows per layer that the search measures errors on.
        seed: Seed of the sampling.

    Raises:
        ValueError: If a field is outside its range; the message names it.
    """

    equalize: bool = True
    center: bool = True
    bias_correction: bool = False
    rounding: str = "nearest"
    learning: Learning = field(default_factory=Learning)
    rows: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            name: flag(name, getattr(self, name)) for name in ("equalize", "center", "bias_correction")
        }
        checked["rounding"] = choice("rounding", self.rounding, ROUNDINGS)
        checked["rows"] = integer("rows", self.rows, least=1, wanted="an integer of 1 or more")
        checked["seed"] = integer("seed", self.seed, least=0)
        if not isinstance(self.learning, Learning):
            checked["learning"] = options("learning", self.learning, Learning, Learning.__dataclass_fields__)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@renamed(images="calibration_images")
@torch.no_grad()
@full_precision()
def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    method: str = "searched",
    bits: Bits | str | Mapping[str, Any] = "W8A8",
    preprocessing: Mapping[str, Any] | None = None,
    calibration_images: int = 128,
    percentile: float | None = None,
    search: SearchOptions | Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    embeddings: bool = False,
    progress: Progress = False,
) -> QuantizedNetwork:
    """Quantizes a network to integers without training.

    The network is wrapped, not copied. Its weights stay as they are, except for the search options that say otherwise
    and for layers that are folded into plain ones, which a warning names. If anything is raised, the network is as it
    was before; a copy of its weights is kept for this. Hooks on its modules do not fire once it is quantized, which a
    warning says.

    Args:
        model: A network with an adapter and an integer form (timm's ViT, DeiT and Swin v1, spiking transformers), in
            any mode. If it holds tensors of another format than float32, it is converted in place, with a warning.
        calibration: Batches as the network takes them: normalized float images (N, C, H, W), or events (N, T, C, H, W),
            alone or first in a tuple. The batch size has no influence on the result or on the memory of calibration.
        method: How scales are found. "searched" minimizes a Gauss-Newton estimate of the loss (in the manner of
            PTQ4ViT, arXiv 2111.12293). "max" puts the maximum at the largest code. "affine" uses minimum and maximum
            with a zero-point; it is a simulation for comparison, which cannot be exported.
        bits: The widths: a text such as "W8A8" or "W4A8", a `Bits`, or a mapping of its fields.
        preprocessing: Mapping with "mean" and "std" of the normalization, per channel and for pixels in [0, 1]; None
            for the network's own: `model.preprocessing`, or else timm's `pretrained_cfg`. The artifact also holds what
            it says of resizing and cropping, as `data.Preprocessing` and timm's data config do.
        calibration_images: How many images of `calibration` are used, the first ones.
        percentile: Percentile of an activation's magnitudes, above 50 and at most 100, that takes the place of their
            maximum, such as 99.99. With "searched" the search begins there, and "max" clips there. None for the
            maximum.
        search: Options of the method "searched": a `SearchOptions`, or a mapping of its fields; None for the defaults.
        classes: Names of the classes in the order of the logits, for the artifact. None for the network's
            `class_names`, if `models.to_timm` gave it one per class.
        embeddings: Whether a network without a classifier (`num_classes=0`) is accepted. Its integers are the pooled
            features, for a head outside the network, and `classes` is ignored. A network that gives feature maps
            (timm's `features_only=True`) needs no such consent.
        progress: True shows bars in a terminal or a notebook, and lines elsewhere. A function is called with the name
            of the step, the steps done and the steps in total.

    Returns:
        The quantized network around `model`, in training mode; call `eval()` for the integers.

    Raises:
        UnsupportedNetworkError: If the network has no adapter or no integer form, has no classifier without
            `embeddings=True`, or computes something else than its graph. The message names the module.
        TypeError: If a calibration batch has another form.
        ValueError: If an argument is outside its range, or options contradict each other; if the network is already
            quantized or its masked weights are not 0; if calibration is empty, has NaN or infinite values or images of
            several sizes, or does not fit the preprocessing; or if a spiking network keeps its membrane potentials
            between calls, or most of its neurons never spike.
    """
    found_options = checked_search(checked_method(method), search)
    percentile = checked_percentile(method, percentile)
    calibration_images = integer("calibration_images", calibration_images, least=1)
    embeddings = flag("embeddings", embeddings)
    refuse_filled_masks(model, "quantize")
    found, assumed = preprocessing_of(model, preprocessing)
    with all_or_nothing(written=[model]):
        quantized = with_plain_layers(
            model,
            lambda: QuantizedNetwork(
                model,
                preprocessing=found,
                method=method,
                classes=class_names_of(model) if classes is None else classes,
                bits=bits,
            ),
        )
        if quantized.graph.embeds:
            _require_wanted(quantized, embeddings)
            quantized.classes = None
        warn_of_silent_hooks(model, quantized.graph)
        device = next(model.parameters()).device
        batches = first_images(calibration, calibration_images)
        images = joined(batches, device)
        quantized.check_pixels(images)
        check_fit(batches[0], quantized.preprocessing, assumed=assumed)
        bring_to_float32(model)
        check_graph(quantized.graph, model, images)
        with evaluation_mode(model):
            _find_scales(quantized.eval(), images, found_options, percentile, progress)
            quantized.train()  # as it was made; the context then restores the modes of `model`
        return quantized


def _find_scales(
    quantized: QuantizedNetwork,
    images: Tensor,
    options: SearchOptions | None,
    percentile: float | None,
    progress: Progress,
) -> None:
    """Calibrates the network and, if there are options, searches and rounds as they say."""
    batches = micro_batches(quantized.graph, quantized.network, images)
    ranges = observe(quantized.graph, quantized.network, batches, percentile=percentile)
    _require_spikes(quantized.graph, ranges)
    clips = {name: entry.clip(percentile) for name, entry in ranges.items()}
    _set_ranges(quantized, ranges, clips)
    if options is None:
        _secure_steps(quantized)
        return
    samples = sample_layers(quantized.graph, quantized.network, batches, rows=options.rows, seed=options.seed)
    quantized.without_signal = without_signal(samples)
    LayerwiseSearch(
        quantized,
        {name: entry.bounds(percentile) for name, entry in ranges.items()},
        samples,
        equalize=options.equalize,
        center=options.center,
        bias_correction=options.bias_correction,
    ).run(progress=progress)
    _secure_steps(quantized)
    if options.rounding != "nearest":
        learning = options.learning if options.rounding == "learned" else Learning(iterations=0)
        round_blocks(quantized, batches, learning, progress=progress)
        _secure_steps(quantized)


def _require_spikes(graph: Graph, ranges: Mapping[str, Ranges]) -> None:
    """Raises a ValueError if most neurons of a spiking network are silent."""
    neurons = [node for node in graph.nodes if isinstance(node, CountNode | NeuronNode)]
    silent = [node.module for node in neurons if not ranges[node.output].magnitude.any()]
    if 2 * len(silent) > len(neurons):
        raise ValueError(
            f"{len(silent)} of {len(neurons)} neurons never spike on the calibration images, {silent[0]} the first of "
            "them; train the network, or give it its trained BatchNorm statistics (fresh ones leave it silent)"
        )


def _require_wanted(quantized: QuantizedNetwork, embeddings: bool) -> None:
    """Raises an UnsupportedNetworkError for embeddings that nobody asked for, which could be taken for logits."""
    if not embeddings and not quantized.graph.outputs:  # a list of feature maps is taken for nothing else
        raise UnsupportedNetworkError(
            f"{type(quantized.network).__name__}: {quantized.graph.nodes[-1].name} is Identity, so it has no classes; "
            "pass embeddings=True if a head outside it reads its features, or make it with num_classes > 0"
        )


def checked_method(method: str) -> str:
    """`method`; a ValueError is raised for an unknown one."""
    known = isinstance(method, str) and method in METHODS
    if not known:
        raise ValueError(f"method={shown(method)} is not available; choose one of {', '.join(map(repr, METHODS))}")
    return method


def checked_percentile(method: str, percentile: float | None) -> float | None:
    """`percentile`; a ValueError is raised if it is out of range or does not go with the method."""
    wanted = "above 50 and at most 100, e.g. 99.99, with method 'searched' or 'max'"
    found = optional(number, "percentile", percentile, lambda value: 50 < value <= 100, wanted)
    if found is not None and method == "affine":
        raise ValueError(f"percentile={found}: it has to be {wanted}; 'affine' takes minimum and maximum")
    return found


def checked_search(method: str, search: SearchOptions | Mapping[str, Any] | None) -> SearchOptions | None:
    """The options of the method "searched", None for the other methods; a ValueError is raised for bad ones."""
    if search is not None and method != "searched":
        raise ValueError(f"search options go with method 'searched', not {method!r}")
    if method != "searched":
        return None
    if search is None or isinstance(search, SearchOptions):
        return search or SearchOptions()
    old = getattr(SearchOptions.__init__, "old_arguments", {})
    return options("search", search, SearchOptions, SearchOptions.__dataclass_fields__, old)


def _set_ranges(quantized: QuantizedNetwork, ranges: Mapping[str, Ranges], clips: Mapping[str, Tensor]) -> None:
    """Puts every scale at its clip: where the search starts, and the result of the methods without a search."""
    for spec in quantized.graph.quantizers.values():
        if spec.fixed_scale is not None:
            continue
        scale = quantized.scales.activation_quantizer(spec)
        segments = list(spec.segments)
        if scale.affine and spec.searched:
            low = torch.stack([part.min() for part in ranges[spec.name].low.split(segments)]).clamp(max=0)
            high = torch.stack([part.max() for part in ranges[spec.name].high.split(segments)]).clamp(min=0)
            _set_affine(scale.scale, scale.zero_point, low, high, spec.bits)
            continue
        if spec.searched:
            magnitude = torch.stack([part.max() for part in clips[spec.name].split(segments)])
        else:
            magnitude = torch.stack([part.max() for part in ranges[spec.name].magnitude.split(segments)]) * HEADROOM
        scale.scale.copy_(torch.where(magnitude > 0, magnitude, 1.0) / spec.q_max)
    for node in quantized.graph.weighted_nodes:
        weight = quantized.scales.weight_quantizer(node)
        folded = node.folded_weight(quantized.network, None).flatten(1)
        if weight.affine:
            low, high = folded.amin(1).clamp(max=0), folded.amax(1).clamp(min=0)
            _set_affine(weight.step, weight.zero_point, low, high, weight.bits)
        else:
            weight.step.copy_(max_step(folded, weight.q_max))


def _set_affine(scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor, bits: int) -> None:
    step = (high - low) / (2**bits - 1)
    scale.copy_(torch.where(step > 0, step, 1.0))
    zero_point.copy_(torch.round(affine_range(bits)[0] - low / scale).to(torch.int32))


def _secure_steps(quantized: QuantizedNetwork) -> None:
    """Raises steps so that int32 accumulators hold the biases, and gives rows without weights a step."""
    for node in quantized.graph.weighted_nodes:
        scale = quantized.scales.weight_quantizer(node)
        if scale.affine:
            continue
        in_spec, out_spec = quantized.graph.spec_of(node.inputs[0]), quantized.graph.spec_of(node.output)
        in_scale = 1.0 if in_spec is None else float(quantized.scales.activation_quantizer(in_spec).scale[0])
        assert out_spec is not None
        out_scale = quantized.scales.activation_quantizer(out_spec).channel_scales()
        step = torch.where(scale.step > 0, scale.step, out_scale / (in_scale * _DEAD_ROW_STEPS))
        bias = node.folded_bias(quantized.network)
        if bias is not None:
            step = torch.maximum(step, bias.abs() / (in_scale * _BIAS_STEPS))
        scale.step.copy_(node.settled_step(quantized.network, step, in_scale))
