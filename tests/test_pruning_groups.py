"""Every group is proven: the network with a unit masked equals the one with the unit sliced away."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from timm.models.vision_transformer import VisionTransformer as Vit
from torch import nn

from swincompress_pl.models.groups import swin_groups, vit_groups
from swincompress_pl.pruning import Attribute, Group, PruningPlan, Slice, apply_plan, mask_plan, mask_units
from swincompress_pl.registry import UnsupportedNetworkError

_swin = partial(SwinTransformer, img_size=16, patch_size=2, num_classes=5)
_vit = partial(VisionTransformer, img_size=16, patch_size=8, num_classes=5, depth=2)
Groups = Callable[[nn.Module], list[Group]]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Groups]] = {
    "swin": (partial(_swin, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4), swin_groups),
    "swin, odd window, padding": (
        partial(_swin, embed_dim=24, depths=(1, 2), num_heads=(3, 6), window_size=3),
        swin_groups,
    ),
    "swin, head_dim, no bias": (
        partial(_swin, embed_dim=16, depths=(2,), num_heads=(4,), window_size=4, head_dim=6, qkv_bias=False),
        swin_groups,
    ),
    "swin v2": (
        partial(
            SwinTransformerV2, img_size=16, patch_size=2, num_classes=5, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
        ),
        swin_groups,
    ),
    "vit": (partial(_vit, embed_dim=24, num_heads=3), vit_groups),
    "vit, mean pooling, layer scale": (
        partial(_vit, embed_dim=16, num_heads=4, class_token=False, global_pool="avg", init_values=0.5, qkv_bias=False),
        vit_groups,
    ),
    "vit, registers, normed q and k": (
        partial(_vit, embed_dim=32, num_heads=2, reg_tokens=3, qk_norm=True),
        vit_groups,
    ),
    "vit, post norm": (partial(_vit, embed_dim=16, num_heads=2, block_fn=ResPostBlock, mlp_ratio=1.5), vit_groups),
}


def _randomized(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """With every parameter random: a fresh network has zero biases, and Swin v2 norms that switch its branches off."""
    torch.manual_seed(seed)
    network = build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def _random_plan(data: st.DataObject, groups: list[Group]) -> PruningPlan:
    removed = {}
    for group in data.draw(st.lists(st.sampled_from(groups), unique_by=lambda g: g.name)):
        removed[group.name] = data.draw(
            st.lists(st.integers(0, group.units - 1), unique=True, max_size=group.units - group.min_units)
        )
    return PruningPlan.removing(groups, removed)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_masked_equals_sliced(name: str, data: st.DataObject) -> None:
    build, groups_of = NETWORKS[name]
    network = _randomized(build, data.draw(st.integers(0, 2**16))).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plan = _random_plan(data, groups_of(network))
    with torch.no_grad():
        with mask_plan(network, plan, groups_of(network)):
            masked = network(images)
        apply_plan(network, plan, groups=groups_of(network))
        sliced = network(images)
    # float64: what is left is the order of the sums
    torch.testing.assert_close(sliced, masked, rtol=1e-9, atol=1e-9)
    for group in groups_of(network):
        assert group.units == len(plan.kept.get(group.name, range(group.units)))


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_changes_the_output_and_leaves_the_scale(name: str) -> None:
    """The equality above would also hold for masks that do nothing."""
    build, groups_of = NETWORKS[name]
    network = _randomized(build, 0)
    scales = [m.scale for m in network.modules() if hasattr(m, "num_heads") and hasattr(m, "scale")]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        whole = network(images)
        for group in groups_of(network):
            with mask_units(network, group, [0]):
                assert not torch.equal(network(images), whole), group.name
        apply_plan(
            network,
            PruningPlan.removing(groups_of(network), {groups_of(network)[0].name: [0]}),
            groups=groups_of(network),
        )
        assert not torch.equal(network(images), whole)
    assert [m.scale for m in network.modules() if hasattr(m, "num_heads") and hasattr(m, "scale")] == scales


@pytest.mark.parametrize("name", NETWORKS)
def test_mask_is_undone_to_the_bit(name: str) -> None:
    build, groups_of = NETWORKS[name]
    network = build()
    before = copy.deepcopy(network.state_dict())
    group = groups_of(network)[0]

    def fail_inside() -> None:
        with mask_units(network, group, [0]), mask_units(network, group, [0, 1]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_swin_groups_by_name() -> None:
    network = NETWORKS["swin"][0]()
    groups = {g.name: g for g in swin_groups(network)}
    assert len(groups) == 8
    heads = groups["layers.1.blocks.1.attn.heads"]
    assert (heads.kind, heads.units) == ("heads", 4)
    assert groups["layers.0.blocks.0.mlp.channels"].units == 64
    apply_plan(network, PruningPlan.removing(groups.values(), {heads.name: [1, 3]}), groups=groups.values())
    attn = network.layers[1].blocks[1].attn
    assert attn.num_heads == 2
    assert attn.relative_position_bias_table.shape == (49, 2)
    assert (attn.qkv.out_features, attn.proj.in_features) == (3 * 2 * 8, 2 * 8)


def test_vit_attributes_follow() -> None:
    network = NETWORKS["vit"][0]()
    groups = vit_groups(network)
    apply_plan(
        network,
        PruningPlan.removing(groups, {"blocks.0.attn.heads": [1], "blocks.0.mlp.channels": range(8)}),
        groups=groups,
    )
    attn, mlp = network.blocks[0].attn, network.blocks[0].mlp
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.qkv.out_features, attn.proj.in_features) == (
        2,
        8,
        16,
        48,
        16,
    )
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (88, 88)


def test_gated_attention_is_cut_with_its_gate() -> None:
    from timm.layers.attention import Attention

    network = _randomized(partial(_vit, embed_dim=16, num_heads=4, attn_layer=_gated(Attention)), 0).double()
    groups = vit_groups(network)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plan = PruningPlan.removing(groups, {"blocks.1.attn.heads": [0, 2]})
    with torch.no_grad():
        with mask_plan(network, plan, groups):
            masked = network(images)
        apply_plan(network, plan, groups=groups)
        torch.testing.assert_close(network(images), masked, rtol=1e-9, atol=1e-9)
    assert network.blocks[1].attn.gate.out_features == 8


def _gated(base: type[nn.Module]) -> type[nn.Module]:
    class Gated(base):  # type: ignore[misc,valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs, gated=True)

    return Gated


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            partial(_vit, embed_dim=16, num_heads=2, scale_attn_norm=True),
            r"blocks\.0\.attn\.norm is a .*scale_attn_norm=False",
        ),
        (
            partial(_vit, embed_dim=16, num_heads=2, scale_mlp_norm=True),
            r"blocks\.0\.mlp\.norm is a .*scale_mlp_norm=False",
        ),
        (
            partial(_vit, embed_dim=16, num_heads=2, block_fn=ParallelScalingBlock),
            r"blocks\.0 is a ParallelScalingBlock",
        ),
        (partial(_vit, embed_dim=16, num_heads=2, attn_layer="diff"), r"blocks\.0\.attn is a DiffAttention"),
        (partial(_vit, embed_dim=16, num_heads=2, mlp_layer="swiglu"), r"blocks\.0\.mlp is a"),
    ],
)
def test_variants_that_are_not_written_down_are_refused(build: Callable[[], Vit], message: str) -> None:
    if build.keywords.get("mlp_layer") == "swiglu":  # type: ignore[attr-defined]
        from timm.layers import SwiGLU

        build = partial(_vit, embed_dim=16, num_heads=2, mlp_layer=SwiGLU)
    with pytest.raises(UnsupportedNetworkError, match=message):
        vit_groups(build())


def test_slice_indices() -> None:
    part = Slice(tensor="qkv.weight", axis=0, width=2, offsets=(0, 6, 12))
    assert part.indices([0, 2]) == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    assert part.end(3) == 18


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_data(name: str) -> None:
    build, groups_of = NETWORKS[name]
    for group in groups_of(build()):
        assert Group.from_dict(json.loads(json.dumps(group.to_dict()))) == group
        assert group.name in str(group)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": 0}, "units >= 1"),
        ({"min_units": 5}, "min_units <= units"),
        ({"min_units": 0}, "1 <= min_units"),
        ({"slices": (Slice(tensor="w", axis=0),)}, "marked as consumer"),
    ],
)
def test_a_malformed_group_is_refused(fields: dict[str, object], message: str) -> None:
    good = {"name": "g", "kind": "mlp", "units": 4, "slices": (Slice(tensor="w", axis=0, consumer=True),)}
    Group(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Group(**{**good, **fields})  # type: ignore[arg-type]


def test_a_malformed_slice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w: a slice needs axis >= 0, width >= 1"):
        Slice(tensor="w", axis=0, width=0)


def test_masking_unknown_units_is_refused() -> None:
    network = NETWORKS["vit"][0]()
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.heads: the masked units name units 7, but the group has units 0 to 2"
    ):
        mask_units(network, vit_groups(network)[0], [7]).__enter__()


def test_attribute_defaults() -> None:
    assert Attribute(module="attn", name="num_heads").size_of is None
