"""Costs are counted from shapes; scores rank units."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import SwinTransformer, VisionTransformer

from swincompress_pl.pruning import PruningPlan, apply_plan, count_macs, count_parameters
from swincompress_pl.pruning.criteria import unit_scores
from swincompress_pl.pruning.structure.cost import skeleton
from swincompress_pl.registry import adapter_for


@pytest.mark.parametrize(
    ("name", "linear", "attention", "convolution"),
    [
        # linear: tokens x in x out of every layer; attention: 2 x heads x tokens^2 x head width; both counted by hand
        ("swin_tiny_patch4_window7_224", 4_335_974_400, 140_141_568, 14_450_688),
        ("deit_tiny_patch16_224", 1_045_949_952, 178_831_872, 28_901_376),
    ],
)
def test_macs_of_known_models(name: str, linear: int, attention: int, convolution: int) -> None:
    assert count_macs(timm.create_model(name), (1, 3, 224, 224)) == linear + attention + convolution


@pytest.mark.parametrize("fused", [False, True])
def test_macs_do_not_depend_on_fused_attention(fused: bool) -> None:
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    network.blocks[0].attn.fused_attn = fused
    tokens, width = 5, 16
    linears = tokens * width * (3 * width + width + 8 * width) + width * 3
    assert count_macs(network, (1, 3, 16, 16)) == linears + 2 * tokens * tokens * width + 4 * (3 * 8 * 8) * width


def test_macs_fall_by_what_is_cut_and_the_network_is_left_alone() -> None:
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3).train()
    before = count_macs(network, (1, 3, 16, 16))
    groups = adapter_for(network).groups(network)
    apply_plan(network, PruningPlan.removing(groups, {"blocks.0.mlp.channels": range(24)}))
    assert before - count_macs(network, (1, 3, 16, 16)) == 5 * 24 * (16 + 16)
    assert network.training
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_skeleton_has_shapes_without_memory() -> None:
    network = SwinTransformer(img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4)
    network.layers[0].blocks[0].attn.qkv.weight.requires_grad_(False)
    bare = skeleton(network)
    assert {t.device.type for t in [*bare.parameters(), *bare.buffers()]} == {"meta"}
    assert count_parameters(bare) == count_parameters(network)
    assert [p.requires_grad for p in bare.parameters()] == [p.requires_grad for p in network.parameters()]


def test_magnitude_is_the_norm_of_all_that_a_unit_owns() -> None:
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    group = next(g for g in adapter_for(network).groups(network) if g.kind == "heads")
    attn = network.blocks[0].attn
    parts = [attn.qkv.weight.view(3, 2, -1), attn.qkv.bias.view(3, 2, -1)]
    squares = sum(p.square().sum((0, 2)) for p in parts) + attn.proj.weight.view(16, 2, 8).square().sum((0, 2))
    expected = squares.sqrt() / squares.sqrt().mean()
    torch.testing.assert_close(unit_scores(network, group), expected.detach())
