"""Every group is proven: the network with a unit masked equals the one with the unit sliced away."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.attention import Attention as VitAttention
from timm.layers.mlp import GatedMlp, GluMlp, SwiGLU
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from timm.models.vision_transformer import VisionTransformer as Vit
from torch import nn
from torch.nn.utils import parametrizations

from swincompress_pl import spec
from swincompress_pl.models.swin.groups import swin_groups
from swincompress_pl.models.swin.window_attention import ResizableWindowAttention
from swincompress_pl.models.vit.groups import vit_groups
from swincompress_pl.pruning import Group, PruningPlan, apply_plan
from swincompress_pl.pruning.structure.apply import revert_plan
from swincompress_pl.pruning.structure.groups import Attribute, ClassSwap, NormSlice, Slice
from swincompress_pl.pruning.structure.unit_masks import MaskedLayerNorm, mask_plan, mask_units
from swincompress_pl.quant import float_logits, quantize
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

_swin = partial(SwinTransformer, img_size=16, patch_size=2, num_classes=5)
_swin_v2 = partial(SwinTransformerV2, img_size=16, patch_size=2, num_classes=5)
_vit = partial(VisionTransformer, img_size=16, patch_size=8, num_classes=5, depth=2)


class GatedAttention(VitAttention):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs, gated=True)  # type: ignore[arg-type]


Groups = Callable[[nn.Module], list[Group]]


def with_head(network: Any, head: nn.Module) -> nn.Module:
    if hasattr(network.head, "fc"):
        network.head.fc = head
    else:
        network.head = head
    changed: nn.Module = network
    return changed


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
    "swin, maxima beside averages, norms without weights": (
        partial(
            _swin,
            embed_dim=8,
            depths=(1, 1, 1),
            num_heads=(1, 2, 2),
            window_size=2,
            global_pool="catavgmax",
            norm_layer=partial(nn.LayerNorm, elementwise_affine=False),
            strict_img_size=False,  # timm then does not look for the specification's weight
        ),
        swin_groups,
    ),
    "swin v2": (partial(_swin_v2, embed_dim=16, depths=(2, 2), num_heads=(2, 4)), swin_groups),
    "swin v2, three stages": (
        partial(_swin_v2, embed_dim=12, depths=(1, 2, 1), num_heads=(2, 3, 4), window_size=4, mlp_ratio=1.5),
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
    "vit, pre-norm, gated": (
        partial(_vit, embed_dim=16, num_heads=4, pre_norm=True, attn_layer=GatedAttention),
        vit_groups,
    ),
    "vit, no final norm, averages and maxima": (
        partial(_vit, embed_dim=16, num_heads=2, final_norm=False, fc_norm=False, global_pool="avgmax", reg_tokens=1),
        vit_groups,
    ),
    "vit, no position embedding, no embedded class": (
        partial(_vit, embed_dim=16, num_heads=2, pos_embed="none", embed_norm_layer="layernorm"),
        vit_groups,
    ),
    "deit, distilled": (
        partial(
            VisionTransformerDistilled, img_size=16, patch_size=8, num_classes=5, depth=2, embed_dim=24, num_heads=3
        ),
        vit_groups,
    ),
    "vit, gated MLPs": (
        partial(_vit, embed_dim=16, num_heads=2, mlp_layer=partial(GluMlp, act_layer=nn.SiLU, gate_last=False)),
        vit_groups,
    ),
    "vit, gated MLPs of two layers": (partial(_vit, embed_dim=16, num_heads=2, mlp_layer=SwiGLU), vit_groups),
    "vit, prr": (partial(_vit, embed_dim=16, num_heads=2, global_pool="prr"), vit_groups),
    "vit, batch norm and MLP as head": (
        lambda: with_head(
            _vit(embed_dim=16, num_heads=2),
            nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
        ),
        vit_groups,
    ),
    "vit, norms without weights in the head": (
        lambda: with_head(
            _vit(embed_dim=16, num_heads=2),
            nn.Sequential(
                nn.LayerNorm(16, elementwise_affine=False), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 5)
            ),
        ),
        vit_groups,
    ),
    "swin, norm in the head": (
        lambda: with_head(
            _swin(embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4),
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5)),
        ),
        swin_groups,
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
@settings(max_examples=25, deadline=None)
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


def _one_of_each(groups: list[Group], kinds: tuple[str, ...] = ("heads", "head_dim", "mlp", "embed")) -> PruningPlan:
    """Removes a unit from the middle of every group that has two."""
    return PruningPlan.removing(groups, {g.name: [g.units // 2] for g in groups if g.units > 2 and g.kind in kinds})


@pytest.mark.parametrize("name", NETWORKS)
def test_all_groups_at_once(name: str) -> None:
    build, groups_of = NETWORKS[name]
    network = _randomized(build, 0).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):  # the second time from a network that is pruned
            plan = _one_of_each(groups_of(network))
            with mask_plan(network, plan, groups_of(network)):
                masked = network(images)
            apply_plan(network, plan, groups=groups_of(network))
            torch.testing.assert_close(network(images), masked, rtol=1e-9, atol=1e-9)


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
            if group.units == 1:
                continue
            with mask_units(network, group, [0]):
                assert not torch.equal(network(images), whole), group.name
            applied = apply_plan(network, PruningPlan.removing([group], {group.name: [0]}), groups=[group])
            assert not torch.equal(network(images), whole), group.name
            revert_plan(network, applied)
            assert torch.equal(network(images), whole), group.name
        apply_plan(network, _one_of_each(groups_of(network)), groups=groups_of(network))
    assert [m.scale for m in network.modules() if hasattr(m, "num_heads") and hasattr(m, "scale")] == scales


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_are_undone_to_the_bit(name: str) -> None:
    build, groups_of = NETWORKS[name]
    network = _randomized(build, 0)
    before = copy.deepcopy({**network.state_dict(), **dict(network.named_buffers())})
    types = [type(m) for m in network.modules()]
    images = torch.randn(2, 3, 16, 16)
    groups = [g for g in groups_of(network) if g.units > 2]
    with torch.no_grad():
        whole = network(images)

    def fail_inside() -> None:
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(mask_units(network, group, [0]))
            for group in groups:  # the same group twice
                stack.enter_context(mask_units(network, group, [0, 1]))
            assert [str(g) for g in groups_of(network) if g.units > 2] == [str(g) for g in groups]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    after = {**network.state_dict(), **dict(network.named_buffers())}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [type(m) for m in network.modules()] == types
    assert not any(hasattr(m, "kept_channels") for m in network.modules())
    with torch.no_grad():
        assert torch.equal(network(images), whole)


def test_masks_of_one_stream_nest() -> None:
    network = _randomized(NETWORKS["swin"][0], 0).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    group = next(g for g in swin_groups(network) if g.name == "layers.0.embed")
    with torch.no_grad():
        with mask_units(network, group, [1, 5, 6]):
            together = network(images)
        with mask_units(network, group, [1]):
            first = network(images)
            with mask_units(network, group, [5, 6]):
                assert torch.equal(network(images), together)
            assert torch.equal(network(images), first)


def test_masked_norm_is_the_sliced_one() -> None:
    layer = nn.LayerNorm(6)
    network = nn.ModuleDict({"norm": layer})
    nn.init.normal_(layer.weight)
    group = Group(name="g", kind="embed", units=3, slices=(), norms=(NormSlice(module="norm", offsets=(0, 3)),))
    small = nn.LayerNorm(4)
    kept = [0, 2, 3, 5]
    small.weight.data, small.bias.data = layer.weight.data[kept], layer.bias.data[kept]
    x = torch.randn(2, 7, 6)
    with mask_units(network, group, [1]):
        assert isinstance(layer, MaskedLayerNorm)
        masked = layer(x)
    assert type(layer) is nn.LayerNorm
    assert torch.equal(masked[..., kept], small(x[..., kept]))
    assert not masked[..., [1, 4]].any()
    with pytest.raises(ValueError, match="g: all 3 units are masked; norm needs at least one"):
        mask_units(network, group, [0, 1, 2]).__enter__()
    wrong = nn.ModuleDict({"norm": nn.BatchNorm1d(6)})
    with pytest.raises(ValueError, match="norm is a BatchNorm1d; only a LayerNorm can be masked"):
        mask_units(wrong, group, [1]).__enter__()


def test_swin_groups_by_name() -> None:
    network = NETWORKS["swin"][0]()
    groups = {g.name: g for g in swin_groups(network)}
    assert len(groups) == 14
    assert [g.kind for g in groups.values()] == ["heads", "head_dim", "mlp"] * 4 + ["embed"] * 2
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


def test_a_narrow_head_keeps_its_scale_and_loses_the_fused_path() -> None:
    network = NETWORKS["vit"][0]()
    groups = vit_groups(network)
    attn = network.blocks[1].attn
    assert (attn.head_dim, attn.fused_attn) == (8, True)
    apply_plan(network, PruningPlan.removing(groups, {"blocks.1.attn.head_dim": [0, 3, 4]}), groups=groups)
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.qkv.out_features) == (3, 5, 15, 45)
    assert (attn.scale, attn.fused_attn) == (8**-0.5, False)
    assert network.blocks[0].attn.fused_attn


@pytest.mark.parametrize("build", [partial(_swin, window_size=4), partial(_swin_v2, window_size=4)])
def test_stage_widths_are_kept_in_every_attribute(build: Callable[..., nn.Module]) -> None:
    network = build(embed_dim=16, depths=(1, 1), num_heads=(2, 4))
    groups = swin_groups(network)
    removed = {"layers.0.embed": range(6), "layers.1.embed": range(20)}
    apply_plan(network, PruningPlan.removing(groups, removed), groups=groups)
    first, second = network.layers
    merging = second.downsample
    assert (network.embed_dim, network.num_features, network.head_hidden_size) == (10, 12, 12)
    assert (network.head.in_features, network.head.num_features, network.head.fc.in_features) == (12, 12, 12)
    assert [info["num_chs"] for info in network.feature_info] == [10, 12]
    assert (network.patch_embed.proj.out_channels, network.patch_embed.norm.normalized_shape) == (10, (10,))
    assert (first.dim, second.dim, merging.dim, merging.out_dim) == (10, 10, 10, 12)
    assert (merging.reduction.in_features, merging.reduction.out_features) == (40, 12)
    assert merging.norm.normalized_shape == ((40,) if isinstance(network, SwinTransformer) else (12,))
    block = second.blocks[0]
    assert (block.dim, block.attn.dim, block.attn.qkv.in_features, block.mlp.fc2.out_features) == (12, 12, 12, 12)
    assert (block.norm2.normalized_shape, network.norm.normalized_shape) == ((12,), (12,))
    assert block.attn.proj.in_features == 32
    network.reset_classifier(3)
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_vit_width_is_kept_in_every_attribute() -> None:
    network = NETWORKS["deit, distilled"][0]()
    groups = vit_groups(network)
    apply_plan(network, PruningPlan.removing(groups, {"embed": range(4)}), groups=groups)
    assert (network.embed_dim, network.num_features, network.head_hidden_size) == (20, 20, 20)
    assert (network.head.in_features, network.head_dist.in_features) == (20, 20)
    assert network.pos_embed.shape == (1, 6, 20)
    assert [info["num_chs"] for info in network.feature_info] == [20, 20]
    assert (network.blocks[0].attn.qkv.in_features, network.blocks[0].attn.attn_dim) == (20, 24)


def test_swin_v2_attention_is_exchanged_only_where_it_must_be() -> None:
    network = _randomized(NETWORKS["swin v2"][0], 0)
    images = torch.randn(2, 3, 16, 16)
    attention = [m for name, m in network.named_modules() if name.endswith(".attn")]
    timms = type(attention[0])
    with torch.no_grad():
        before = network(images)
        for attn in attention:
            attn.__class__ = ResizableWindowAttention
        torch.testing.assert_close(network(images), before)  # the same function
        for attn in attention:
            attn.__class__ = timms
    groups = swin_groups(network)
    apply_plan(network, PruningPlan.removing(groups, {"layers.0.blocks.0.mlp.channels": range(8)}), groups=groups)
    assert [type(a) for a in attention] == [timms] * 4
    applied = apply_plan(network, PruningPlan.removing(groups, {"layers.1.blocks.0.attn.heads": [0]}), groups=groups)
    assert [type(a) for a in attention] == [timms, timms, ResizableWindowAttention, timms]
    revert_plan(network, applied)
    assert type(attention[2]) is timms
    groups = swin_groups(network)
    apply_plan(network, PruningPlan.removing(groups, {"layers.0.embed": [3]}), groups=groups)
    assert [type(a) for a in attention] == [ResizableWindowAttention] * 2 + [timms] * 2
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), network(images))


class _OwnAttention(ResizableWindowAttention):
    """A user's own forward, which an exchange would drop."""


def test_an_attention_that_cannot_be_exchanged_is_not_offered() -> None:
    network = NETWORKS["swin v2"][0]()
    stale = swin_groups(network)
    network.layers[0].blocks[1].attn.__class__ = _OwnAttention
    names = [g.name for g in swin_groups(network)]
    assert "layers.0.blocks.1.mlp.channels" in names
    assert not {"layers.0.blocks.1.attn.heads", "layers.0.blocks.1.attn.head_dim", "layers.0.embed"} & set(names)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.1\.attn is a _OwnAttention, which .* does not extend"):
        apply_plan(network, PruningPlan.removing(stale, {"layers.0.blocks.1.attn.heads": [0]}), groups=stale)


@pytest.mark.parametrize(
    ("build", "groups_of"),
    [
        (partial(_swin_v2, embed_dim=16, depths=(1,), num_heads=(4,)), swin_groups),
        (partial(_vit, embed_dim=24, num_heads=3, depth=1), vit_groups),
    ],
)
def test_compiled_networks_see_masks_and_cuts(build: Callable[[], nn.Module], groups_of: Groups) -> None:
    network = _randomized(build, 0)
    images = torch.randn(2, 3, 16, 16)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager")
    plan = _one_of_each(groups_of(network))
    with torch.no_grad():
        whole = compiled(images)
        with mask_plan(network, plan, groups_of(network)):
            masked = network(images)
            torch.testing.assert_close(compiled(images), masked)
        torch.testing.assert_close(compiled(images), whole)
        apply_plan(network, plan, groups=groups_of(network))
        torch.testing.assert_close(compiled(images), masked, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


_PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
_QUANTIZABLE = ["swin", "swin, odd window, padding", "swin, head_dim, no bias", "vit", "vit, mean pooling, layer scale"]


@pytest.mark.parametrize("name", _QUANTIZABLE)
@pytest.mark.parametrize("kinds", [("heads",), ("head_dim",), ("embed",), ("heads", "head_dim", "mlp", "embed")])
def test_the_graph_of_a_pruned_network_is_the_network(name: str, kinds: tuple[str, ...]) -> None:
    network = _randomized(NETWORKS[name][0], 0)
    groups = adapter_for(network).groups(network)
    apply_plan(network, _one_of_each(groups, kinds), groups=groups)
    images = torch.randn(4, 3, 16, 16)
    graph = adapter_for(network).graph(network, _PREPROCESSING)
    with torch.no_grad():
        torch.testing.assert_close(float_logits(graph, network, images), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_a_pruned_network_quantizes(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    groups = adapter_for(network).groups(network)
    apply_plan(network, _one_of_each(groups), groups=groups)
    pixels = torch.randint(0, 256, (32, 16, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(_PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    quantized = quantize(
        network, [images], method="searched", preprocessing=_PREPROCESSING, search={"rows": 128}
    ).eval()
    with torch.no_grad():
        expected = network(images)
        assert (quantized(images) - expected).abs().mean() < 0.1 * expected.std()
    assert torch.equal(
        quantized.integer_logits(pixels), torch.from_numpy(spec.run(quantized.to_program(), pixels.numpy()))
    )


@pytest.mark.parametrize(
    ("build", "lacking"),
    [
        (partial(_vit, embed_dim=16, num_heads=2, qk_norm=True), {"head_dim"}),
        (partial(_vit, embed_dim=16, num_heads=2, norm_layer="rmsnorm"), {"embed"}),
        (partial(_vit, embed_dim=16, num_heads=2, num_classes=0), {"embed"}),
        (partial(_vit, embed_dim=16, num_heads=2, global_pool="map"), {"embed"}),
    ],
)
def test_kinds_that_are_not_written_down_are_not_offered(build: Callable[[], nn.Module], lacking: set[str]) -> None:
    kinds = {g.kind for g in vit_groups(build())}
    assert kinds == {"heads", "head_dim", "mlp", "embed"} - lacking


def test_a_stage_without_classifier_has_no_embedding_width() -> None:
    network = _swin(embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4)
    network.reset_classifier(0)
    assert [g.name for g in swin_groups(network) if g.kind == "embed"] == ["layers.0.embed"]
    network.layers[0].blocks[0].adapter = nn.Linear(16, 16)
    assert not [g for g in swin_groups(network) if g.kind == "embed"]


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
        (partial(_vit, embed_dim=16, num_heads=2, mlp_layer=GatedMlp), r"blocks\.0\.mlp is a GatedMlp"),
        (
            partial(_vit, embed_dim=16, num_heads=2, scale_mlp_norm=True, mlp_layer=GluMlp),
            r"blocks\.0\.mlp\.norm is a LayerNorm",
        ),
    ],
)
def test_variants_that_are_not_written_down_are_refused(build: Callable[[], Vit], message: str) -> None:
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
        ({"heads": 0}, "heads >= 1"),
        ({"heads": 2}, r"heads=2 needs slices of width 1 at offsets 0, 4, .* w has width 1 and offsets \(0,\)"),
        ({"heads": 2, "slices": (Slice(tensor="w", axis=0, width=2, offsets=(0, 4), consumer=True),)}, "has width 2"),
        ({"heads": 2, "slices": (Slice(tensor="w", axis=0, offsets=(0, 5), consumer=True),)}, r"offsets \(0, 5\)"),
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


def test_masking_a_computed_weight_is_refused() -> None:
    network = NETWORKS["vit"][0]()
    groups = {g.name: g for g in vit_groups(network)}
    before = network.blocks[0].attn.qkv.weight.clone()
    parametrizations.weight_norm(network.blocks[0].attn.proj)
    with pytest.raises(ValueError, match=r"attn\.proj\.weight is no parameter .*remove the parametrization"):
        mask_units(network, groups["blocks.0.attn.head_dim"], [1]).__enter__()
    assert torch.equal(network.blocks[0].attn.qkv.weight, before)


def test_slicing_what_is_masked_is_refused() -> None:
    network = NETWORKS["vit"][0]()
    embed = vit_groups(network)[-1]
    with (
        mask_units(network, embed, [1]),
        pytest.raises(ValueError, match=r"embed: blocks\.0\.norm1 is masked; leave the context"),
    ):
        apply_plan(network, PruningPlan.removing([embed], {"embed": [1]}), groups=[embed])


def test_an_attribute_that_is_no_width_is_refused() -> None:
    network = NETWORKS["vit"][0]()
    groups = vit_groups(network)
    network.blocks[0].attn.head_dim = None
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.head_dim is None, an integer is expected"):
        apply_plan(network, PruningPlan.removing(groups, {"blocks.0.attn.head_dim": [1]}), groups=groups)


def test_attribute_defaults() -> None:
    assert Attribute(module="attn", name="num_heads").size_of is None
    assert str(Attribute(module="", name="embed_dim")) == "embed_dim = units"
    assert str(Attribute(module="attn", name="fused_attn", value=False)) == "attn.fused_attn = False"


def test_what_a_mask_touches_is_named() -> None:
    groups = {g.name: g for g in vit_groups(NETWORKS["vit"][0]())}
    attn = "blocks.0.attn"
    assert groups[f"{attn}.heads"].masked_parameters() == (f"{attn}.proj.weight",)
    names = (f"{attn}.qkv.weight", f"{attn}.qkv.bias", f"{attn}.proj.weight")
    assert groups[f"{attn}.head_dim"].masked_parameters() == names
    assert {"blocks.0.norm1.weight", "norm.weight", "head.weight"} <= set(groups["embed"].masked_parameters())


def test_a_class_swap_is_data() -> None:
    group = next(g for g in swin_groups(NETWORKS["swin v2"][0]()) if g.kind == "heads")
    (swap,) = group.class_swaps
    assert swap == ClassSwap(
        module="layers.0.blocks.0.attn",
        type="swincompress_pl.models.swin.window_attention:ResizableWindowAttention",
    )
    assert "becomes a swincompress_pl" in str(group)
    stored = group.to_dict()
    assert Group.from_dict(stored) == group
    stored["exchanges"] = stored.pop("class_swaps")  # as version 0.1 wrote it
    assert Group.from_dict(stored) == group
