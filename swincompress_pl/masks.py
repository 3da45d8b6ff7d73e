"""Which weights of a network are masked, and whether they are still 0: the convention that all rooms follow.

The parameter `<module>.weight` has a persistent bool buffer `<module>.weight_mask` of the same shape, which is True for
kept weights. `pruning.structure.weight_masks` makes the masks and enforces them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MASK_SUFFIX = "_mask"


def masked_parameters(network: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """{name: (parameter, its mask)} of all masked parameters, in the network's order, looked up at each call."""
    found = {}
    for path, module in network.named_modules():
        for leaf, parameter in module._parameters.items():
            mask = module._buffers.get(leaf + MASK_SUFFIX)
            if parameter is not None and mask is not None and is_mask(module, leaf, parameter, mask):
                found[f"{path}.{leaf}".lstrip(".")] = (parameter, mask)
    return found


def is_mask(module: nn.Module, leaf: str, parameter: Tensor, buffer: Tensor) -> bool:
    """Whether `buffer` of `module` is the mask of its parameter `leaf`."""
    persistent = leaf + MASK_SUFFIX not in module._non_persistent_buffers_set
    return persistent and buffer.dtype == torch.bool and buffer.shape == parameter.shape


def refuse_filled_masks(network: nn.Module, action: str) -> None:
    """Raises a ValueError if masked weights are not 0, which happens in training without `keep_masks`.

    The message begins with `action`, which cannot be done, such as "quantize".
    """
    for name, (parameter, mask) in masked_parameters(network).items():
        gone = parameter.detach()[~mask]
        filled = int(gone.count_nonzero())
        if filled:
            raise ValueError(
                f"{action}: {filled} of the {len(gone)} weights of {name} that its mask removes are not 0; the network "
                "was trained or loaded without its masks being kept. pruning.keep_masks(optimizer, network) sets them "
                "to 0, now and after each step; remove_masks(network, names) of pruning.structure.weight_masks drops "
                "the masks and keeps the weights"
            )
