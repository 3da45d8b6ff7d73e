"""What Meta-SpikeFormer tells pruning and quantization about itself."""

from __future__ import annotations

from typing import Any

from swincompress_pl.models.spiking.adapter import SpikingAdapter
from swincompress_pl.registry import register

_HERE = "swincompress_pl.models.meta_spikeformer"


class MetaSpikeFormerAdapter(SpikingAdapter):
    """The adapter of Meta-SpikeFormer, which has five stages, each a down-sampling and its blocks."""

    def __init__(self) -> None:
        super().__init__(
            "Meta-SpikeFormer",
            groups=f"{_HERE}.groups:meta_spikeformer_groups",
            graph=f"{_HERE}.graph:meta_spikeformer_graph",
        )

    def segments(self, network: Any) -> list[str]:
        """The down-sampling and the blocks of each stage."""
        names = []
        for stage, module in network.get_submodule("stages").named_children():
            names.append(f"stages.{stage}.downsample")
            names += [f"stages.{stage}.blocks.{name}" for name, _ in module.blocks.named_children()]
        return names


register(f"{_HERE}.network:MetaSpikeFormer", MetaSpikeFormerAdapter())
