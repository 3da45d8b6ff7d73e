"""What E-SpikeFormer tells pruning and quantization about itself."""

from __future__ import annotations

from typing import Any

from swincompress_pl.models.spiking.adapter import SpikingAdapter
from swincompress_pl.registry import register

_HERE = "swincompress_pl.models.e_spikeformer"


class ESpikeFormerAdapter(SpikingAdapter):
    """The adapter of E-SpikeFormer, which has five stages, each a down-sampling and its blocks."""

    def __init__(self) -> None:
        super().__init__(
            "E-SpikeFormer",
            groups=f"{_HERE}.groups:e_spikeformer_groups",
            graph=f"{_HERE}.graph:e_spikeformer_graph",
        )

    def segments(self, network: Any) -> list[str]:
        """The down-sampling and the blocks of each stage."""
        from swincompress_pl.models.e_spikeformer.network import block_paths

        return [path for downsample, blocks in block_paths(network) for path in (downsample, *blocks)]


register(f"{_HERE}.network:ESpikeFormer", ESpikeFormerAdapter())
