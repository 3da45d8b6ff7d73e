"""Whether a module computes what its class in torch, timm or spikingjelly says, and what makes it differ."""

from __future__ import annotations

from collections.abc import Iterator

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


def is_around_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Sequential of one nn.Linear and of modules that do nothing in evaluation."""
    kinds = [_passes(child) or isinstance(child, nn.Linear) for child in module.children()]
    linears = sum(isinstance(child, nn.Linear) for child in module.children())
    return type(module) is nn.Sequential and all(kinds) and linears == 1


def first_linear(module: nn.Module) -> str | None:
    """The name of the nn.Linear that reads the input of an nn.Sequential, after any dropout; None if another does."""
    if type(module) is not nn.Sequential:
        return None
    for name, child in module.named_children():
        if not _passes(child):
            return name if isinstance(child, nn.Linear) else None
    return None


def _passes(module: nn.Module) -> bool:
    return type(module) in (nn.Identity, nn.Dropout)


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
