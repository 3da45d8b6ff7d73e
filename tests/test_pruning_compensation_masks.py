"""Masked weights are made up for by the other weights of their output, exactly, and nothing else changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prime_cases import holdout_of, network_of
from timm.models import VisionTransformer
from torch import Tensor, nn

from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, PrimeSVTConfig, primesvt, prune
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.compensation.moments import CalibrationError, Moments
from swincompress_pl.pruning.compensation.readers import Predict
from swincompress_pl.pruning.compensation.rows import RowSystem
from swincompress_pl.pruning.space import SpaceConfig, WeightSpace, compensator_for, search_space
from swincompress_pl.pruning.structure.change import revert
from swincompress_pl.pruning.structure.patterns import parse_granularity
from swincompress_pl.pruning.structure.weight_masks import masked_parameters

FC1, FC2, QKV = "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "blocks.1.attn.qkv.weight"
GRANULARITIES = ("weight", "2:4", "block", "filter")


def _network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()


def _images(count: int = 16) -> list[Tensor]:
    return [torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))]


def _without_gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Answers that nothing is differentiated of, so that all rows and outputs weigh the same."""
    return [network(images)]


def _space(
    network: nn.Module, images: list[Tensor] | None = None, predict: Predict | None = None, **settings: Any
) -> WeightSpace:
    config = SpaceConfig(**{"granularity": "weight", "compensation": "ridge", **settings})
    space = search_space(config, compensator=compensator_for(config, images or _images(), predict=predict))
    assert isinstance(space, WeightSpace)
    space.prepare(network)
    return space


def _half(space: WeightSpace, network: nn.Module, *names: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for target in space.targets(network):
        if target.name in names:
            removal = space.removals(network, target, None)(max(target.min_units, target.units // 2))
            found |= space.refined(target, removal)
    return found


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _rows(seed: int, inputs: int = 12, outputs: int = 5, rows: int = 200) -> tuple[RowSystem, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    weight = torch.randn(outputs, inputs, generator=draw).double()
    moments = Moments.empty(inputs, outputs, torch.device("cpu"))
    moments.add(x)
    moments.give(weight, weight.new_zeros(outputs))
    system = RowSystem.of(moments.system(intercept=True), weight)
    assert system is not None
    return system, weight


def _error(system: RowSystem, weight: Tensor) -> Tensor:
    difference = weight - system.best
    return ((difference @ system.hessian) * difference).sum(1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.95]))
def test_the_solution_of_each_row_is_the_best_one_with_its_zeros(seed: int, share: float) -> None:
    system, weight = _rows(seed)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed)) >= share
    solved = system.solve(mask)
    assert not solved[~mask].any()
    gradient = (solved @ system.hessian - system.right)[mask]
    assert (gradient.abs() <= 1e-7 * system.right.abs().max()).all()
    near = system.approach(weight, mask)
    assert not near[~mask].any()
    assert (_error(system, solved) <= _error(system, near) * (1 + 1e-7) + 1e-9).all()
    assert (_error(system, near) <= _error(system, weight * mask) * (1 + 1e-7) + 1e-9).all()
    assert _error(system, near).sum() <= 1.01 * _error(system, solved).sum() + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_errors_of_weights_are_what_losing_one_costs(seed: int) -> None:
    system, weight = _rows(seed)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[:, seed % 12] = False
    expected = _error(system, system.solve(mask))
    torch.testing.assert_close(system.errors(weight, torch.ones_like(mask))[:, seed % 12], expected)


def test_the_errors_of_rows_with_zeros_are_those_of_what_they_still_have() -> None:
    system, _ = _rows(3)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(3)) >= 0.4
    weight = system.solve(mask)
    errors = system.errors(weight, mask)
    assert not errors[~mask].any()
    row, column = (int(i) for i in mask.nonzero()[7])
    without = mask.clone()
    without[row, column] = False
    rise = _error(system, system.solve(without))[row] - _error(system, weight)[row]
    torch.testing.assert_close(errors[row, column], rise)


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_a_searched_mask_costs_less_than_the_lowest_scores(granularity: str) -> None:
    pattern, plain, searched = parse_granularity(granularity), 0.0, 0.0
    for seed in range(8):
        system, weight = _rows(seed, inputs=32, outputs=16)
        units = pattern.units(weight.shape)
        lowest = pattern.keep_mask(system.errors(weight, torch.ones_like(weight, dtype=torch.bool)), units // 2)

        def keep(saliency: Tensor, part: float, units: int = units) -> Tensor:
            return pattern.keep_mask(saliency, units - round(units * part / 2))

        mask = system.mask(weight, torch.ones(16, dtype=torch.float64), keep)
        assert int(mask.sum()) == int(lowest.sum())
        plain += float(_error(system, system.solve(lowest)).sum())
        searched += float(_error(system, system.solve(mask)).sum())
    assert searched < 0.9 * plain


class _Doubled(nn.Module):
    """Gives each channel twice, so that one of the two says all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


@pytest.mark.parametrize("operations", [1e11, 0.0])
def test_lost_weights_that_are_combinations_of_kept_ones_cost_nothing(
    operations: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swincompress_pl.pruning.compensation.rows.MOST_OPERATIONS", operations)
    network = _network()
    block = network.blocks[0]
    block.norm2 = nn.Sequential(block.norm2, _Doubled())  # the other half of fc1's inputs repeats the first
    block.mlp.fc1 = nn.Linear(32, 64)
    images = _images()
    space = _space(network, images)
    mask = torch.ones(64, 32, dtype=torch.bool)
    choice = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :16], mask[:, 16:] = choice, ~choice  # every row loses one of each two
    with torch.no_grad():
        expected = network(images[0])
        with space.masked(network, {FC1: mask}):
            difference = (network(images[0]) - expected).abs().max()
    assert difference < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", ["bias", "ridge", "second_order"])
@pytest.mark.parametrize("criterion", ["magnitude", "second_order"])
def test_a_trial_masks_and_makes_up_and_leaves_no_trace(granularity: str, method: str, criterion: str) -> None:
    network = _network()
    space = _space(network, granularity=granularity, compensation=method, criterion=criterion)
    before, removal = _state(network), _half(space, network, FC1, FC2)
    rewritten = {target.name: target.tensors for target in space.targets(network)}
    with space.masked(network, removal):
        during = _state(network)
        for name, mask in removal.items():
            assert mask.float().mean() == 0.5
            assert not network.get_parameter(name)[~mask].any()
            assert {each for each in before if not torch.equal(before[each], during[each])} <= {
                tensor for name in removal for tensor in rewritten[name]
            }
    assert _same(_state(network), before)


def test_what_is_made_up_for_gives_less_error_than_bias_and_bias_less_than_none() -> None:
    errors, removal = [], {}
    for method in ("none", "bias", "ridge"):
        network = _network()
        space = _space(network, compensation=method, predict=_without_gradients)
        removal = removal or _half(space, network, FC1)
        given: list[Tensor] = []
        network.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, y, given=given: given.append(y))
        with torch.no_grad():
            network(_images()[0])
            with space.masked(network, removal):
                network(_images()[0])
        errors.append(float((given[0] - given[1]).square().mean()))
    assert errors[2] < errors[1] < errors[0]


def test_infinite_damping_is_the_bias_alone() -> None:
    network, images = _network(), _images()
    config = SpaceConfig(granularity="weight", compensation="ridge")
    results = []
    for compensator in (Compensator(images, method="bias"), Compensator(images, damping=float("inf"))):
        space = WeightSpace(config, parse_granularity("weight"), compensator)
        space.prepare(network)
        with space.masked(network, _half(space, network, FC1)):
            results.append(_state(network))
    assert _same(*results)
    kept = results[0][FC1] != 0
    assert torch.equal(results[0][FC1][kept], network.get_parameter(FC1)[kept])


@pytest.mark.parametrize("method", ["ridge", "second_order"])
@pytest.mark.parametrize("case", ["few rows", "constant"])
def test_singular_matrices_give_finite_weights_that_do_no_harm(case: str, method: str) -> None:
    network = _network()
    images = [torch.zeros(2, 3, 16, 16)] if case == "constant" else _images(1)
    space = _space(network, images, compensation=method, criterion="second_order")
    removal = _half(space, network, *(target.name for target in space.targets(network)))
    with torch.no_grad():
        expected = network(images[0])
        with space.masked(network, removal):
            found = network(images[0])
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 0.5 * expected.abs().max() + 0.5


def test_nan_images_are_named() -> None:
    network = _network()
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="image 1 of batch 1 of calibration holds NaN or infinite pixels"):
        _space(network, [images, images.index_fill(0, torch.tensor(1), math.nan)])
    with pytest.raises(CalibrationError, match=r"NaN or infinite values at blocks\.0\.attn\.qkv"):
        _space(network, [images + 1e30])


def test_trials_nest_and_masks_add_up() -> None:
    network = _network()
    space = _space(network)
    before, removal = _state(network), _half(space, network, FC1, QKV)
    other = {FC1: torch.rand(64, 16, generator=torch.Generator().manual_seed(2)) < 0.7}
    with space.masked(network, removal):
        outer = _state(network)
        with space.masked(network, other):
            gone = ~(removal[FC1] & other[FC1])
            assert not network.get_parameter(FC1)[gone].any()
            assert torch.equal(network.get_parameter(QKV), outer[QKV])
            both = _state(network)
        assert _same(_state(network), outer)
    assert _same(_state(network), before)
    with space.masked(network, {FC1: ~gone}):
        assert torch.equal(network.get_parameter(FC1), both[FC1])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_committed_is_what_was_tried_and_can_be_reverted(granularity: str) -> None:
    network = _network()
    space = _space(network, granularity=granularity, criterion="second_order")
    before, removal = _state(network), _half(space, network, FC1, FC2, QKV)
    with space.masked(network, removal):
        tried = _state(network)
    change = space.commit(network, removal)
    committed = _state(network)
    assert _same({name: committed[name] for name in tried}, tried)
    for name, mask in removal.items():
        assert torch.equal(masked_parameters(network)[name][1], mask)
    revert(network, change)
    assert _same(_state(network), before)


def test_an_error_while_committing_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network()
    space = _space(network)
    before, removal = _state(network), _half(space, network, FC1)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swincompress_pl.pruning.space.weights.commit_masks", fails)
    with pytest.raises(KeyboardInterrupt):
        space.commit(network, removal)
    assert _same(_state(network), before)


def test_later_rounds_keep_earlier_zeros_and_aim_at_the_first_network() -> None:
    network = _network()
    config = SpaceConfig(granularity="weight", compensation="ridge", criterion="second_order")
    compensator = compensator_for(config, _images(), predict=_without_gradients)
    first = copy.deepcopy(network)
    gone: Tensor | None = None
    for keep in (768, 512):
        space = search_space(config, compensator=compensator)
        space.prepare(network)
        target = next(t for t in space.targets(network) if t.name == FC1)
        assert target.units == (1024 if gone is None else 768)
        removal = space.refined(target, space.removals(network, target, None)(keep))
        assert int(removal[FC1].sum()) == keep
        space.commit(network, removal)
        assert gone is None or not removal[FC1][gone].any()
        gone = ~removal[FC1]
    assert not network.get_parameter(FC1)[gone].any()
    given: list[Tensor] = []
    for each in (first, network):
        each.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, y: given.append(y))
        with torch.no_grad():
            each(_images()[0])
    torch.testing.assert_close(given[0].mean((0, 1)), given[1].mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_solved_are_masked_all_the_same_and_named() -> None:
    network = _network()
    network.blocks[0].mlp.fc1.requires_grad_(False)
    config = SpaceConfig(granularity="weight", compensation="ridge")
    space = search_space(config, compensator=compensator_for(config, _images()))
    with pytest.warns(UserWarning, match=r"leaves some layers as they are: blocks\.0\.mlp\.fc1 \(it is frozen"):
        space.prepare(network)
    assert isinstance(space, WeightSpace)
    before, removal = _state(network), _half(space, network, FC1)
    with space.masked(network, removal):
        assert torch.equal(network.get_parameter(FC1), before[FC1] * removal[FC1])
    assert _same(_state(network), before)
    space.commit(network, removal)
    assert torch.equal(network.get_parameter(FC1), before[FC1] * removal[FC1])


def test_second_order_refuses_a_layer_without_sums() -> None:
    network = _network()
    network.blocks[0].mlp.fc1.requires_grad_(False)
    with pytest.warns(UserWarning, match="leaves some layers as they are"):
        space = _space(network, criterion="second_order")
    target = next(t for t in space.targets(network) if t.name == FC1)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight cannot be solved again \(it is frozen"):
        space.scores(network, target, None)
    with pytest.raises(ValueError, match="no calibration images"):
        WeightSpace(space.config, space.pattern).scores(network, target, None)


@pytest.mark.parametrize(
    ("granularity", "ranking"), [("weight", "global"), ("weight", "local"), ("2:4", "local"), ("block", "global")]
)
def test_a_search_compensates_and_ends_with_exact_zeros(granularity: str, ranking: str) -> None:
    network, (images,) = _network(), _images(32)
    with torch.no_grad():
        labels = network(images).argmax(1)
    config = AdaptivePruningConfig(
        granularity=granularity, ranking=ranking, compensation="ridge", criterion="second_order", tolerance=50.0,
        target=0.3, target_of="parameters", step=0.25, block_shape=(4, 4), max_rounds=3,
    )  # fmt: skip
    result = prune(network, HoldOut(images, labels), config, calibration=[images])
    assert result.score >= 50.0
    masked = masked_parameters(network)
    assert masked
    for parameter, mask in masked.values():
        assert not parameter[~mask].any()
        assert parameter.isfinite().all()


@pytest.mark.parametrize("criterion", ["magnitude", "second_order"])
def test_the_mean_of_the_batchnorm_behind_takes_up_the_bias(criterion: str) -> None:
    network = network_of().eval()
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))]
    space = _space(network, images, criterion=criterion)
    target = next(t for t in space.targets(network) if any(tensor.endswith("running_mean") for tensor in t.tensors))
    before, removal = _state(network), _half(space, network, target.name)
    layer, norm = (network.get_submodule(name.rpartition(".")[0]) for name in target.tensors)
    given: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, y: given.append(y - norm.running_mean.reshape(-1, *[1] * (y.ndim - 2))))
    with torch.no_grad():
        network(images[0])
        with space.masked(network, removal):
            network(images[0])
    assert _same(_state(network), before)
    mean = [y.transpose(0, 1).flatten(1).mean(1) if y.ndim == 4 else y.mean((0, 2)) for y in given]
    torch.testing.assert_close(mean[0], mean[1], rtol=1e-3, atol=1e-3 * float(mean[0].abs().max()))


def test_filters_of_primesvt_are_compensated() -> None:
    network = network_of()
    config = PrimeSVTConfig(
        granularity="filter",
        tolerance=30.0,
        compensation="ridge",
        criterion="second_order",
        layers=("blocks.1.mlp.*",),
        min_memory_saving=0.05,
    )
    primesvt(network, holdout_of(network, 20), config, calibration=[torch.randn(8, 3, 32, 32)])
    masked = masked_parameters(network)
    assert masked
    assert all(not parameter[~mask].any() for parameter, mask in masked.values())
