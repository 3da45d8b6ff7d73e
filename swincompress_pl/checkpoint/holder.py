"""Where a LightningModule holds its network, compiled or not, and how another one takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from swincompress_pl.quant import QuantizedNetwork


def network_of(module: LightningModule, model_attribute: str) -> nn.Module:
    """The network that `module` holds; a compiled one (`torch.compile`) is unwrapped.

    Raises AttributeError naming the attribute and those that would do.
    """
    network = getattr(module, model_attribute, None)
    if not isinstance(network, nn.Module):
        children = [name for name, _ in module.named_children()]
        raise AttributeError(
            f"model_attribute={model_attribute!r}: {type(module).__name__} has no module of that name; it holds "
            f"{', '.join(children) or 'no modules'}. Pass the name of the one to compress."
        )
    inner = getattr(network, "_orig_mod", network)
    assert isinstance(inner, nn.Module)
    return inner


def float_network(network: nn.Module) -> nn.Module:
    """Where pruning and masks act: the network, or the one with the float weights in a quantized one."""
    return network.network if isinstance(network, QuantizedNetwork) else network


def put_network(module: LightningModule, model_attribute: str, network: nn.Module) -> None:
    """Put `network` in the place of the one that `module` holds, compiled where that is compiled.

    Of a quantized network the training is compiled; where that cannot be, a warning says so and it goes on uncompiled.
    """
    held = getattr(module, model_attribute)
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
    setattr(module, model_attribute, network)


def _compiler_of(held: nn.Module) -> tuple[bool, Callable[[Any], Any] | None]:
    """Whether `held` is compiled, by `torch.compile(held)` or `held.compile()`, and what compiles another likewise."""
    if isinstance(held, QuantizedNetwork):
        return held.compiler is not None, held.compiler
    if hasattr(held, "_orig_mod"):
        return True, getattr(held, "dynamo_ctx", None)
    call = held._compiled_call_impl
    cells = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    # torch has no public way from a compiled function to what compiled it.
    found = (each for each in cells if any(base.__name__ == "_TorchDynamoContext" for base in type(each).__mro__))
    return call is not None, next(found, None)
