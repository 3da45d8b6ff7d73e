"""Momentum survives a shrink: the sliced optimizer does what the unsliced one would have done to the kept entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer

from swincompress_pl.pruning import PruningPlan, apply_plan, slice_optimizer
from swincompress_pl.pruning.structure.apply import AppliedPlan
from swincompress_pl.registry import adapter_for

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, lr=1e-2, foreach=False),
    "adamw foreach, amsgrad": partial(AdamW, lr=1e-2, foreach=True, amsgrad=True),
    "adamw fused": partial(AdamW, lr=1e-2, fused=True),
    "sgd momentum": partial(SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=False),
    "sgd foreach": partial(SGD, lr=1e-2, momentum=0.9, foreach=True),
    "sgd fused": partial(SGD, lr=1e-2, momentum=0.9, fused=True),
}


def _network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=3)


def _plan(network: nn.Module) -> PruningPlan:
    removed = {"blocks.0.attn.heads": [1, 2], "blocks.1.mlp.channels": range(5, 40)}
    return PruningPlan.removing(adapter_for(network).groups(network), removed)


def _fill_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _parts(network: nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in network.parameters() if p.ndim > 1]
    return [{"params": decayed}, {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sliced_optimizer_goes_on_as_the_whole_one(name: str) -> None:
    whole, sliced = _network(), _network()
    whole_optimizer, optimizer = OPTIMIZERS[name](_parts(whole)), OPTIMIZERS[name](_parts(sliced))
    for seed in range(3):
        for network, its in ((whole, whole_optimizer), (sliced, optimizer)):
            _fill_gradients(network, seed)
            its.step()
    applied = apply_plan(sliced, _plan(sliced))
    slice_optimizer(optimizer, applied)
    cut = {t.name: t for t in applied.tensors}
    for seed in range(3, 6):
        _fill_gradients(whole, seed)
        for key, parameter in whole.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            sliced.get_parameter(key).grad = cut[key].slice(gradient) if key in cut else gradient.clone()
        whole_optimizer.step()
        optimizer.step()
    for key, parameter in whole.named_parameters():
        expected = cut[key].slice(parameter.detach()) if key in cut else parameter.detach()
        # fused kernels round the tail of a tensor otherwise than its vectorized middle, and the middle has moved
        tolerance = 1e-6 if "fused" in name else 0.0
        torch.testing.assert_close(sliced.get_parameter(key).detach(), expected, rtol=tolerance, atol=tolerance)
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in whole_optimizer.param_groups
    ]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in sliced.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in sliced.parameters()}


def test_the_state_dict_fits_a_fresh_optimizer_of_the_pruned_network() -> None:
    network = _network()
    optimizer = AdamW(_parts(network))
    _fill_gradients(network, 0)
    optimizer.step()
    slice_optimizer(optimizer, apply_plan(network, _plan(network)))
    fresh = _network()
    apply_plan(fresh, _plan(fresh))
    restored = AdamW(_parts(fresh))
    restored.load_state_dict(optimizer.state_dict())
    for a, b in zip(restored.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_optimizer_without_state_gets_the_new_parameters() -> None:
    network = _network()
    optimizer = SGD(network.parameters(), lr=0.1)
    slice_optimizer(optimizer, apply_plan(network, _plan(network)))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.parameters()]


@pytest.mark.parametrize(
    ("make", "state"), [(partial(Adafactor, lr=1e-2), "row_var"), (partial(LBFGS, lr=1e-2), "al|d|old_dirs")]
)
def test_state_of_another_shape_is_refused_before_anything_is_touched(
    make: Callable[..., Optimizer], state: str
) -> None:
    network = _network()
    # LBFGS keeps its history with the first parameter: let that be one that is cut
    optimizer = make(sorted(network.parameters(), key=lambda p: p is not network.blocks[0].attn.qkv.weight))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = network(torch.ones(1, 3, 16, 16)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    applied = apply_plan(network, _plan(network))
    with pytest.raises(ValueError, match=rf"its state '({state})' of blocks.*element-wise"):
        slice_optimizer(optimizer, applied)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before


def test_replacement_looks_up_by_identity() -> None:
    network = _network()
    weight = network.blocks[0].attn.qkv.weight
    applied: AppliedPlan = apply_plan(network, _plan(network))
    found = applied.replacement(weight)
    assert found is not None
    assert found.new is network.blocks[0].attn.qkv.weight
    assert applied.replacement(network.head.weight) is None
