"""What a network costs while removals are only masks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from swincompress_pl.pruning.adaptive.config import RoundRobinConfig
from swincompress_pl.pruning.space import Removal, StructuredGranularity, plan_of_masks
from swincompress_pl.pruning.structure.apply import apply_plan
from swincompress_pl.pruning.structure.cost import count_macs, count_parameters, skeleton
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.weight_masks import masked_parameters
from swincompress_pl.registry import adapter_for

_WEIGHT_BYTES = 4  # float32: a comparison inside one search; files are measured by `report`


class Ledger:
    """The costs of `network` with the removals accepted so far, counted on a copy without weights.

    parameters: those that no mask makes zero. macs: None without an input shape; those of a dense kernel. size_bytes:
    four bytes a parameter that is not masked, and a bit for every element of a masked weight.
    """

    def __init__(self, network: nn.Module, config: RoundRobinConfig, input_shape: Sequence[int] | None) -> None:
        self._network, self._config, self._input_shape = network, config, input_shape
        self.reset()

    def reset(self) -> None:
        """Forget the removals."""
        self._bare: nn.Module | None = None
        if self._config.granularity == "structured":
            self._bare = skeleton(self._network)
            groups = StructuredGranularity(self._config).groups(self._network)
            apply_plan(self._bare, plan_of_masks(self._network, groups))
            self._units = {g.name: g.units for g in groups}
        else:
            self.macs = self._macs_of(self._network)  # masks of weights leave them
        self._kept = {name: int(mask.sum()) for name, (_, mask) in masked_parameters(self._network).items()}
        self._elements = {name: p.numel() for name, p in self._network.named_parameters()}
        self._count()

    def cut(self, removal: Removal) -> None:
        """Take `removal` into account."""
        if self._bare is None:
            self._kept.update({name: int(_as_mask(mask).sum()) for name, mask in removal.items()})
        else:
            groups = {g.name: g for g in adapter_for(self._bare).groups(self._bare)}
            # Only widths matter here, so it is the last units that go.
            gone = {name: range(self._units[name] - len(units), groups[name].units) for name, units in removal.items()}
            apply_plan(self._bare, PruningPlan.removing(groups.values(), gone))
        self._count()

    def _count(self) -> None:
        if self._bare is None:
            self.parameters = sum(self._kept.get(name, count) for name, count in self._elements.items())
            mask_bits = sum(self._elements[name] for name in self._kept)
            self.size_bytes = self.parameters * _WEIGHT_BYTES + -(-mask_bits // 8)
        else:
            self.parameters = count_parameters(self._bare)
            self.size_bytes = self.parameters * _WEIGHT_BYTES
            self.macs = self._macs_of(self._bare)

    def _macs_of(self, network: nn.Module) -> int | None:
        return None if self._input_shape is None else count_macs(network, self._input_shape)


def _as_mask(mask: object) -> Tensor:
    assert isinstance(mask, Tensor)
    return mask
