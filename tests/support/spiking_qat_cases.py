"""A tiny spiking network in the fits of `qat_cases`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support.qat_cases import PREPROCESSING, Plain, qat
from support.spiking_cases import small_spikformer


class Spiking(Plain):
    """Fires from the start: BatchNorm's shift lifts the membranes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = small_spikformer()
        for norm in norms_of(self.backbone):
            nn.init.constant_(norm.bias, 1.5)
        torch.manual_seed(7)


def norms_of(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def spiking_qat(**options: Any) -> Any:
    return qat(**{"preprocessing": {**PREPROCESSING, "height": 16, "width": 16}} | options)


def statistics(network: nn.Module) -> dict[str, Any]:
    return {key: value.clone() for key, value in network.state_dict().items() if "running_" in key}
