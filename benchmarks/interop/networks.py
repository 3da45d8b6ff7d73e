"""The networks whose forms are compared: one of each kind, small, fresh or trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from swincompress_pl import spec
from swincompress_pl.models import create_model
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.quant import quantize
from swincompress_pl.registry import adapter_for

from ..primesvt.subjects import BINARY, Subject

_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
_SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
    "num_classes": 10,
}  # fmt: skip
_VIT: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10
}  # fmt: skip
_SHARE = 0.25
_STEPS = 4


def _program(network: nn.Module, *, bits: str = "W8A8", shape: tuple[int, ...] = (3, 32, 32)) -> spec.Program:
    images = torch.rand(16, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    said = {**_HALF, "height": shape[-2], "width": shape[-1]}
    return quantize(network.eval(), [images], method="max", bits=bits, preprocessing=said).to_program()


def _fresh(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **arguments)


def _pruned() -> nn.Module:
    network = _fresh("SwinTransformer", **_SWIN)
    groups = adapter_for(network).groups(network)
    gone = {group.name: list(range(int(_SHARE * group.units))) for group in groups}
    apply_plan(network, PruningPlan.removing(groups, gone))
    return network


def _masked() -> nn.Module:
    network = _fresh("SwinTransformer", **_SWIN)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight[torch.rand_like(module.weight) < 0.6] = 0
    return network


def _events() -> spec.Program:
    frames, size = torch.rand(8, _STEPS, 2, 32, 32).mul(3).floor(), {"in_channels": 2, "embed_dims": 32}
    network = _fresh(
        "SpikeDrivenTransformer", num_classes=10, T=_STEPS, num_heads=2, depths=1, pooling_stat="0011", **size
    )
    for parameter in network.parameters():  # fresh neurons are silent
        nn.init.normal_(parameter, 0.3, 0.5)
    network.train()
    with torch.no_grad():
        network(frames)
    counted = {"mean": [0.0] * 2, "std": [1 / 255] * 2, "height": 32, "width": 32, "time_steps": _STEPS}
    return quantize(network.eval(), [frames], preprocessing=counted, method="max").to_program()


def _trained(subject: Subject) -> spec.Program:
    network = subject.classifier(subject.fine_tuning, 0, trained=True).net
    return _program(network)


NETWORKS: dict[str, Callable[[], spec.Program]] = {
    "Swin": lambda: _program(_fresh("SwinTransformer", **_SWIN)),
    "ViT": lambda: _program(_fresh("VisionTransformer", **_VIT)),
    "DeiT-Tiny, 224 pixels": lambda: _program(_fresh("deit_tiny_patch16_224"), shape=(3, 224, 224)),
    "Swin, a quarter of every group removed": lambda: _program(_pruned()),
    "Swin, 60 % of the weights masked": lambda: _program(_masked()),
    "Spike-driven Transformer, events": _events,
    "Swin, weights of 4 bits": lambda: _program(_fresh("SwinTransformer", **_SWIN), bits="W4A8"),
    **{f"{name}, trained": partial(_trained, subject) for name, subject in BINARY.items()},
}


def images_of(program: spec.Program, count: int) -> np.ndarray[Any, Any]:
    """Images or events of noise."""
    shape = (count, *program.input.value.shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
