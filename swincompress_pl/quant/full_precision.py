"""Ordinary float32 tensors, whatever default type, autocast or inference mode surrounds a call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import outside_inference_mode, replace_inference_tensors
from swincompress_pl.interrupts import put_back_after


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the context: no autocast, no inference mode (its tensors take no gradients), float32 as the default."""
    default = partial(torch.set_default_dtype, torch.get_default_dtype())
    with (
        put_back_after(default),
        outside_inference_mode(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        torch.set_default_dtype(torch.float32)
        yield


def ordinary(images: Tensor, device: torch.device) -> Tensor:
    """The images in float32 on a device, copied if they were made in inference mode."""
    images = images.to(device, torch.float32)
    return images.clone() if images.is_inference() else images


def bring_to_float32(network: nn.Module) -> None:
    """Converts all parameters and buffers to float32, in place; a warning names the formats that they had.

    Parameters keep their identity, so an optimizer continues with them. Only tensors made in inference mode are
    replaced by copies.
    """
    replace_inference_tensors(network)
    others = _other_formats(network)
    if others:
        network.float()
        warnings.warn(
            f"{type(network).__name__} holds {', '.join(others)}; it is converted to float32 in place, the format in "
            "which quantization keeps weights and scales. Images may have any floating type",
            stacklevel=2,
        )


def float32_network(network: nn.Module) -> nn.Module:
    """The network itself if it is in float32, otherwise a copy that is."""
    if not _other_formats(network) and not any(tensor.is_inference() for tensor in network.parameters()):
        return network
    network = copy.deepcopy(network)
    replace_inference_tensors(network)
    return network.float()


def _other_formats(network: nn.Module) -> list[str]:
    tensors = (*network.parameters(), *network.buffers())
    return sorted({str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype is not torch.float32})


def require_float32(network: nn.Module) -> None:
    """Raises a TypeError that names the first parameter or buffer of another floating type."""
    for kind in (network.named_parameters(), network.named_buffers()):
        for name, tensor in kind:
            if tensor.is_floating_point() and tensor.dtype is not torch.float32:
                raise TypeError(
                    f"{name} is {tensor.dtype}; a QuantizedNetwork computes with float32 weights and scales: convert "
                    "it with quantized.float()"
                )
