"""Every group of the spiking families is proven: masked equals sliced, spike for spike."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.spiking_cases import ALL, lively, most_spikes, spikes_of
from torch import nn

from swincompress_pl.pruning import Group, PruningPlan, apply_plan
from swincompress_pl.pruning.structure.apply import revert_plan
from swincompress_pl.pruning.structure.unit_masks import mask_plan
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for


def groups_of(network: nn.Module) -> list[Group]:
    return list(adapter_for(network).groups(network))


def random_plan(data: st.DataObject, groups: list[Group]) -> PruningPlan:
    removed = {}
    for group in data.draw(st.lists(st.sampled_from(groups), unique_by=lambda g: g.name)):
        removed[group.name] = data.draw(
            st.lists(st.integers(0, group.units - 1), unique=True, max_size=group.units - group.min_units)
        )
    return PruningPlan.removing(groups, removed)


def assert_masked_equals_sliced(network: nn.Module, images: torch.Tensor, plan: PruningPlan) -> None:
    groups = groups_of(network)
    with torch.no_grad():
        with mask_plan(network, plan, groups), spikes_of(network) as masked_spikes:
            masked = network(images)
        apply_plan(network, plan, groups=groups)
        with spikes_of(network) as sliced_spikes:
            sliced = network(images)
    torch.testing.assert_close(sliced, masked, rtol=1e-9, atol=1e-9)
    for name, spikes in sliced_spikes.items():
        wide = masked_spikes[name]
        assert spikes.min() >= 0, name
        assert spikes.max() <= most_spikes(network, name), name
        assert torch.equal(spikes, spikes.round()), name
        if spikes.shape == wide.shape:
            assert torch.equal(spikes, wide), name
        else:  # a neuron's other channels fire as if nothing had happened: their spikes are among those of the mask
            assert _channels(name, spikes) <= _channels(name, wide), name


def _channels(name: str, spikes: torch.Tensor) -> set[bytes]:
    """The different spike trains among the channels of (T, N, C, ...); in attentions, whose axes differ between the
    classes, among the single places."""
    if name.endswith("attn_lif"):
        spikes = spikes.flatten(2)
    return {train.to(torch.int8).numpy().tobytes() for train in spikes.transpose(0, 2).flatten(1).unbind(0)}


@pytest.mark.parametrize("trained_statistics", [True, False], ids=["trained", "random"])
@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_masked_equals_sliced(name: str, trained_statistics: bool, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    network, images = lively(ALL[name], seed, trained_statistics=trained_statistics)
    plan = random_plan(data, groups_of(network))
    assert_masked_equals_sliced(network, images, plan)
    for group in groups_of(network):
        assert group.units == len(plan.kept.get(group.name, range(group.units)))


@pytest.mark.parametrize("name", ALL)
def test_every_group_alone(name: str) -> None:
    network, images = lively(ALL[name], 0, trained_statistics=True)
    with torch.no_grad(), spikes_of(network) as spikes:
        before = network(images)
    rates = {neuron: float(train.mean()) / most_spikes(network, neuron) for neuron, train in spikes.items()}
    assert sum(0.02 < rate < 0.98 for rate in rates.values()) > 0.7 * len(rates), f"a dead test: {rates}"
    for group in groups_of(network):
        if group.units == group.min_units:
            continue
        other = copy.deepcopy(network)
        plan = PruningPlan.removing([group], {group.name: range(0, group.units - 1, 2)})
        assert_masked_equals_sliced(other, images, plan)
        assert sum(p.numel() for p in other.parameters()) < sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        assert torch.equal(network(images), before)


@pytest.mark.parametrize("name", ALL)
def test_every_weight_but_biases_is_in_a_group(name: str) -> None:
    network, _ = lively(ALL[name], 0, trained_statistics=True)
    covered = {part.tensor for group in groups_of(network) for part in group.slices}
    weights = {key for key, p in network.named_parameters() if p.ndim > 1}
    assert weights <= covered


@pytest.mark.parametrize("name", ALL)
def test_cuts_follow_one_another_and_can_be_taken_back(name: str) -> None:
    network, images = lively(ALL[name], 1, trained_statistics=True)
    with torch.no_grad():
        before = network(images)
    applied = []
    for _ in range(2):
        removed = {g.name: [0] for g in groups_of(network) if g.units > 2}
        applied.append(apply_plan(network, PruningPlan.removing(groups_of(network), removed)))
    with torch.no_grad():
        assert torch.isfinite(network(images)).all()
    fresh, _ = lively(ALL[name], 1, trained_statistics=True)
    for entry in applied:
        apply_plan(fresh, PruningPlan.from_dict(json.loads(json.dumps(entry.plan.to_dict()))))
    assert {key: t.shape for key, t in fresh.state_dict().items()} == {
        key: t.shape for key, t in network.state_dict().items()
    }
    for entry in reversed(applied):
        revert_plan(network, entry)
    with torch.no_grad():
        assert torch.equal(network(images), before)


@pytest.mark.parametrize("name", ALL)
def test_groups_survive_json(name: str) -> None:
    network, _ = lively(ALL[name], 0, trained_statistics=True)
    for group in groups_of(network):
        assert Group.from_dict(json.loads(json.dumps(group.to_dict()))) == group
        assert group.name in str(group)


@pytest.mark.parametrize(
    ("name", "path", "replacement", "message"),
    [
        ("spikformer", "blocks.0.mlp.fc1.0", nn.Identity(), "blocks.0.mlp.fc1.0 is a Identity"),
        ("spikformer", "blocks.1.mlp.fc1.1", nn.Identity(), "expects a BatchNorm there"),
        ("sdt", "blocks.0.mlp.bn1", nn.BatchNorm2d(64, affine=False), "affine=True and running statistics"),
        ("sdt", "blocks.0.mlp.fc2", nn.Conv2d(64, 16, 1, groups=2), "expects a convolution without groups there"),
        ("maxformer", "stage1.0.dwconv", nn.Conv2d(8, 8, 1), "expects a depthwise convolution there"),
        (
            "e-spikeformer",
            "block3.0.conv.dwconv.0",
            nn.Conv2d(32, 32, 3, groups=2),
            "expects a depthwise convolution there",
        ),
        (
            "e-spikeformer",
            "block4.0.mlp.fc1_bn",
            nn.Identity(),
            "block4.0.mlp.fc1_bn is a Identity.* expects a BatchNorm",
        ),
        ("qkformer", "stage3.0.attn", nn.Identity(), "Identity: the pruning groups of this attention are unknown"),
    ],
)
def test_what_is_not_written_down_is_refused(name: str, path: str, replacement: nn.Module, message: str) -> None:
    network: Any = ALL[name]()
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, replacement)
    with pytest.raises(UnsupportedNetworkError, match=message):
        groups_of(network)
