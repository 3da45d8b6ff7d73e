"""Finds the network that a LightningModule holds, compiled or not, and puts another one in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from swincompress_pl.history import history_of
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for
from swincompress_pl.structure import uncompiled_name


def held_by(module: LightningModule, model_attribute: str) -> nn.Module:
    """The network at `model_attribute`, or the wrapper of `torch.compile` around it.

    Args:
        module: The module that holds it.
        model_attribute: Its name, such as "net", or a path, such as "model.backbone" or, in an nn.ModuleList, "nets.0".

    Returns:
        The network or its wrapper.

    Raises:
        AttributeError: If there is no module of that name; the message lists the networks to name.
    """
    found: Any = module
    for name in model_attribute.split("."):
        found = _child(found, name)
    if not isinstance(found, nn.Module):
        raise AttributeError(
            f"model_attribute={model_attribute!r}: {type(module).__name__} has no module of that name; "
            f"{networks_to_name(module)}"
        )
    return found


def _child(holder: Any, name: str) -> Any:
    if isinstance(holder, list | tuple) and name.isdecimal() and int(name) < len(holder):
        return holder[int(name)]
    if isinstance(holder, dict):
        return holder.get(name)
    return getattr(holder, name, None)


def networks_to_name(module: LightningModule) -> str:
    """The networks that `module` holds and which one to pass, for errors."""
    networks = [path for path, child in module.named_modules() if path and is_supported(child)]
    if networks:
        return f"it holds {', '.join(networks)}. Pass model_attribute={networks[0]!r}"
    children = [name for name, _ in module.named_children()]
    return (
        f"it holds {', '.join(children) or 'no modules'}, none of a supported family. Pass the name of the one to "
        "compress, and have it there when the fit begins: made in __init__, configure_model or setup"
    )


def is_supported(child: nn.Module) -> bool:
    """Whether an adapter knows the network, quantized or not."""
    if isinstance(child, QuantizedNetwork):
        return True
    try:
        adapter_for(child)
    except UnsupportedNetworkError:
        return False
    return True


def has_network(module: LightningModule, model_attribute: str) -> bool:
    """Whether the network exists yet; `configure_model` and `setup` make one only when a trainer runs."""
    try:
        held_by(module, model_attribute)
    except AttributeError:
        return False
    return True


def network_of(module: LightningModule, model_attribute: str) -> nn.Module:
    """The network that a module holds, without the wrapper of `torch.compile`.

    Args:
        module: The module that holds it.
        model_attribute: Its name or path; see `held_by`.

    Returns:
        The network.

    Raises:
        AttributeError: If there is no module of that name.
    """
    network = held_by(module, model_attribute)
    inner = getattr(network, "_orig_mod", network)
    assert isinstance(inner, nn.Module)
    return inner


def refuse_other_places(module: LightningModule, model_attribute: str) -> None:
    """Raises a ValueError for a network that the module holds in a second place, or that Lightning does not see.

    When the network is replaced, the second place would keep the old one.
    """
    network = network_of(module, model_attribute)
    paths = [path for path, child in module.named_modules(remove_duplicate=False) if child is network]
    if not paths:
        raise ValueError(
            f"model_attribute={model_attribute!r}: {type(module).__name__} holds it in a plain list or dictionary, "
            "where no parameter of it is trained or saved; use nn.ModuleList or nn.ModuleDict"
        )
    others = [path for path in paths if path.removesuffix("._orig_mod") != model_attribute]
    if others:
        raise ValueError(
            f"{type(module).__name__} holds the network at {model_attribute!r} and at {others[0]!r} as well; the other "
            "place would keep what is not compressed. Hold it once, and refer to it by a property"
        )


def compressed_paths(module: LightningModule) -> list[str]:
    """The paths of the networks in `module` that were pruned, masked or quantized, by a callback or not."""
    found: list[str] = []
    for path, child in module.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and history_of(child):
            found.append(path)
    return [uncompiled_name(path) for path in found]


def float_network(network: nn.Module) -> nn.Module:
    """The network that pruning and masks act on: `network`, or the float network in a quantized one."""
    return network.network if isinstance(network, QuantizedNetwork) else network


def put_network(module: LightningModule, model_attribute: str, network: nn.Module) -> None:
    """Replaces the network that `module` holds by `network`, which is compiled if the old one is.

    Of a quantized network only the training is compiled. If that is not possible, a warning says that it trains
    uncompiled.
    """
    held = held_by(module, model_attribute)
    compiled, compiler = _compiler_of(held)
    if isinstance(network, QuantizedNetwork):
        if compiler is not None and network.method != "affine":
            network.compile_with(compiler)
        elif compiled:
            why = "its compiler is not known" if compiler is None else "method 'affine' cannot be traced"
            rank_zero_warn(
                f"{type(module).__name__}.{model_attribute} was compiled; quantized it trains uncompiled ({why})"
            )
    elif compiler is not None and network._compiled_call_impl is None:
        network = compiler(network)
    path, _, name = model_attribute.rpartition(".")
    holder: Any = held_by(module, path) if path else module
    setattr(holder, name, network)  # nn.ModuleList and nn.ModuleDict take their items so as well


def _compiler_of(held: nn.Module) -> tuple[bool, Callable[[Any], Any] | None]:
    """Whether `held` is compiled (`torch.compile(held)`, `held.compile()`), and what compiles another network alike."""
    if isinstance(held, QuantizedNetwork):
        return held.compiler is not None, held.compiler
    if hasattr(held, "_orig_mod"):
        return True, getattr(held, "dynamo_ctx", None)
    call = held._compiled_call_impl
    cells = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    # torch has no public way to get from a compiled function to its compiler.
    found = (each for each in cells if any(base.__name__ == "_TorchDynamoContext" for base in type(each).__mro__))
    return call is not None, next(found, None)
