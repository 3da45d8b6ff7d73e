"""Exchanges layers with computed weights, and layers with additions, for the plain layers that compute the same.

The utilities of torch make permanent what they compute (parametrizations, pruning masks, weight and spectral norms).
Any other module in the place of an nn.Linear (an adapter, a wrapper, a replaced forward) is probed. If it is an affine
map of each row alone, its values at 0 and at the unit vectors are the bias and the weight of an equal nn.Linear.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm, skip_init
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from swincompress_pl.evaluation_mode import evaluation_mode, on_trial
from swincompress_pl.layer_types import alteration, computed_tensors, full_name
from swincompress_pl.quant.graph.builder import AlteredLayerError
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

Built = TypeVar("Built")
# How far the values of a map may be from those of the nn.Linear that replaces it, relative to the largest value.
_AFFINE_ERROR = 1e-6
_PROBE_SCALES = (1.0, 30.0)


def with_plain_layers(network: nn.Module, build: Callable[[], Built]) -> Built:
    """What `build` returns; layers that keep it from doing so are exchanged in `network` if that is exact.

    A warning names the layers that were exchanged. An UnsupportedNetworkError that names the layer is raised if it
    cannot be exact.
    """
    folded: dict[str, str] = {}
    try:
        while True:
            try:
                return build()
            except UnsupportedNetworkError as error:
                # A parametrization of the network's own tensors changes the class that its adapter asks for.
                path = "" if parametrize.is_parametrized(network) else getattr(error, "path", None)
                if path is None or path in folded:
                    raise
                folded[path] = _fold(network, path, error)
    finally:
        if folded:
            listed = ", ".join(f"{path or 'the network itself'} ({kind})" for path, kind in list(folded.items())[:4])
            warnings.warn(
                f"{type(network).__name__}: plain layers that compute the same replaced the layers of the network at "
                f"{listed}{f', ... ({len(folded)} in total)' if len(folded) > 4 else ''}",
                stacklevel=4,
            )


def refuse_altered(network: nn.Module, preprocessing: Mapping[str, Any]) -> None:
    """Raises an UnsupportedNetworkError for a network with layers that `quantize` would fold.

    If an optimizer holds their parameters, the user has to fold them.
    """
    adapter_for(network).graph(network, preprocessing)


def _fold(network: nn.Module, path: str, error: UnsupportedNetworkError) -> str:
    """Puts a plain layer at `path` and returns the class that was there; raises `error` if there is no plain layer."""
    layer = network.get_submodule(path)
    kind, mode = full_name(type(layer)), layer.training
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(layer):
        _make_last(layer)
        if not isinstance(error, AlteredLayerError) or (isinstance(layer, error.wanted) and alteration(layer) is None):
            return kind
        if error.wanted is not nn.Linear:
            raise error
        plain = _as_linear(layer)
    if plain is None:
        raise UnsupportedNetworkError(
            f"{error}. It is not an affine map of each token alone, so no nn.Linear equals it"
        )
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, plain.train(mode))
    return kind


def _make_last(layer: nn.Module) -> None:
    """Turns tensors that torch's utilities compute into parameters."""
    with torch.enable_grad():  # the utilities leave a parameter only if what they compute has a gradient
        _remove_parametrizations(layer)
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(layer, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
    assert not computed_tensors(layer)


def _remove_parametrizations(layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer):
        for name in list(layer.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
            left = getattr(layer, name)
            if not isinstance(left, nn.Parameter):  # what was computed without gradients is left as a plain tensor
                delattr(layer, name)
                layer.register_parameter(name, nn.Parameter(left.detach(), requires_grad=False))


def _as_linear(layer: nn.Module) -> nn.Linear | None:
    """The nn.Linear that computes what `layer` does in eval mode; None if there is none."""
    own = list(layer.parameters())
    if not own:
        return None
    for width in dict.fromkeys(m.in_features for m in layer.modules() if isinstance(m, nn.Linear)):
        found = _affine(layer, width, own[0])
        if found is not None:
            weight, bias = found
            biased = bool(bias.any()) or _has_bias(layer)
            plain: nn.Linear = skip_init(
                nn.Linear, width, len(weight), bias=biased, device=own[0].device, dtype=own[0].dtype
            )
            plain.requires_grad_(any(parameter.requires_grad for parameter in own))
            plain.weight.copy_(weight)
            if biased:
                plain.bias.copy_(bias)
            return plain
    return None


def _has_bias(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) and m.bias is not None for m in layer.modules())


def _affine(layer: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) of what `layer` does with each row of `width` values; None if that is not affine."""
    generator = torch.Generator().manual_seed(0)
    units = torch.eye(width, dtype=torch.float64)
    probes = [torch.randn(2, 5, width, generator=generator, dtype=torch.float64) * scale for scale in _PROBE_SCALES]
    answers = _answers(layer, [torch.cat([units.new_zeros(1, width), units])[None], *probes], like.device)
    if answers is None:
        return None
    bias = answers[0][0, 0]
    weight = (answers[0][0, 1:] - bias).T
    for probe, answer in zip(probes, answers[1:], strict=True):
        expected = probe.to(weight.device) @ weight.T + bias
        if not float((answer - expected).abs().max()) <= _AFFINE_ERROR * float(expected.abs().max()):
            return None
    return weight, bias


def _answers(layer: nn.Module, probes: Sequence[Tensor], device: torch.device) -> list[Tensor] | None:
    """What `layer` returns for `probes`, in float64; None if it cannot read them."""
    try:
        with on_trial(layer), torch.no_grad():
            answers = [layer(probe.to(device)) for probe in probes]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    whole = all(isinstance(a, Tensor) and a.shape[:-1] == p.shape[:-1] for a, p in zip(answers, probes, strict=True))
    return [answer.double() for answer in answers] if whole else None
