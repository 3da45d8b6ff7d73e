"""Physical slicing: replayable, reversible, and all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import SwinTransformer, VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations

from swincompress_pl.pruning import PruningPlan, apply_plan, history_of, regrow_latest_plan, revert_plan
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
    integers = {f"{p}.{k}": v for p, m in network.named_modules() for k, v in vars(m).items() if isinstance(v, int)}
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


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_replay_on_a_fresh_network_takes_the_weights(data: st.DataObject) -> None:
    network, fresh = _network(0), _network(1)
    for _ in range(data.draw(st.integers(1, 3))):
        removed = {}
        for group in adapter_for(network).groups(network):
            removed[group.name] = data.draw(
                st.lists(st.integers(0, group.units - 1), unique=True, max_size=group.units // 2)
            )
        apply_plan(network, _plan(network, removed))
    for entry in history_of(network):
        apply_plan(fresh, PruningPlan.from_dict(entry["prune"]))
    assert _structure(fresh) == _structure(network)
    fresh.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh.eval()(images), network.eval()(images))
    # and back again: in shapes from the history alone, with the function unchanged
    while history_of(fresh):
        regrow_latest_plan(fresh)
    assert _structure(fresh) == _structure(_network().eval())
    torch.testing.assert_close(fresh(images), network(images), rtol=1e-4, atol=1e-5)


def test_revert_is_exact() -> None:
    network = _network()
    state, structure = copy.deepcopy(network.state_dict()), _structure(network)
    applied = apply_plan(network, _plan(network, {HEADS: [0], CHANNELS: [3, 4]}))
    assert _structure(network) != structure
    later = apply_plan(network, _plan(network, {CHANNELS: [0]}))
    with pytest.raises(ValueError, match="only the latest plan"):
        revert_plan(copy.deepcopy(network), applied)
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


def _parametrize(network: SwinTransformer) -> None:
    parametrizations.weight_norm(network.layers[0].blocks[1].attn.qkv)


def _disagree(network: SwinTransformer) -> None:
    network.layers[0].blocks[1].attn.qkv.out_features = 7


@pytest.mark.parametrize(
    ("spoil", "plan", "message"),
    [
        (
            None,
            PruningPlan({"layers.9.attn.heads": (0,)}),
            r"'layers\.9\.attn\.heads' is no pruning group.* its 8 groups are layers\.0",
        ),
        (None, PruningPlan({HEADS: (0, 2)}), r"the kept units name units 2, but the group has units 0 to 1"),
        (None, PruningPlan({HEADS: (0,)}, {HEADS: 3}), r"made for 3 units, this network has 2"),
        (_share, PruningPlan({HEADS: (0,)}), r"attn\.qkv\.weight is shared \(layers\.0\.blocks\.0.*Untie"),
        (_parametrize, PruningPlan({HEADS: (0,)}), r"qkv\.weight is no parameter of the network .*parametrization"),
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
