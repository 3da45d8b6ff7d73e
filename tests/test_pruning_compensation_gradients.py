"""Rows and outputs weigh by how much the answers feel them, and nothing else comes of the gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.compensation.masks import MaskCompensator
from swincompress_pl.pruning.compensation.moments import CalibrationError, Moments
from swincompress_pl.pruning.compensation.reader_state import ReaderState
from swincompress_pl.pruning.compensation.readers import Reader
from swincompress_pl.pruning.space import SpaceConfig, Target, WeightSpace, compensator_for, search_space

FC1, FC2 = "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"


def _network(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**arguments, **options}).eval()


def _images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _states(network: nn.Module, images: Tensor | None = None, **options: Any) -> dict[str, ReaderState]:
    compensator = Compensator([_images() if images is None else images], **options)
    compensator.begin_round(network, None, [FC1, FC2])
    found = {name: compensator.state(name) for name in (FC1, FC2)}
    return {name: state for name, state in found.items() if state is not None}


def _read(network: nn.Module, name: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    return seen[0]


def _same(one: Moments, other: Moments) -> bool:
    pairs = ((one.xx, other.xx), (one.x, other.x))
    return one.rows == other.rows and all(torch.equal(*pair) for pair in pairs)


def test_rows_that_no_answer_feels_weigh_less() -> None:
    """Behind the last block, only the class token is read."""
    network, images = _network(), _images()
    rows = _read(network, FC2, images).double()
    moments = _states(network)[FC2].moments
    count = rows.shape[0] * rows.shape[1]
    assert moments.rows == pytest.approx(count)
    felt, others = rows[:, 0], rows[:, 1:].flatten(0, 1)
    # All weigh 0.7, and the class tokens share the rest: the sums tell how much each of them has.
    rest = moments.xx - 0.7 * (felt.T @ felt + others.T @ others)
    weights = torch.linalg.lstsq(torch.stack([torch.outer(x, x).flatten() for x in felt], 1), rest.flatten()).solution
    assert float(weights.min()) >= -1e-9
    assert float(weights.sum()) == pytest.approx(0.3 * count)


def test_weights_follow_squared_gradients() -> None:
    """A linear reader of the patches' mean gives all patches of an image one gradient, and the class token none."""
    network = _network(num_classes=1, global_pool="avg", fc_norm=False)
    network.norm = nn.Identity()
    rows = _read(network, FC2, _images()).double()
    moments = _states(network)[FC2].moments
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).double().square()
    felt = torch.cat([noise.new_zeros(8, 1), noise.expand(8, rows.shape[1] - 1)], 1).flatten()
    weights, flat = 0.7 + 0.3 * felt / felt.mean(), rows.flatten(0, 1)
    torch.testing.assert_close(moments.xx, (flat * weights.unsqueeze(1)).T @ flat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["list", "no_grad", "detached", "integers"])
def test_without_gradients_all_weigh_the_same(how: str) -> None:
    network, images = _network(), _images()

    def predict(net: nn.Module, x: Tensor) -> object:
        if how == "no_grad":
            with torch.no_grad():
                return net(x)
        if how == "integers":
            x = x.float() / 255
        return [net(x)] if how == "list" else net(x).detach()

    if how == "integers":
        images = (images * 40 + 128).clamp(0, 255).to(torch.uint8)
    plain = images.float() / 255 if how == "integers" else images
    for name, state in _states(network, images, predict=predict).items():
        rows = _read(network, name, plain).double().flatten(0, 1)
        assert state.moments.rows == len(rows)
        torch.testing.assert_close(state.moments.xx, rows.T @ rows, rtol=1e-5, atol=1e-5)
        assert torch.equal(state.scale, torch.ones_like(state.scale))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 5, 6)),
        (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (2, 3, 7, 6)),
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 4)),
        (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    ],
)
def test_rows_that_are_given_are_in_the_order_of_those_that_are_read(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reader = Reader(name="layer", taps=layer.weight[0, 0].numel())
    read = torch.cat(list(reader.rows(layer, x)))
    assert layer.bias is not None
    torch.testing.assert_close(reader.given(layer, layer(x)), read @ layer.weight.flatten(1).T + layer.bias)


def test_checkpoints_change_nothing() -> None:
    plain, checkpointed = _network(), _network()
    checkpointed.set_grad_checkpointing(True)
    one, other = _states(plain), _states(checkpointed)
    assert all(_same(one[name].moments, other[name].moments) for name in one)
    assert all(torch.equal(one[name].scale, other[name].scale) for name in one)


def test_the_network_and_random_numbers_are_left_as_they_were() -> None:
    network = _network()
    network.head.weight.requires_grad_(False)
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    wanted = {name: p.requires_grad for name, p in network.named_parameters()}
    _states(network)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == wanted
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_what_is_changed_in_place_is_refused() -> None:
    network = _network()

    class Changing(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = layer.fc1, layer.act, layer.fc2

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc1(x)
            x.mul_(0.5)
            return self.fc2(self.act(hidden))

    network.blocks[0].mlp = Changing(network.blocks[0].mlp)
    with pytest.raises(CalibrationError, match="in place"):
        _states(network)
    assert not any(module._forward_hooks for module in network.modules())


def test_outputs_that_no_answer_feels_go_first() -> None:
    network = _network()
    network.norm = nn.Identity()
    with torch.no_grad():
        network.head.weight[:, 8:] = 0.0
    compensator = Compensator([_images()])
    masks = MaskCompensator(compensator, writes=True)
    masks.begin_round(network, [f"{FC2}.weight"])
    errors = masks.errors(f"{FC2}.weight", network.get_submodule(FC2).weight.shape)
    assert errors is not None
    state = compensator.state(FC2)
    assert state is not None
    assert float(state.scale[8:].max()) <= 0.1 + 1e-9 < float(state.scale[:8].min())
    assert float(errors[8:].mean()) < 0.1 * float(errors[:8].mean())


def _costs(network: nn.Module) -> tuple[WeightSpace, list[Tensor], list[Tensor]]:
    config = SpaceConfig(granularity="weight", compensation="ridge", criterion="second_order")
    space = search_space(config, compensator=compensator_for(config, [_images(32)]))
    assert isinstance(space, WeightSpace)
    space.prepare(network)
    targets = space.targets(network)
    saliency = [space.scores(network, target, None).flatten() for target in targets]
    return space, saliency, [_scores_of_kept(space, network, target) for target in targets]


def _scores_of_kept(space: WeightSpace, network: nn.Module, target: Target) -> Tensor:
    return space.scores_of_kept(network, target, space.scores(network, target, None))


def test_costs_rise_in_the_order_of_the_scores() -> None:
    network = _network()
    before = copy.deepcopy(network.state_dict())
    _, scores, costs = _costs(network)
    for saliency, cost in zip(scores, costs, strict=True):
        order = saliency.argsort(stable=True)
        assert bool((cost[order].diff() > 0).all())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_costs_add_up_to_what_was_measured() -> None:
    """Without half of the weights, and without any of them."""
    network, images = _network(), _images(32)
    space, _, costs = _costs(network)
    target = space.targets(network)[0]
    half = space.refined(target, space.removals(network, target, None)(target.units // 2))
    for count, removal in ((target.units // 2, half), (target.units, {target.name: torch.zeros(48, 16).bool()})):
        with torch.no_grad():
            wanted = network(images).double().log_softmax(1)
            with space.masked(network, removal):
                found = network(images).double().log_softmax(1)
        moved = float((wanted.exp() * (wanted - found)).sum(1).mean())
        assert float(costs[0].sort().values[:count].sum()) == pytest.approx(moved, rel=0.05)


def test_a_second_round_goes_on_where_the_first_ended() -> None:
    network = _network()
    space, _, costs = _costs(network)
    target = space.targets(network)[0]
    space.commit(network, space.removals(network, target, None)(target.units * 3 // 4))
    space.prepare(network)
    again = _scores_of_kept(space, network, space.targets(network)[0])
    assert len(again) == target.units * 3 // 4
    torch.testing.assert_close(again.sort().values, costs[0].sort().values[-len(again) :])
