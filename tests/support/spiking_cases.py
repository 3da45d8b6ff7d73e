"""Small spiking transformers of every family that fire, and a record of their spikes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from spikingjelly.activation_based.base import MemoryModule
from spikingjelly.activation_based.model.maxformer import MaxFormer
from spikingjelly.activation_based.model.qkformer import QKFormer
from spikingjelly.activation_based.model.spike_driven_transformer import SpikeDrivenTransformer
from spikingjelly.activation_based.model.spikformer import Spikformer
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from swincompress_pl.models import create_model
from swincompress_pl.models.e_spikeformer.network import ESpikeFormer
from swincompress_pl.models.meta_spikeformer.network import MetaSpikeFormer
from swincompress_pl.models.spiking.memory import without_memory
from swincompress_pl.models.spiking.multi_spike import MultiSpike

SIZE_PX = 32
_spikformer = partial(Spikformer, T=2, img_size_h=SIZE_PX, img_size_w=SIZE_PX, num_classes=5, depths=2)
_sdt = partial(SpikeDrivenTransformer, T=2, num_classes=5, embed_dims=16, num_heads=2, depths=2)
_qkformer = partial(QKFormer, T=2, num_classes=5, embed_dims=32, num_heads=(2, 2, 4), depths=(1, 2, 1))
_maxformer = partial(MaxFormer, T=2, num_classes=5, embed_dims=32, depths=(1, 1, 2))
_e_spikeformer = partial(
    ESpikeFormer, num_classes=5, embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1, 1), num_heads=2, strides=(2, 2, 1, 1, 1)
)

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "spikformer": partial(_spikformer, patch_size=4, embed_dims=16, num_heads=2),
    "spikformer, large patches": partial(_spikformer, patch_size=16, embed_dims=24, num_heads=3, mlp_ratio=1.5),
    "sdt": partial(_sdt, pooling_stat="0011"),
    "sdt, hidden channels on the stream": partial(_sdt, pooling_stat="0110", mlp_ratio=1.0),
    "qkformer": _qkformer,
    "qkformer, channel attention": partial(_qkformer, qka_type="channel"),
    "maxformer": _maxformer,
    "maxformer, cifar": partial(_maxformer, cifar=True),
    "meta-spikeformer": partial(
        MetaSpikeFormer, T=2, num_classes=5, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1, 1), num_heads=2
    ),
}
"""Neurons of spikingjelly, with time steps and membranes."""
COUNTING: dict[str, Callable[[], nn.Module]] = {
    "e-spikeformer": _e_spikeformer,
    "e-spikeformer, three spikes": partial(_e_spikeformer, D=3, depths=(1, 1, 3, 1, 1), mlp_ratio=1.5),
}
"""Neurons that give counts of spikes, without time steps or membranes."""
ALL = FAMILIES | COUNTING
SMALL = {"T": 2, "img_size_h": 32, "img_size_w": 32, "patch_size": 4, "embed_dims": 16, "num_heads": 2, "depths": 2}


def lively(build: Callable[[], nn.Module], seed: int, *, trained_statistics: bool) -> tuple[nn.Module, Tensor]:
    """A network in double precision and evaluation whose neurons fire, and images (2, 3, 32, 32).

    trained_statistics: BatchNorm's come from passes in training mode, else they are random.
    """
    torch.manual_seed(seed)
    network = without_memory(build().double())
    images = torch.randn(2, 3, SIZE_PX, SIZE_PX, dtype=torch.float64)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
        for norm in norms:
            norm.weight.normal_(1.5, 0.5)
            norm.bias.normal_(0.5, 0.5)
        if trained_statistics:
            for norm in norms:
                norm.momentum = 1.0
            network.train()
            network(torch.randn(4, 3, SIZE_PX, SIZE_PX, dtype=torch.float64))
        else:
            for norm in norms:
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 4.0)
    return network.eval(), images


@contextmanager
def spikes_of(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{neuron: its spikes, (T, N, ...)} of the calls within the context; counts are whole numbers there, at T of 1."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, output: Tensor) -> None:
        found[name] = output[None] * module.norm if isinstance(module, MultiSpike) else output

    handles = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: keep(name, module, output))
        for name, module in network.named_modules()
        if isinstance(module, BaseNode | MultiSpike)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def most_spikes(network: nn.Module, neuron: str) -> int:
    """What a neuron gives at most at a time step."""
    module = network.get_submodule(neuron)
    return module.D if isinstance(module, MultiSpike) else 1


def no_membranes(network: nn.Module) -> bool:
    modules = [module for module in network.modules() if isinstance(module, MemoryModule)]
    assert modules or any(isinstance(module, MultiSpike) for module in network.modules())
    return all(value == module._memories_rv[name] for module in modules for name, value in module._memories.items())


def small_spikformer() -> nn.Module:
    return create_model("Spikformer", num_classes=3, **{**SMALL, "img_size_h": 16, "img_size_w": 16})
