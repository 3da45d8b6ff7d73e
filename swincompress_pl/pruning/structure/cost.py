"""What a network costs, counted from shapes alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swincompress_pl.interrupts import surely_left
from swincompress_pl.layer_types import peculiarities
from swincompress_pl.pruning.structure.apply import apply_plan
from swincompress_pl.pruning.structure.change import gone_units
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.weight_masks import masked_parameters

_WEIGHT_BYTES = 4  # float32: a comparison inside one search; files are measured by `report`


def count_parameters(network: nn.Module) -> int:
    """Counts parameters.

    Args:
        network: The network.

    Returns:
        The number of elements of all parameters; a shared one counts once, and masked weights count.
    """
    return sum(p.numel() for p in network.parameters())


def count_parameters_without(network: nn.Module, removed: Mapping[Group, Iterable[int]]) -> int:
    """`count_parameters` as if the units in `removed`, {group: unit indices}, were sliced away."""
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
    """Counts the multiply-accumulates of one forward pass.

    Linear layers, convolutions and both products of attention count, fused or not; element-wise work does not. Masked
    weights count as well. The pass runs on a copy without weights, so it is quick and leaves the network alone. For an
    input of a wrong shape, the error is the network's own. At 224 pixels a Swin-T has 4.49 G, and a DeiT-Tiny 1.25 G.

    Args:
        network: The network.
        input_shape: Shape of the input with its batch axis, such as (1, 3, 224, 224).

    Returns:
        The number of multiply-accumulates.

    Raises:
        ValueError: If a replaced forward or a hook uses tensors of the network itself.
    """
    return _macs_of(skeleton(network), input_shape)


def _macs_of(bare: nn.Module, input_shape: Sequence[int]) -> int:
    bare.eval()
    dtype = next((p.dtype for p in bare.parameters() if p.is_floating_point()), torch.float32)
    with surely_left(FlopCounterMode(display=False)) as counter, torch.no_grad():
        try:
            bare(torch.zeros(tuple(input_shape), device="meta", dtype=dtype))
        except (RuntimeError, NotImplementedError) as error:
            replaced = [path for path, module in bare.named_modules() if any(peculiarities(module, "torch"))]
            if "meta" not in str(error) or not replaced:
                raise
            raise ValueError(
                f"{type(bare).__name__}: its MACs cannot be counted on a copy without weights ({error}); what replaced "
                f"a forward or hooks into it holds on to the network's own tensors: look at {', '.join(replaced[:3])}. "
                "Put a module of its own class there, or bind the function to it (types.MethodType)"
            ) from error
    return int(counter.get_total_flops()) // 2


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of a network whose tensors have no memory (device "meta"); it can be sliced and counted."""
    memo: dict[int, object] = {}
    for module in network.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _without_memory(tensor)
    return copy.deepcopy(network, memo)


def _without_memory(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Parameters that no mask makes zero.
        size_bytes: Four bytes per parameter, and a bit per element of a masked weight.
        macs: MACs of a dense kernel; None without an input shape.
    """

    parameters: int
    size_bytes: int
    macs: int | None


class CostTracker:
    """Computes what the present network would cost without some of it. It leaves the network alone.

    What is masked already counts as gone.

    Args:
        network: The network.
        groups: Groups whose units may go; None if masks take single weights.
        input_shape: Shape of one input with its batch axis, for the MACs; None if they are not counted.
    """

    def __init__(
        self, network: nn.Module, groups: Sequence[Group] | None, input_shape: Sequence[int] | None = None
    ) -> None:
        self._network, self._groups, self._input_shape = network, groups, input_shape
        masked = masked_parameters(network)
        if groups is None:
            self._now = {name: int(mask.sum()) for name, (_, mask) in masked.items()}
            self._dense_macs = None if input_shape is None else count_macs(network, input_shape)
        else:
            self._now = {group.name: group.units - len(gone_units(network, group)) for group in groups}
            self._bare = None if input_shape is None else skeleton(network)

    def after(self, removal: Mapping[str, Any]) -> Cost:
        """The cost without `removal`: {group: units that go}, or {parameter: a mask, True where a weight stays}."""
        kept = {}
        for group in self._groups or ():
            if group.name in removal:
                kept[group.name] = group.units - len(removal[group.name])
        if self._groups is None:
            kept = {name: int(mask.sum()) for name, mask in removal.items()}
        parameters = self.parameters(kept)
        if self._groups is not None:
            return Cost(parameters=parameters, size_bytes=parameters * _WEIGHT_BYTES, macs=self._macs(kept))
        elements = dict(self._network.named_parameters())
        mask_bits = sum(elements[name].numel() for name in {**self._now, **kept})
        size_bytes = parameters * _WEIGHT_BYTES + -(-mask_bits // 8)
        return Cost(parameters=parameters, size_bytes=size_bytes, macs=self._dense_macs)

    def parameters(self, kept: Mapping[str, int]) -> int:
        """The number of parameters if only `kept` stay: {group: units}, or {parameter: weights}."""
        if self._groups is not None:
            return count_parameters_without(self._network, {g: range(n) for g, n in self._gone(kept).items()})
        kept = {**self._now, **kept}
        return sum(kept.get(name, parameter.numel()) for name, parameter in self._network.named_parameters())

    def _gone(self, kept: Mapping[str, int]) -> dict[Group, int]:
        """How many units of each group go."""
        kept = {**self._now, **kept}
        return {group: group.units - kept[group.name] for group in self._groups or ()}

    def _macs(self, kept: Mapping[str, int]) -> int | None:
        if self._bare is None or self._input_shape is None:
            return None
        bare, gone = skeleton(self._bare), self._gone(kept)
        # Only widths matter here, so the first units go.
        plan = PruningPlan.removing(gone, {group.name: range(count) for group, count in gone.items() if count})
        apply_plan(bare, plan, groups=gone)
        return _macs_of(bare, self._input_shape)
