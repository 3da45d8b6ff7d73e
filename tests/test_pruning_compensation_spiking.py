"""Compensation on spikes: what others carry too costs nothing, in every family, and PrimeSVT searches with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.prime_cases import SHAPE, holdout_of, network_of, prime_config, same_state, state_of
from support.spiking_cases import ALL, FAMILIES, lively, spikes_of
from torch import Tensor, nn

from swincompress_pl.pruning import AdaptivePruningConfig, AllocatedPolicy, PrimeSVTConfig, primesvt, prune
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.compensation.meetings import Meeting, meetings_of, watched_meetings
from swincompress_pl.pruning.compensation.moments import Moments
from swincompress_pl.pruning.compensation.order import heads_apart, sort_heads
from swincompress_pl.pruning.compensation.readers import readers_of
from swincompress_pl.pruning.evaluation.scorer import as_evaluator
from swincompress_pl.pruning.prime.candidates import Candidates
from swincompress_pl.pruning.space import SpaceConfig, StructuredSpace, compensator_for
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.pruning.structure.weight_masks import register_masks, set_mask
from swincompress_pl.registry import adapter_for

WHOLE = ("heads", "embed")
RIDGE: dict[str, Any] = {"compensation": "ridge", "criterion": "second_order", "round_to": 1}


def _groups(network: nn.Module) -> list[Group]:
    return [group for group in adapter_for(network).groups(network) if group.kind not in WHOLE]


def _images(count: int = 8) -> Tensor:
    return torch.randn(count, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def _doubled(name: str, kind: str) -> tuple[nn.Module, list[Group]]:
    """A network in which units 2n and 2n + 1 of every group of a kind are written alike, and their columns differ."""
    network, _ = lively(ALL[name], 3, trained_statistics=True)
    groups = [group for group in _groups(network) if group.kind == kind]
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    with torch.no_grad():
        for group in groups:
            for part in group.slices:
                if part.consumer or part.axis or part.tensor not in tensors:
                    continue
                even, odd = (torch.tensor(part.indices(range(first, group.units, 2))) for first in (0, 1))
                tensors[part.tensor][odd] = tensors[part.tensor][even[: len(odd)]]
    return network, groups


@pytest.mark.parametrize("kind", ["mlp", "conv", "v"])
@pytest.mark.parametrize("name", ALL)
def test_units_that_others_carry_too_cost_nothing(name: str, kind: str) -> None:
    network, groups = _doubled(name, kind)
    groups = [group for group in groups if group.units % 2 == 0]
    if not groups:
        pytest.skip(f"{name} has no such group of kind {kind}")
    images = _images().double()
    with torch.no_grad():
        expected = network(images)
    compensator = Compensator([images], damping=1e-6)
    compensator.begin_round(network, groups)
    group = groups[-1]
    errors = compensator.removal_errors(group)
    assert errors is not None
    units = errors.argsort()[: group.units // 2].tolist()
    assert float(errors[units].max()) < 1e-3 * float(errors.max()) + 1e-4, "0 for units that never fire"
    before = state_of(network)
    with mask_units(network, group, units), torch.no_grad():
        plain = network(images)
        with compensator.compensated(network, compensator.lost_columns(group, units)):
            solved = network(images)
    assert torch.allclose(solved, expected, atol=1e-4), "no spike may differ"
    if kind == "mlp":  # of the others, some units never fire
        assert not torch.allclose(plain, expected, atol=1e-4)
    assert same_state(before, state_of(network))


@pytest.mark.parametrize("name", ALL)
def test_every_reader_of_spikes_has_a_place_for_its_bias(name: str) -> None:
    network, images = lively(ALL[name], 0, trained_statistics=True)
    found = readers_of(network, _groups(network), images, lambda net, x: net(x))
    assert found.left_alone == {}
    assert not [reader.name for reader in found.readers.values() if reader.fixed_bias]
    read = {part.tensor.removesuffix(".weight") for g in _groups(network) if g.kind != "qk" for part in g.consumers()}
    assert set(found.readers) == {name for name in read if (name + ".weight") in dict(network.named_parameters())}


@pytest.mark.parametrize("name", ["spikformer", "sdt"])
def test_corrected_statistics_do_not_count_the_bias_twice(name: str) -> None:
    network, groups = _doubled(name, "mlp")
    network = network.float()
    images = _images()
    with torch.no_grad():
        expected = network(images)
    config = PrimeSVTConfig(kinds=("mlp",), batchnorm="correct", **RIDGE)
    candidates = Candidates(
        network, as_evaluator(lambda _: 50.0), config, floor=0, calibration=[images], gradients=None, cache_path=None
    )
    widths = candidates.widths({group.name: 0.5 for group in groups})
    assert all(2 * widths[group.name] == group.units for group in groups)
    with candidates.masked(widths), torch.no_grad():
        found = network(images)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_curves_correct_statistics_on_their_own_images() -> None:
    network, images = network_of(), _images(16)
    config = prime_config(
        **RIDGE, batchnorm="correct", policy=AllocatedPolicy(curves="divergence", curve_images=4),
        granularity="structured", blocks="layer", kinds=("mlp",), rates=(0.1, 0.3), max_sparsity=0.8,
    )  # fmt: skip
    candidates = Candidates(
        network, as_evaluator(lambda _: 50.0), config, floor=0, calibration=[images], gradients=None, cache_path=None
    )
    widths = candidates.widths(dict.fromkeys(candidates.targets, 0.75))
    before, passes = state_of(network), candidates.correction.passes
    assert candidates.divergence(widths) > 0
    assert candidates.correction.passes == passes
    assert same_state(before, state_of(network))
    with candidates.masked(widths):
        assert candidates.correction.passes == passes + 1


def _of_several_heads(network: nn.Module) -> list[Group]:
    return [group for group in _groups(network) if group.heads > 1]


@pytest.mark.parametrize("name", ALL)
def test_sorting_the_units_of_each_head_leaves_every_spike(name: str) -> None:
    network, images = lively(ALL[name], 2, trained_statistics=True)
    groups = _of_several_heads(network)
    if not groups:  # channels of SDT meet one by one
        assert name.startswith("sdt") or all(getattr(m, "num_heads", 1) == 1 for m in network.modules())
        return
    with torch.no_grad(), spikes_of(network) as before:
        wanted = network(images)
    moved = 0
    for group in groups:
        scores = torch.randn(group.heads * group.units, generator=torch.Generator().manual_seed(len(group.name)))
        now = sort_heads(network, group, scores)
        moved += int((now != torch.arange(len(now))).sum())
        assert torch.equal(now.sort().values, torch.arange(len(now)))
        sorted_scores = scores[now].reshape(group.heads, group.units)
        assert torch.equal(sorted_scores, sorted_scores.sort(1, descending=True).values)
    with torch.no_grad(), spikes_of(network) as after:
        found = network(images)
    assert moved > 0
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for neuron, spikes in after.items():
        assert spikes.sum() == before[neuron].sum(), neuron


def test_the_least_of_every_head_go_together() -> None:
    """Half of the units of each head never fire, and these are others in every second head."""
    network, images = lively(FAMILIES["spikformer"], 2, trained_statistics=True)
    groups, tensors = _of_several_heads(network), dict(network.named_parameters())
    with torch.no_grad():
        for group in groups:
            for part in heads_apart(group).slices:
                if part.tensor in tensors and part.axis == 0:
                    # Odd dimensions of odd heads, and even ones of even heads.
                    dead = [u for u in range(group.heads * group.units) if (u // group.units + u) % 2 == 0]
                    tensors[part.tensor][part.indices(dead)] = -1e-9 if part.tensor.endswith("bias") else 0.0
        wanted = network(images)
        compensator = Compensator([images])
        compensator.begin_round(network, groups)
        for group in groups:
            last = list(range(group.units // 2, group.units))
            lost = compensator.lost_columns(group, last)
            with mask_units(network, group, last), compensator.compensated(network, lost):
                torch.testing.assert_close(network(images), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "streams"), [("none", False), ("bias", False), ("ridge", True), ("second_order", True)]
)
def test_streams_are_pruned_where_their_readers_are_solved_again(method: Any, streams: bool) -> None:
    kinds = PrimeSVTConfig(compensation=method).space(network_of()).kinds
    assert ("embed" in kinds) == streams
    assert "heads" not in kinds
    assert PrimeSVTConfig(compensation=method, kinds=("mlp",)).space(network_of()).kinds == ("mlp",)


@pytest.mark.parametrize("name", ALL)
def test_channels_of_a_stream_that_others_repeat_cost_nothing(name: str) -> None:
    """What reads the stream takes the weights of a channel that goes to its twin's."""
    network, images = lively(ALL[name], 3, trained_statistics=True)
    (*_, group) = [group for group in adapter_for(network).groups(network) if group.kind == "embed"]
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    with torch.no_grad():
        for part in group.slices:
            if part.tensor in tensors and not part.consumer and part.axis == 0:
                tensors[part.tensor][part.indices([1])] = tensors[part.tensor][part.indices([0])]
        wanted = network(images)
        compensator = Compensator([images], damping=1e-9)
        compensator.begin_round(network, [group])
        with mask_units(network, group, [1]):
            plain = network(images)
            with compensator.compensated(network, compensator.lost_columns(group, [1])):
                found = network(images)
    assert float((found - wanted).norm()) <= 0.05 * float((plain - wanted).norm()) + 1e-6


def test_a_granule_counts_the_units_of_all_heads() -> None:
    network = network_of()
    for round_to in (1, 2, 3, 8):
        targets = StructuredSpace(SpaceConfig(kinds=("qk", "v", "mlp", "heads"), round_to=round_to)).targets(network)
        heads = {group.name: group.heads for group in _groups(network)}
        for target in targets:
            several = heads.get(target.name, 1)
            wanted = 1 if target.kind == "heads" else next(g for g in range(1, 9) if g * several % round_to == 0)
            assert target.granule == wanted, (target.name, round_to)


def test_units_that_masks_tell_apart_keep_their_order() -> None:
    network, images = lively(FAMILIES["spikformer"], 2, trained_statistics=True)
    groups = _of_several_heads(network)
    name = "blocks.0.attn.qkv_conv_bn.0.weight"
    weight = network.get_parameter(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    register_masks(network, [name])
    set_mask(network, name, mask)
    before = weight.detach().clone()
    Compensator([images]).begin_round(network, groups)
    assert torch.equal(network.get_parameter(name), before)


def _space(network: nn.Module, images: Tensor, **options: Any) -> StructuredSpace:
    options = {"kinds": ("qk", "mlp"), **options}
    config = SpaceConfig(criterion="second_order", compensation="ridge", **options)
    return StructuredSpace(config, None, compensator_for(config, [images]))


def _meetings(network: nn.Module, images: Tensor) -> dict[str, Meeting]:
    found = meetings_of(network, _groups(network), images[:1], lambda net, few: net(few))
    with watched_meetings(network, found), torch.no_grad():
        network(images)
    return found


@pytest.mark.parametrize("name", ALL)
def test_what_queries_and_keys_cost_is_the_error_of_their_product(name: str) -> None:
    network, images = lively(ALL[name], 2, trained_statistics=True)
    groups = {group.name: group for group in _groups(network) if group.kind == "qk"}
    meetings = _meetings(network, images)
    assert meetings.keys() == groups.keys()
    with torch.no_grad(), spikes_of(network) as spikes:
        network(images)
    for path, group in groups.items():
        meeting = meetings[path]
        factors = [
            spikes[neuron].flatten(3)[:, :, _channels_of(starts, group.units)] for neuron, starts in meeting.factors
        ]
        values = [getattr(network.get_submodule(neuron), "norm", 1) for neuron, _ in meeting.factors]
        factors = [
            each.unflatten(2, (group.heads, group.units)).double() / value
            for each, value in zip(factors, values, strict=True)
        ]
        order, total = meeting.errors().argsort().tolist(), 0.0
        for count, unit in enumerate(order, start=1):
            total += float(meeting.errors()[unit])
            gone = [each[:, :, :, order[:count]] for each in factors]
            if len(gone) == 2:
                product = gone[0].transpose(-2, -1) @ gone[1]
                wanted = product.square().sum((-2, -1))
            else:
                wanted = gone[0].sum(-2).square().sum(-1)
            assert total == pytest.approx(float(wanted.sum(2).mean()), rel=1e-6, abs=1e-9)


def _channels_of(starts: tuple[int, ...], units: int) -> list[int]:
    return [start + unit for start in starts for unit in range(units)]


@pytest.mark.parametrize("name", ["spikformer", "meta-spikeformer", "e-spikeformer"])
def test_queries_and_keys_are_sorted_and_cut_in_every_round(name: str) -> None:
    network, images = lively(ALL[name], 2, trained_statistics=True)
    space = _space(network, images, kinds=("qk", "mlp"), round_to=1)
    with torch.no_grad():
        wanted = network(images)
    for number in range(2):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            space.prepare(network)
            (target, *_) = [target for target in space.targets(network) if target.kind == "qk"]
            apart = _meetings(network, images)[target.name].products.diagonal(dim1=1, dim2=2)
            scores = space.scores(network, target, None)
            assert len(scores) == target.units
            if number == 0:
                torch.testing.assert_close(network(images), wanted, rtol=1e-9, atol=1e-9)
                assert float(apart[:, -1].sum()) <= float(apart[:, 0].sum())
            space.commit(network, space.removals(network, target, None)(target.units - 1))


@pytest.mark.parametrize("options", [{"ranking": "global"}, {"kinds": ("qk",)}])
def test_queries_and_keys_can_be_compared_and_go_alone(options: dict[str, Any]) -> None:
    network, images = network_of(), _images()
    result = prune(
        network, lambda _: 90.0,
        AdaptivePruningConfig(
            tolerance=5.0, criterion="second_order", compensation="ridge", max_rounds=2, step=0.3, round_to=1,
            **({"kinds": ("qk", "mlp")} | options),
        ),
        input_shape=SHAPE, calibration=[images],
    )  # fmt: skip
    assert any(name.endswith(".qk") for name in result.plan.kept)


@pytest.mark.parametrize("batchnorm", ["keep", "correct"])
def test_a_search_with_divergences_applies_what_it_scored(batchnorm: str) -> None:
    network = network_of()
    holdout = holdout_of(network)
    policy = AllocatedPolicy(curves="divergence", curve_images=6)
    config = PrimeSVTConfig(
        policy=policy, rates=(0.25, 0.5), tolerance=30, min_memory_saving=0.02, batchnorm=batchnorm, **RIDGE
    )
    before = state_of(network)
    result = primesvt(network, holdout, config, calibration=[_images()])
    assert result.met
    assert holdout.full(network) == result.score >= result.baseline_score - 30
    assert {candidate.phase for candidate in result.candidates} == {"policy"}
    assert any(block.curve for block in result.blocks)
    assert all(point.drop >= -1e-6 for block in result.blocks for point in block.curve)
    assert result.config["policy"]["curves"] == "divergence"
    assert not same_state(before, state_of(network))


def test_divergences_need_images() -> None:
    config = PrimeSVTConfig(policy=AllocatedPolicy(curves="divergence"))
    network = network_of()
    with pytest.raises(ValueError, match="curves='divergence' needs calibration="):
        primesvt(network, holdout_of(network), config)
    with pytest.raises(ValueError, match="calibration has no images to compare answers on"):
        primesvt(network, holdout_of(network), config, calibration=[])
    with pytest.raises(ValueError, match="curves='slope'"):
        AllocatedPolicy(curves="slope")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curve_images=0"):
        AllocatedPolicy(curve_images=0)


def test_a_cache_is_about_the_compensation_and_its_images(tmp_path: Path) -> None:
    file, images = tmp_path / "cache", _images()
    network = network_of()
    holdout = holdout_of(network)
    common: dict[str, Any] = {"rates": (0.5,), "tolerance": 30, "min_memory_saving": 0, "kinds": ("mlp",)}

    def search(calibration: list[Tensor], **options: Any) -> None:
        primesvt(network_of(), holdout, prime_config(**common, **options), calibration=calibration,
                 evaluation_cache=file)  # fmt: skip

    search([images], compensation="ridge")
    search(list(images.split(2)), compensation="ridge")  # the same images
    for calibration, method in (([images], "none"), ([images], "bias"), ([-images], "ridge")):
        with pytest.raises(ValueError, match="is about another network"):
            search(calibration, compensation=method)


def test_an_iterator_of_images_is_read_once() -> None:
    config = prime_config(rates=(0.5,), tolerance=30, min_memory_saving=0, kinds=("mlp",), compensation="ridge")
    results = []
    for calibration in (iter([_images()]), [_images()]):
        network = network_of()
        results.append(primesvt(network, holdout_of(network), config, calibration=calibration).applied)
    assert results[0] == results[1]


def test_spikes_are_summed_exactly_in_float32() -> None:
    x = torch.randint(0, 4, (500, 7)).float()
    y = torch.randn(500, 7)
    for rows in (x, y, x * 1e4):
        found, expected = (Moments.empty(7, 1, rows.device) for _ in range(2))
        found.add(rows)
        expected.add(rows.double())
        assert torch.equal(found.xx, expected.xx)
        assert torch.equal(found.x, expected.x)


def test_nothing_is_said_where_every_group_has_a_reader() -> None:
    network = network_of("sdt")
    space = StructuredSpace(config := SpaceConfig(kinds=("mlp", "v", "conv"), criterion="second_order"), None,
                            compensator_for(config, [_images()]))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.prepare(network)
