"""What a network costs, counted from shapes alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swincompress_pl.pruning.structure.groups import Group


def count_parameters(network: nn.Module) -> int:
    """The number of parameters; a shared one counts once."""
    return sum(p.numel() for p in network.parameters())


def count_parameters_without(network: nn.Module, removed: Mapping[Group, Iterable[int]]) -> int:
    """`count_parameters` if the units in `removed`, {group: unit indices}, were sliced away; nothing is touched."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group, units in removed.items():
        chosen = tuple(units)
        for part in group.slices:
            gone.setdefault((part.tensor, part.axis), set()).update(part.indices(chosen))
    total = 0
    for name, parameter in network.named_parameters():
        total += math.prod(size - len(gone.get((name, axis), ())) for axis, size in enumerate(parameter.shape))
    return total


def count_macs(network: nn.Module, input_shape: Sequence[int]) -> int:
    """The multiply-accumulates of one forward pass over an input of `input_shape`, e.g. (1, 3, 224, 224).

    Linear layers, convolutions and both products of attention, fused or not; no element-wise work. Counted on a copy
    without weights, so it is quick and leaves the network alone: Swin-T 4.49 G, DeiT-Tiny 1.25 G at 224 pixels.
    """
    bare = skeleton(network).eval()
    dtype = next((p.dtype for p in bare.parameters() if p.is_floating_point()), torch.float32)
    return _macs_of_pass(bare, torch.zeros(tuple(input_shape), device="meta", dtype=dtype))


def _macs_of_pass(bare: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare(images)
    return int(counter.get_total_flops()) // 2


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of `network` whose tensors have shapes but no memory (device "meta"); it can be sliced and counted."""
    memo: dict[int, object] = {}
    for module in network.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _without_memory(tensor)
    return copy.deepcopy(network, memo)


def _without_memory(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
