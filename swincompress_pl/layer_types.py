"""Whether a module computes what its class in torch, timm or spikingjelly says, and what makes it differ."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

LAYERS = (nn.Linear, _ConvNd, nn.LayerNorm, _BatchNorm)
"""The layers whose parameters are a weight and a bias."""

_LIBRARIES = ("torch.nn.modules.", "timm.", "spikingjelly.", "swincompress_pl.")
_SET_BY_TORCH = "_compiled_call_impl"
_ROUNDING = 1e-5  # of the largest value


def full_name(kind: type) -> str:
    """The name of a class, with its module unless it comes from torch, timm, spikingjelly or this package."""
    known = f"{kind.__module__}.".startswith(_LIBRARIES)
    return kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"


def alteration(module: nn.Module) -> str | None:
    """How a layer differs from its class in a library, with the remedy; None if it does not.

    It differs by a computed weight, a replaced method, a forward of its own, or parameters besides weight and bias.
    Other hooks do not count, because only a run shows whether they change the result.
    """
    computed = computed_tensors(module)
    if computed:
        name, how, remedy = computed[0]
        return f"{how} computes its {name}; {remedy}"
    own = _replaced_methods(module)
    if own:
        return f"its {own[0]} was replaced by another function; restore the original"
    if not _forward_of(module).startswith(_LIBRARIES):
        return "its class has a forward of its own; merge what that adds into a plain layer"
    if isinstance(module, LAYERS):
        more = sorted(name for name in module._parameters if name not in ("weight", "bias"))
        if more:
            return f"it has the parameters {', '.join(more)} besides weight and bias; merge them into a plain layer"
        if "weight" not in module._parameters:
            return "its weight is not a parameter, so something computes it; make the weight a parameter"
    return None


def computed_tensors(module: nn.Module) -> list[tuple[str, str, str]]:
    """(name, what computes it, how to make it a parameter) of the tensors that torch's utilities compute."""
    found = []
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) makes it a parameter again"
            found.append((name, "a parametrization", remedy))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            remedy = f"torch.nn.utils.prune.remove(layer, {name!r}) makes it a parameter again ({name}_orig is pruned)"
            found.append((name, "torch.nn.utils.prune", remedy))
        elif isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            remedy = f"torch.nn.utils.remove_{kind}(layer, {hook.name!r}) makes it a parameter again"
            found.append((hook.name, f"torch.nn.utils.{kind}", remedy))
    return found


def peculiarities(module: nn.Module, trusted: str) -> Iterator[str]:
    """What may make `module` compute something else than its class in a library or in the package `trusted`."""
    for method in _replaced_methods(module):
        yield f"its {method} was replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        names = [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks]
        if any(not str(getattr(hook, "__module__", "")).startswith("swincompress_pl.") for hook in hooks):
            yield f"it has hooks: {', '.join(names)}"
    if not _forward_of(module).startswith((*_LIBRARIES, f"{trusted}.")):
        yield "its class has a forward of its own"


def in_order(module: nn.Module) -> list[str]:
    """The paths of the layers that run one after the other inside a head; [""] for a module that is a layer itself.

    An nn.Sequential and timm's Mlp, whose children stand in the order of a pass, may hold each other.
    """
    if type(module) is not nn.Sequential and not _is_mlp(module):
        return [""]
    found = []
    for name, child in module.named_children():
        found += [f"{name}.{inner}" if inner else name for inner in in_order(child)]
    return found


def passes(module: nn.Module) -> bool:
    """Whether a layer of a head leaves features (N, C) as they are in evaluation."""
    return type(module) in (nn.Identity, nn.Dropout) or (type(module) is nn.Flatten and module.start_dim == 1)


def maps_each_value(module: nn.Module, channels: int) -> bool:
    """Whether a module maps each value of (N, rows, channels) alone, in evaluation, wherever the value stands.

    Such an activation can become a table, and its channels can be removed. A softmax, a GLU, and a PReLU with a slope
    per channel are others.
    """
    evaluated = copy.deepcopy(module).eval()
    own = next(evaluated.parameters(), torch.empty(0, device="cpu"))
    if own.is_meta:  # as of a network that is only rebuilt to see its shape; the values of slopes do not matter here
        evaluated.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in evaluated.parameters():
                parameter.fill_(0.25)
        own = next(evaluated.parameters())
    try:
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=()):
            values = torch.linspace(-4, 4, 17, dtype=own.dtype, device=own.device)
            alone, together = evaluated(values), evaluated(values[None, :, None].repeat(1, 1, channels))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    if not isinstance(alone, torch.Tensor) or alone.shape != values.shape:
        return False
    error = (together - alone[None, :, None]).abs()
    return bool((error <= _ROUNDING * (1 + alone.abs().max())).all())


def _is_mlp(module: nn.Module) -> bool:
    return _forward_of(module) == "timm.layers.mlp.Mlp.forward"


def _replaced_methods(module: nn.Module) -> list[str]:
    """The methods of the class that attributes of `module` itself hide."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and name != _SET_BY_TORCH and callable(getattr(type(module), name, None))
    ]


def _forward_of(module: nn.Module) -> str:
    forward = type(module).forward
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
