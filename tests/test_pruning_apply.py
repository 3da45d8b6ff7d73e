"""Physical slicing: replayable, reversible, and all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn.utils import parametrizations

from swincompress_pl.pruning import PruningPlan, apply_plan, count_macs
from swincompress_pl.pruning.structure.apply import history_of, revert_plan
from swincompress_pl.pruning.structure.cost import skeleton
from swincompress_pl.pruning.structure.regrow import regrow_latest_plan
from swincompress_pl.registry import adapter_for

HEADS, CHANNELS = "layers.0.blocks.1.attn.heads", "layers.1.blocks.0.mlp.channels"


def _network(seed: int = 0) -> SwinTransformer:
    torch.manual_seed(seed)
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
    )


def _plan(network: nn.Module, removed: dict[str, list[int]]) -> PruningPlan:
    return PruningPlan.removing(adapter_for(network).groups(network), removed)


def _structure(network: nn.Module) -> dict[str, object]:
    integers: dict[str, object] = {
        f"{path}.{name}": value
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | tuple) or name == "feature_info"
    }
    integers = copy.deepcopy(integers)
    return {**integers, **{key: value.shape for key, value in network.state_dict().items()}}


def _same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_empty_plan_is_the_identity() -> None:
    network = _network()
    parameters, structure = list(network.parameters()), _structure(network)
    applied = apply_plan(network, PruningPlan.identity())
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert _structure(network) == structure
    assert history_of(network) == []
    assert applied.tensors == ()


def test_a_plan_that_keeps_everything_changes_nothing_but_is_recorded() -> None:
    network = _network()
    state = copy.deepcopy(network.state_dict())
    apply_plan(network, PruningPlan({HEADS: (0, 1)}, {HEADS: 2}))
    assert _same_state(state, network.state_dict())
    assert len(history_of(network)) == 1


def _swin_v2(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SwinTransformerV2(
        img_size=16, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=5
    )


def _distilled(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.5
    )


NETWORKS = {"swin": _network, "swin v2": _swin_v2, "deit": _distilled}


@pytest.mark.parametrize("family", NETWORKS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_replay_on_a_fresh_network_takes_the_weights(family: str, data: st.DataObject) -> None:
    build = NETWORKS[family]
    network, fresh = build(0), build(1)
    kinds = set()
    for _ in range(data.draw(st.integers(1, 3))):
        removed = {}
        for group in adapter_for(network).groups(network):
            removed[group.name] = data.draw(
                st.lists(st.integers(0, group.units - 1), unique=True, max_size=group.units // 2)
            )
            if removed[group.name]:
                kinds.add(group.kind)
        apply_plan(network, _plan(network, removed))
    for entry in history_of(network):
        apply_plan(fresh, PruningPlan.from_dict(entry["prune"]))
    assert _structure(fresh) == _structure(network)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in network.modules()]
    fresh.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh.eval()(images), network.eval()(images))
    # and back again: in shapes from the history alone, with the function unchanged but for LayerNorm's statistics
    while history_of(fresh):
        regrow_latest_plan(fresh)
    assert _without_fusing(_structure(fresh)) == _without_fusing(_structure(build(0).eval()))
    if "embed" not in kinds:
        torch.testing.assert_close(fresh(images), network(images), rtol=1e-4, atol=1e-5)
    fresh.load_state_dict(build(2).state_dict())
    torch.testing.assert_close(fresh(images), build(2).eval()(images), rtol=1e-4, atol=1e-5)


def _without_fusing(structure: dict[str, object]) -> dict[str, object]:
    """Regrowing leaves the fused attention off: the history does not say whether it was on."""
    return {name: value for name, value in structure.items() if not name.endswith(".fused_attn")}


@pytest.mark.parametrize("kinds", [("heads", "head_dim"), ("mlp",), ("heads", "head_dim", "mlp")])
@pytest.mark.parametrize("family", NETWORKS)
def test_regrowing_computes_the_same(family: str, kinds: tuple[str, ...]) -> None:
    network = NETWORKS[family](0).eval()
    groups = adapter_for(network).groups(network)
    apply_plan(network, _plan(network, {g.name: [0, g.units - 1][: g.units - 1] for g in groups if g.kind in kinds}))
    images = torch.randn(2, 3, 16, 16)
    before = network(images)
    regrow_latest_plan(network)
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-5)


def _mask(network: nn.Module, path: str) -> nn.Module:
    """A persistent mask beside the weight of the layer at `path`, with every third entry removed."""
    layer = network.get_submodule(path)
    layer.register_buffer("weight_mask", torch.arange(layer.weight.numel()).view_as(layer.weight) % 3 != 0)
    layer.weight.data *= layer.weight_mask
    return layer


def test_masks_of_single_weights_are_cut_and_regrown_with_their_tensor() -> None:
    network = _network()
    layer, other = _mask(network, "layers.0.blocks.1.attn.qkv"), _mask(network, "layers.1.blocks.0.mlp.fc1")
    whole = layer.weight_mask.clone()
    removed = {HEADS: [0], "layers.0.blocks.1.attn.head_dim": [1, 2], "layers.0.embed": [0, 5], CHANNELS: [4]}
    applied = apply_plan(network, _plan(network, removed))
    assert layer.weight_mask.shape == layer.weight.shape == (18, 14)
    assert other.weight_mask.shape == other.weight.shape == (127, 32)
    assert not layer.weight[~layer.weight_mask].any()
    assert layer.weight[layer.weight_mask].all()
    rows = [8, 11, 12, 13, 14, 15]
    columns = [c for c in range(16) if c not in (0, 5)]
    assert torch.equal(layer.weight_mask, whole[rows + [r + 16 for r in rows] + [r + 32 for r in rows]][:, columns])
    revert_plan(network, applied)
    assert torch.equal(layer.weight_mask, whole)
    apply_plan(network, _plan(network, removed))
    regrow_latest_plan(network)
    assert layer.weight_mask.dtype == torch.bool
    assert layer.weight_mask[:8].all()  # the head that came back
    assert torch.equal(layer.weight_mask[8][columns], whole[8][columns])
    assert "layers.0.blocks.1.attn.qkv.weight_mask" in network.state_dict()


def test_two_groups_that_cut_one_axis_are_reverted_together() -> None:
    network = _network()
    state, structure = copy.deepcopy(network.state_dict()), _structure(network)
    applied = apply_plan(network, _plan(network, {HEADS: [1], "layers.0.blocks.1.attn.head_dim": [0, 3]}))
    attn = network.layers[0].blocks[1].attn
    assert (attn.num_heads, attn.qkv.weight.shape, attn.proj.weight.shape) == (1, (18, 16), (16, 6))
    revert_plan(network, applied)
    assert _structure(network) == structure
    assert _same_state(state, network.state_dict())


def test_a_skeleton_is_cut_like_the_network() -> None:
    for build in NETWORKS.values():
        network = build(0)
        bare = skeleton(network)
        removed = {g.name: [g.units - 1] for g in adapter_for(network).groups(network)}
        apply_plan(bare, _plan(bare, removed))
        assert bare(torch.zeros(1, 3, 16, 16, device="meta")) is not None
        assert _structure(network) == _structure(build(0))
        apply_plan(network, _plan(network, removed))
        assert _structure(bare) == _structure(network)
        macs = count_macs(network, (1, 3, 16, 16))
        assert macs == count_macs(bare, (1, 3, 16, 16)) < count_macs(build(0), (1, 3, 16, 16))


def test_revert_is_exact() -> None:
    network = _network()
    state, structure = copy.deepcopy(network.state_dict()), _structure(network)
    applied = apply_plan(network, _plan(network, {HEADS: [0], CHANNELS: [3, 4]}))
    assert _structure(network) != structure
    later = apply_plan(network, _plan(network, {CHANNELS: [0]}))
    twin = copy.deepcopy(network)
    with pytest.raises(ValueError, match="only the latest plan"):
        revert_plan(twin, applied)
    assert _structure(twin) == _structure(network)
    revert_plan(network, later)
    revert_plan(network, applied)
    assert _structure(network) == structure
    assert _same_state(state, network.state_dict())


def test_parameters_keep_their_kind() -> None:
    network = _network().to(torch.bfloat16)
    weight = network.layers[0].blocks[1].attn.qkv.weight
    weight.requires_grad_(False)
    bias = network.layers[0].blocks[1].attn.qkv.bias
    bias.grad = torch.arange(48, dtype=torch.bfloat16)
    bias.note = "mine"
    apply_plan(network, _plan(network, {HEADS: [0]}))
    attn = network.layers[0].blocks[1].attn
    assert attn.qkv.weight.dtype == torch.bfloat16
    assert not attn.qkv.weight.requires_grad
    assert attn.qkv.bias.requires_grad
    assert attn.qkv.bias.note == "mine"
    assert attn.qkv.bias.grad.tolist() == [*range(8, 16), *range(24, 32), *range(40, 48)]
    assert isinstance(attn.qkv.bias, nn.Parameter)


def _share(network: SwinTransformer) -> None:
    network.layers[0].blocks[0].attn.qkv.weight = network.layers[0].blocks[1].attn.qkv.weight


def _share_a_layer(network: SwinTransformer) -> None:
    network.layers[0].blocks[0].attn.qkv = network.layers[0].blocks[1].attn.qkv


def _parametrize(network: SwinTransformer) -> None:
    parametrizations.weight_norm(network.layers[0].blocks[1].attn.qkv)


def _disagree(network: SwinTransformer) -> None:
    network.layers[0].blocks[1].attn.qkv.out_features = 7


def _unset(network: SwinTransformer) -> None:
    network.layers[0].blocks[1].attn.num_heads = None


def _disagree_in_width(network: SwinTransformer) -> None:
    network.layers[1].blocks[1].norm1.normalized_shape = (3,)


@pytest.mark.parametrize(
    ("spoil", "plan", "message"),
    [
        (
            None,
            PruningPlan({"layers.9.attn.heads": (0,)}),
            r"'layers\.9\.attn\.heads' is no pruning group.* its 14 groups are layers\.0",
        ),
        (None, PruningPlan({HEADS: (0, 2)}), r"the kept units name units 2, but the group has units 0 to 1"),
        (None, PruningPlan({HEADS: (0,)}, {HEADS: 3}), r"made for 3 units, this network has 2"),
        (_share, PruningPlan({HEADS: (0,)}), r"attn\.qkv\.weight is shared \(layers\.0\.blocks\.0.*Untie"),
        (_share_a_layer, PruningPlan({HEADS: (0,)}), r"attn\.qkv\.weight is shared \(layers\.0\.blocks\.0.*Untie"),
        (_parametrize, PruningPlan({HEADS: (0,)}), r"qkv\.weight is no parameter of the network .*parametrization"),
        (_parametrize, PruningPlan({"layers.0.embed": (0, 1)}), r"qkv\.weight is no parameter of the network"),
        (
            _disagree_in_width,
            PruningPlan({"layers.1.embed": (0, 1)}),
            r"1\.norm1\.normalized_shape is \(3,\), \(32,\) is",
        ),
        (None, PruningPlan({"layers.0.embed": (3,)}), r"layers\.0\.embed: the plan keeps 1 units, at least 2 have to"),
        (_disagree, PruningPlan({HEADS: (0,)}), r"qkv\.out_features is 7, 48 is expected"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_anything_is_touched(
    spoil: object, plan: PruningPlan, message: str
) -> None:
    network = _network()
    if callable(spoil):
        spoil(network)
    structure, state = _structure(network), copy.deepcopy(network.state_dict())
    # the good half of the plan must not be applied either
    plan = PruningPlan({CHANNELS: (0, 1)}).then(plan)
    with pytest.raises(ValueError, match=message):
        apply_plan(network, plan)
    assert _structure(network) == structure
    assert _same_state(state, network.state_dict())
    assert history_of(network) == []


def test_fewer_than_min_units_is_refused() -> None:
    network = _network()
    groups = [
        type(g)(**{**vars(g), "min_units": 2}) if g.name == HEADS else g for g in adapter_for(network).groups(network)
    ]
    with pytest.raises(ValueError, match="keeps 1 units, at least 2 have to stay"):
        apply_plan(network, PruningPlan({HEADS: (0,)}), groups=groups)


def test_regrow_without_the_widths_is_refused() -> None:
    network = _network()
    with pytest.raises(ValueError, match="no pruning plan; build a fresh network"):
        regrow_latest_plan(network)
    apply_plan(network, PruningPlan({HEADS: (0,)}))
    with pytest.raises(ValueError, match="does not record the width"):
        regrow_latest_plan(network)


def test_pruned_network_deep_copies_with_its_history() -> None:
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    apply_plan(network, _plan(network, {"blocks.0.attn.heads": [1]}))
    assert history_of(copy.deepcopy(network)) == history_of(network) != []
