"""A small E-SpikeFormer in integers, whose neurons give counts of spikes."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize
from swincompress_pl.spec import Program


@lru_cache
def counting_program(largest: int = 4) -> Program:
    """Every stage with one block, random weights and BatchNorm's statistics from random images."""
    from support.spiking_cases import SIZE_PX, lively  # imports spikingjelly

    build = partial(
        create_model, "ESpikeFormer", num_classes=5, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1, 1), num_heads=2,
        mlp_ratio=2, D=largest,
    )  # fmt: skip
    network, _ = lively(build, 0, trained_statistics=True)
    images = torch.rand(8, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)) * 4 - 2
    known = {"mean": [0.5] * 3, "std": [0.25] * 3, "height": SIZE_PX, "width": SIZE_PX}
    return quantize(network.float(), [images], method="max", preprocessing=known).to_program()
