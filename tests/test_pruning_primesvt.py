"""PrimeSVT: what it applies holds, its phases do what the paper says, and a killed search goes on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.prime_cases import (
    ALLOCATED,
    PAPERS,
    QUICK,
    SHAPE,
    by_zeros,
    holdout_of,
    network_of,
    prime_config,
    same_state,
    state_of,
)
from support.rank_cases import on_ranks
from support.spiking_cases import ALL, FAMILIES, SIZE_PX
from torch import Tensor, nn

from swincompress_pl.models import create_model
from swincompress_pl.models.spiking.memory import without_memory
from swincompress_pl.pruning import (
    HoldOut,
    PrimeProgress,
    PrimeSVTConfig,
    PrimeSVTResult,
    apply_plan,
    count_macs,
    primesvt,
)
from swincompress_pl.pruning.prime.result import BlockState, Candidate
from swincompress_pl.pruning.structure.change import revert
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, register_masks
from swincompress_pl.registry import adapter_for


@pytest.mark.parametrize("granularity", ["structured", "filter"])
@pytest.mark.parametrize(
    "name",
    [
        "spikformer",
        "qkformer",
        "e-spikeformer",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdt", "maxformer", "meta-spikeformer")),
    ],
)
def test_what_is_applied_holds_on_every_family(name: str, granularity: str) -> None:
    network = network_of(name)
    holdout, before = holdout_of(network), sum(p.numel() for p in network.parameters())
    config = prime_config(tolerance=30, min_memory_saving=0.02, granularity=granularity, **QUICK)
    result = primesvt(network, holdout, config, input_shape=SHAPE)
    assert result.baseline_score == 100
    assert result.applied is not None
    assert result.met
    assert result.applied == result.within_accuracy == result.within_memory
    assert result.score == holdout.full(network) >= 70
    assert result.saving >= 0.02
    parameters = sum(p.numel() for p in network.parameters())
    assert (result.parameters_before, result.parameters_after) == (before, parameters)
    assert result.macs_after == count_macs(network, SHAPE)
    if granularity == "structured":
        assert parameters == pytest.approx(before * (1 - result.saving))
        assert not masked_parameters(network)
        assert result.macs_before is not None
        assert result.macs_after < result.macs_before
        fresh = ALL[name]().float()
        apply_plan(fresh, result.plan)
        fresh.load_state_dict(network.state_dict())
    else:
        zeros = sum(int((~mask).sum()) for _, mask in masked_parameters(network).values())
        assert zeros == pytest.approx(before * result.saving)
        for weight, mask in masked_parameters(network).values():
            assert not bool(weight[~mask].any())
            assert len(set(mask.flatten(1).sum(1).tolist())) == 1, "every filter keeps as much"
    assert result.macs_before == count_macs(ALL[name]().float(), SHAPE)
    revert(network, result.change)
    assert sum(int(p.count_nonzero()) for p in network.parameters()) == before
    assert holdout.full(network) == 100


@pytest.mark.parametrize("granularity", ["structured", pytest.param("filter", marks=pytest.mark.slow)])
def test_few_images_and_cached_activations_decide_as_all_images_do(granularity: str) -> None:
    results = []
    for options in ({"confidence": 1.0, "cache_size_bytes": 0}, {"confidence": 0.99}):
        network = network_of("qkformer")
        config = prime_config(
            tolerance=30,
            min_memory_saving=0.0,
            granularity=granularity,
            benefit_resolution_points=1e-6,
            robustness_resolution_points=1e-6,
            **QUICK,
        )
        results.append(primesvt(network, holdout_of(network, 60, **options), config))
    exact, sampled = results
    assert [(c.label, c.widths, c.saving, c.accepted) for c in exact.candidates] == [
        (c.label, c.widths, c.saving, c.accepted) for c in sampled.candidates
    ]
    assert exact.applied is not None
    assert sampled.applied is not None
    assert (exact.applied.widths, exact.score) == (sampled.applied.widths, sampled.score)
    assert exact.blocks == sampled.blocks
    assert sampled.scoring["image_forwards"] < exact.scoring["image_forwards"]
    assert exact.scoring["image_forwards"] == exact.scoring["images_scored"]


def _policy(result: PrimeSVTResult) -> list[Candidate]:
    return [candidate for candidate in result.candidates if candidate.phase == "policy"]


@pytest.fixture(scope="module")
def replay() -> tuple[PrimeSVTConfig, PrimeSVTResult]:
    """A search under a known law: the second block is nearly free, the first is dear, the stem dearer."""
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    config = prime_config(
        tolerance=4.0,
        granularity="filter",
        rates=(0.02, 0.08, 0.16, 0.5),
        increments=(0.08, 0.04, 0.02, 0.01),
        theta=2,
        min_memory_saving=0.05,
        **PAPERS,
    )
    costs = {"patch_embed": 30.0, "blocks.0": 15.0, "blocks.1": 3.0}
    return config, primesvt(network, by_zeros(costs, images), config)


def test_the_target_set_is_that_of_the_highest_benefit(replay: tuple[PrimeSVTConfig, PrimeSVTResult]) -> None:
    config, result = replay
    tried = [c for c in result.candidates if c.phase == "target set"]
    assert len(tried) == len(config.policy.target_sets) * len(config.rates)
    groups = [tried[start : start + 4] for start in range(0, len(tried), 4)]
    for account, group in zip(result.target_sets, groups, strict=True):
        accepted = [c for c in group if c.accepted]
        assert account.accepted_rates == tuple(rate for rate, c in zip(config.rates, group, strict=True) if c.accepted)
        benefit = math.fsum(c.score + 100 * c.saving for c in accepted) / len(accepted)
        assert account.benefit == pytest.approx(benefit)
        assert all(c.score >= 86 - 1e-9 for c in accepted)
        assert all(c.score < 86 for c in group if not c.accepted)
    best = max(result.target_sets, key=lambda account: account.benefit or 0)
    assert result.initial_rate == best.accepted_rates[-1]
    assert sum(len(block.layers) for block in result.blocks) == best.layers
    assert [account.layers for account in result.target_sets] == [12, 12, 11, 11, 10, 9, 9]


def test_blocks_are_raised_by_their_robustness(replay: tuple[PrimeSVTConfig, PrimeSVTResult]) -> None:
    config, result = replay
    etas = [block.robustness for block in result.blocks]
    assert etas == sorted(etas, reverse=True, key=lambda eta: eta or 0)
    assert result.blocks[0].name == "blocks.1"
    measured = {c.block: c for c in result.candidates if c.phase == "robustness"}
    for block in result.blocks:
        found = measured[block.name]
        assert block.robustness == pytest.approx(100 * found.saving / (90 - found.score + 0.001))
        assert block.band == min(int((etas[0] - block.robustness) / config.policy.theta), 3)  # type: ignore[operator]
    policy = _policy(result)
    together = [c for c in policy if c.block is None]
    assert policy[: len(together)] == together, "all at once until that is refused, then one after the other"
    assert [c.accepted for c in together] == [True] * (len(together) - 1) + [False]
    assert [c.stands_for for c in together] == [3] * (len(together) - 1) + [0]
    assert policy[len(together)].block == "blocks.1"
    assert all(c.accepted == (c.score >= 86 - 1e-9) for c in policy)
    savings = [c.saving for c in policy if c.accepted]
    assert savings == sorted(savings)
    assert result.applied is not None
    assert result.applied.saving == max(c.saving for c in result.candidates if c.accepted)


def test_no_block_can_be_raised_further(replay: tuple[PrimeSVTConfig, PrimeSVTResult]) -> None:
    config, result = replay
    refused: dict[str, list[float]] = {}
    for c in _policy(result):
        if not c.accepted and c.block is not None:
            assert c.rate is not None
            refused.setdefault(c.block, []).append(c.rate)
    for block in result.blocks:
        at_the_end = block.rate >= config.max_sparsity - 1e-9
        assert at_the_end or min(refused[block.name]) <= block.rate + 0.01 + 1e-9, block


@pytest.mark.parametrize("frozen", ["last", "never"])
def test_frozen_blocks_are_raised_when_no_other_gains_or_never(frozen: str) -> None:
    """The first is nearly free, and so by far the most robust: the paper freezes all others."""
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    config = prime_config(
        tolerance=4.0, granularity="filter", rates=(0.02, 0.08), theta=0.01, min_memory_saving=0.05, frozen=frozen,
        max_sparsity=0.5, **PAPERS,
    )  # fmt: skip
    result = primesvt(network, by_zeros({"patch_embed": 20.0, "blocks.0": 15.0, "blocks.1": 0.01}, images), config)
    rates = {block.name: block.rate for block in result.blocks}
    assert rates["blocks.1"] == config.max_sparsity
    alone = [c.block for c in _policy(result) if c.block is not None]
    if frozen == "never":
        assert {rate for name, rate in rates.items() if name != "blocks.1"} == {result.initial_rate}
        assert not alone or set(alone) == {"blocks.1"}
        assert [block.band for block in result.blocks] == [0] + [4] * (len(rates) - 1)
        return
    assert all(rate > result.initial_rate for rate in rates.values())
    second = result.blocks[1]
    assert second.band == 0, "banded among themselves: the best of the rest has the largest increment"
    smallest = min(step for step in config.policy.increments if step)
    refused = {(c.block, round(c.rate or 0, 9)) for c in _policy(result) if not c.accepted}
    for block in result.blocks[1:]:
        assert (block.name, round(block.rate + smallest, 9)) in refused


def test_by_size_the_largest_block_comes_first_and_robustness_is_not_measured() -> None:
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    config = prime_config(tolerance=4.0, granularity="filter", order="size", **{**QUICK, "rates": (0.1,)})
    result = primesvt(network, by_zeros({"blocks.0": 15.0}, images), config)
    sizes = [block.parameters_part for block in result.blocks]
    assert sizes == sorted(sizes, reverse=True)
    assert not any(c.phase == "robustness" for c in result.candidates)
    assert all((block.robustness, block.band) == (None, 0) for block in result.blocks)
    alone = [c.block for c in _policy(result) if c.block is not None]
    assert alone[0] == result.blocks[0].name


def test_small_blocks_stay_at_the_initial_rate() -> None:
    images = torch.randn(1, 3, SIZE_PX, SIZE_PX)
    raised = {}
    for share in (0.0, 0.99):
        network = network_of()
        config = prime_config(
            tolerance=4.0,
            min_memory_saving=0,
            granularity="filter",
            min_block_share=share,
            **{**QUICK, "rates": (0.1,)},
        )
        result = primesvt(network, by_zeros({"blocks.0": 1.0}, images), config)
        mean = sum(block.parameters_part for block in result.blocks) / len(result.blocks)
        for block in result.blocks:
            assert block.rate == result.initial_rate or block.parameters_part >= share * mean, block
        raised[share] = {block.name for block in result.blocks if block.rate > result.initial_rate}
    assert raised[0.99] < raised[0.0] == {block.name for block in result.blocks}


def test_a_block_can_be_a_single_layer() -> None:
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    config = prime_config(tolerance=4.0, min_memory_saving=0, **{**QUICK, "blocks": "layer"})
    result = primesvt(network, by_zeros({"blocks.0": 15.0}, images), config)
    assert all(block.layers == (block.name,) for block in result.blocks)
    assert len(result.blocks) == max(account.layers for account in result.target_sets)
    kinds = {g.name: g.kind for g in adapter_for(network).groups(network)}
    assert {kinds[block.name] for block in result.blocks} == {"conv", "qk", "v", "mlp"}


@pytest.mark.parametrize("prefer", ["accuracy", "memory"])
def test_both_alternatives_are_reported_where_both_constraints_cannot_be_met(prefer: str) -> None:
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    evaluate = by_zeros({"patch_embed": 15.0, "blocks.0": 15.0, "blocks.1": 15.0}, images)
    config = prime_config(tolerance=5.0, min_memory_saving=0.2, granularity="filter", prefer=prefer, **QUICK)
    with pytest.warns(UserWarning, match="PrimeSVT: no candidate keeps both constraints, at most 5 points lost and at"):
        result = primesvt(network, evaluate, config)
    accuracy, memory = result.within_accuracy, result.within_memory
    assert not result.met
    assert accuracy is not None
    assert memory is not None
    assert accuracy.saving < 0.2 <= memory.saving
    assert memory.score < 85 <= accuracy.score
    assert result.applied == (accuracy if prefer == "accuracy" else memory)
    assert result.score == evaluate(network)
    assert f"{memory.saving:.2%} of the parameters saved at {memory.score:.2f} points" in result.summary()
    assert result.summary().endswith(f"; applied: within the {prefer}")


@pytest.mark.parametrize("options", [QUICK, ALLOCATED], ids=["prioritized", "allocated"])
@pytest.mark.parametrize("least", [0.3, 0.45])
def test_enough_is_saved_at_the_least_loss_where_that_is_preferred(options: dict[str, Any], least: float) -> None:
    """Both policies stop at the accuracy, long before this saving."""
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    evaluate = by_zeros({"patch_embed": 100.0, "blocks.0": 90.0, "blocks.1": 80.0}, images)
    config = prime_config(tolerance=0.5, min_memory_saving=least, prefer="memory", granularity="filter", **options)
    before = sum(parameter.numel() for parameter in network.parameters())
    with pytest.warns(UserWarning, match="no candidate keeps both constraints"):
        result = primesvt(network, evaluate, config)
    memory = result.within_memory
    assert memory is not None
    assert result.applied == memory
    assert least <= memory.saving < least + 0.1, "and not much more"
    assert memory.score == evaluate(network) < evaluate(network_of()) - 0.5
    assert (1 - least) * before >= sum(int(parameter.count_nonzero()) for parameter in network.parameters())
    assert memory.score == max(each.score for each in result.candidates if each.saving >= least)


def test_nothing_is_applied_where_nothing_is_acceptable() -> None:
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    before = state_of(network)

    def brittle(tried: nn.Module) -> float:
        tried(images)
        return 90.0 if same_state(before, state_of(tried)) else 10.0

    found = "within the accuracy: none; within the memory: .* at 10.00 points"
    with pytest.warns(UserWarning, match=f"{found}.*; nothing is pruned, as prefer='accuracy' found none"):
        result = primesvt(network, brittle, prime_config(min_memory_saving=0.1, **QUICK))
    assert (result.applied, result.within_accuracy, result.initial_rate, result.blocks) == (None, None, 0.0, [])
    assert (result.score, result.saving, result.met) == (90.0, 0.0, False)
    assert same_state(before, state_of(network))


def test_the_summary_says_which_alternative_found_none() -> None:
    network = network_of()
    result = primesvt(network, holdout_of(network), prime_config(tolerance=30, min_memory_saving=0.0, **QUICK))
    assert "applied" not in result.summary()  # both constraints are met
    config = {**result.config, "prefer": "memory"}
    nothing = replace(result, met=False, applied=None, within_memory=None, config=config)
    assert nothing.summary().endswith("within the memory: none; nothing is pruned, as prefer='memory' found none")
    stored = {**nothing.to_dict(), "config": {**config, "prefer": "speed"}}
    with pytest.raises(ValueError, match="prefer='speed': it has to be one of accuracy, memory"):
        PrimeSVTResult.from_dict(stored)


class KilledError(Exception):
    pass


def _kill(progress: PrimeProgress) -> None:
    raise KilledError


@pytest.mark.slow
def test_a_killed_search_goes_on_from_its_memo(tmp_path: Path) -> None:
    config = prime_config(tolerance=30, min_memory_saving=0.0, **QUICK)
    network = network_of()
    whole = primesvt(network, holdout_of(network_of()), config)
    killed_after = len(whole.candidates) * 2 // 3

    def kill(progress: PrimeProgress) -> None:
        nonlocal killed_after
        killed_after -= 1
        if killed_after == 0:
            raise KilledError

    memo, network = tmp_path / "new" / "memo.jsonl", network_of()
    before = state_of(network)
    with pytest.raises(KilledError):
        primesvt(network, holdout_of(network), config, evaluation_cache=memo, progress=kill)
    assert same_state(before, state_of(network))
    with memo.open("a", encoding="utf-8") as file:
        file.write('{"widths": {"half a li')  # as a kill in the middle of a write leaves it
    kept = len(memo.read_text(encoding="utf-8").splitlines()) - 2
    again = primesvt(network, holdout_of(network), config, evaluation_cache=memo)
    assert [(c.label, c.accepted) for c in again.candidates] == [(c.label, c.accepted) for c in whole.candidates]
    assert again.applied is not None
    assert whole.applied is not None
    assert (again.applied.widths, again.score) == (whole.applied.widths, whole.score)
    assert again.scoring["evaluations"] == whole.scoring["evaluations"] - kept > 0
    third = network_of()
    assert primesvt(third, holdout_of(third), config, evaluation_cache=memo).scoring["evaluations"] == 0


def test_a_memo_about_something_else_or_damaged_is_refused(tmp_path: Path) -> None:
    memo, network = tmp_path / "memo.jsonl", network_of()
    config = prime_config(tolerance=30, min_memory_saving=0.0, **{**QUICK, "rates": (0.1,)})
    primesvt(network, holdout_of(network_of()), config, evaluation_cache=memo)
    text = memo.read_text(encoding="utf-8")
    other = network_of(seed=6)
    with pytest.raises(ValueError, match=r"memo\.jsonl' is about another network, hold-out or constraint"):
        primesvt(other, holdout_of(other), config, evaluation_cache=memo)
    stricter = prime_config(tolerance=5, min_memory_saving=0.0, **QUICK)
    network = network_of()
    with pytest.raises(ValueError, match="about another network, hold-out or constraint"):
        primesvt(network, holdout_of(network), stricter, evaluation_cache=memo)
    images = torch.zeros(60, 3, SIZE_PX, SIZE_PX)
    with pytest.raises(ValueError, match="about another network, hold-out or constraint"):
        primesvt(network, HoldOut(torch.randn_like(images), torch.arange(60) % 5), config, evaluation_cache=memo)
    lines = text.splitlines(keepends=True)
    for damaged, message in (
        ("nonsense\n", "is no evaluation cache"),
        (lines[0] + "{}\n", "is damaged: line 2"),
        (lines[0] + "[1]\n", "is damaged: line 2"),
        ("\n" + text, "is no evaluation cache"),
    ):
        memo.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"memo\.jsonl' {message}"):
            primesvt(network, holdout_of(network), config, evaluation_cache=memo)
        assert memo.read_text(encoding="utf-8") == damaged


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["structured", "filter"])
def test_whatever_fails_leaves_the_network_as_it_was(granularity: str) -> None:
    network, images = network_of(), torch.randn(1, 3, SIZE_PX, SIZE_PX)
    law = by_zeros({"blocks.0": 15.0}, images)
    calls: list[float] = []

    def counted(tried: nn.Module) -> float:
        calls.append(law(tried))
        return calls[-1]

    config = prime_config(tolerance=4.0, min_memory_saving=0, granularity=granularity, **QUICK)
    primesvt(copy.deepcopy(network), counted, config)
    before, modes = state_of(network), [module.training for module in network.modules()]
    for last in (1, 2, len(calls) // 2, len(calls)):
        left = last

        def failing(tried: nn.Module) -> float:
            nonlocal left
            left -= 1
            if left == 0:
                raise KilledError
            return law(tried)

        with pytest.raises(KilledError):
            primesvt(network, failing, config)
        assert same_state(before, state_of(network))
        assert [module.training for module in network.modules()] == modes
        assert all(p.requires_grad for p in network.parameters())


def test_statistics_are_corrected_by_what_pruning_changes() -> None:
    network, unpruned = network_of(), network_of()
    calibration = [torch.randn(8, 3, SIZE_PX, SIZE_PX) for _ in range(2)]
    config = prime_config(tolerance=90, min_memory_saving=0, batchnorm="correct", granularity="filter", **QUICK)
    trained = state_of(network)
    assert primesvt(network, holdout_of(network), config, calibration=calibration).saving > 0
    found, pruned = state_of(network), copy.deepcopy(network)
    torch.optim.swa_utils.update_bn(calibration, pruned)
    torch.optim.swa_utils.update_bn(calibration, unpruned)
    after, before = pruned.state_dict(), unpruned.state_dict()
    changed = 0
    for name, statistics in trained.items():
        if name.endswith("running_mean"):
            torch.testing.assert_close(found[name], statistics + after[name] - before[name])
        elif name.endswith("running_var"):
            torch.testing.assert_close(found[name], statistics * (after[name] + 1e-5) / (before[name] + 1e-5))
        elif name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], statistics)
        else:
            continue
        changed += not torch.equal(found[name], statistics)
    assert changed


@pytest.mark.parametrize("options", [{"batchnorm": "correct"}, {"compensation": "ridge"}])
def test_calibration_images_with_nan_are_refused(options: dict[str, str]) -> None:
    """No layer behind a neuron would show them."""
    network, images = network_of(), torch.randn(8, 3, SIZE_PX, SIZE_PX)
    before, config = state_of(network), prime_config(tolerance=90, min_memory_saving=0, **options, **QUICK)
    calibration = [(images, None), (images.index_fill(0, torch.tensor(5), float("nan")), None)]
    with pytest.raises(ValueError, match="image 5 of batch 1 of calibration holds NaN or infinite pixels"):
        primesvt(network, holdout_of(network), config, calibration=calibration)
    assert same_state(before, state_of(network))


def test_corrected_statistics_belong_to_the_candidate() -> None:
    network = network_of()
    holdout, calibration = holdout_of(network), [torch.randn(8, 3, SIZE_PX, SIZE_PX) for _ in range(2)]
    before = state_of(network)
    config = prime_config(tolerance=90, min_memory_saving=0, batchnorm="correct", **QUICK)
    result = primesvt(network, holdout, config, calibration=calibration)
    assert result.scoring["batchnorm_passes"] > result.scoring["evaluations"]
    assert result.applied is not None
    assert result.score == holdout.full(network)
    revert(network, result.change)
    kept = {name for name in before if "running" not in name and "num_batches" not in name}
    assert all(torch.equal(before[name], network.state_dict()[name]) for name in kept)
    # candidates that were only tried left no trace
    network = network_of()
    with pytest.raises(KilledError):
        primesvt(network, holdout, config, calibration=calibration, progress=_kill)
    assert same_state(before, state_of(network))
    with pytest.raises(ValueError, match="batchnorm='correct' needs calibration=: batches of training images"):
        primesvt(network, holdout, config)
    with pytest.raises(ValueError, match="calibration is an iterator, which ends after the first candidate"):
        primesvt(network, holdout, config, calibration=iter(calibration))


def test_a_memo_knows_a_criterion_by_what_it_gives(tmp_path: Path) -> None:
    def reversed_criterion(name: str, weight: Tensor, gradients: object) -> Tensor:
        return 1 / (1e-3 + weight.double().abs())

    reversed_criterion.__qualname__ = own_criterion.__qualname__
    options: dict[str, Any] = {"tolerance": 30, "min_memory_saving": 0.0, **QUICK, "rates": (0.1,)}
    network, memo = network_of(), tmp_path / "memo.jsonl"
    primesvt(network, holdout_of(network_of()), prime_config(criterion=own_criterion, **options), evaluation_cache=memo)
    network = network_of()
    with pytest.raises(ValueError, match="about another network, hold-out or constraint"):
        primesvt(
            network, holdout_of(network), prime_config(criterion=reversed_criterion, **options), evaluation_cache=memo
        )


def test_the_result_is_plain_data() -> None:
    network = network_of()
    config = prime_config(tolerance=30, min_memory_saving=0.0, criterion=own_criterion, **QUICK)
    result = primesvt(network, holdout_of(network), config)
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["config"]["criterion"] == "own_criterion"
    again = PrimeSVTResult.from_dict(stored)
    assert again.to_dict() == result.to_dict()
    assert isinstance(again.blocks[0], BlockState)
    assert again.summary() == result.summary()
    assert 0 < min(result.spike_rates.values()) <= max(result.spike_rates.values()) <= 1
    with pytest.raises(ValueError, match="a PrimeSVT result of version 2 is expected, not 7"):
        PrimeSVTResult.from_dict({**stored, "version": 7})


def own_criterion(name: str, weight: Tensor, gradients: object) -> Tensor:
    return weight.double().abs()


def test_progress_tells_how_long_it_may_take() -> None:
    network, told = network_of(), list[PrimeProgress]()
    config = prime_config(tolerance=30, min_memory_saving=0.0, **QUICK)
    result = primesvt(network, holdout_of(network), config, progress=told.append)
    assert [p.candidate for p in told] == result.candidates
    assert [p.phase for p in told] == sorted((p.phase for p in told), key=["target set", "robustness", "policy"].index)
    assert all(p.place() == (f"PrimeSVT: {p.phase}", p.done, p.total) and 1 <= p.done <= p.total for p in told)
    assert all(p.left_s is None or p.left_s >= 0 for p in told)
    assert [p.done for p in told if p.phase == "target set"] == [1, 2, 3, 4]


def test_networks_that_do_not_spike_are_refused() -> None:
    vit = create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    with pytest.raises(
        ValueError, match=r"VisionTransformer: a .* is not a spiking network; PrimeSVT prunes spiking ones"
    ):
        primesvt(vit, HoldOut(images, labels))
    single = network_of()
    for module in single.modules():
        if hasattr(module, "step_mode"):
            module.step_mode = "s"
    with pytest.raises(ValueError, match=r"is in single-step mode; use functional.set_step_mode\(network, 'm'\)"):
        primesvt(single, HoldOut(images, labels))
    keeps = FAMILIES["spikformer"]()
    with pytest.raises(ValueError, match="Spikformer: keeps its membrane potentials from one call to the next"):
        primesvt(keeps, HoldOut(images, labels))


def test_a_silent_network_is_refused() -> None:
    network = without_memory(FAMILIES["spikformer"]()).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(module.bias, -1.0)
            nn.init.zeros_(module.weight)
    before = state_of(network)
    with pytest.raises(ValueError, match=r"Spikformer: none of its neurons behind patch_embed spikes on the"):
        primesvt(network, HoldOut(torch.randn(4, 3, 32, 32), torch.arange(4)))
    assert same_state(before, state_of(network))


def test_an_evaluation_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluate gave 90 points without a pass through the network"):
        primesvt(network_of(), lambda _: 90.0)


def test_silent_neurons_are_named() -> None:
    network = network_of()
    nn.init.zeros_(network.get_submodule("blocks.1.mlp.fc2.1").weight)  # type: ignore[arg-type]
    nn.init.constant_(network.get_submodule("blocks.1.mlp.fc2.1").bias, -1.0)  # type: ignore[arg-type]
    config = prime_config(tolerance=30, min_memory_saving=0, **{**QUICK, "rates": (0.1,)})
    with pytest.warns(UserWarning, match=r"1 of \d+ neurons never spike on the hold-out \(blocks.1.mlp.neuron2\)"):
        result = primesvt(network, holdout_of(network), config)
    assert result.spike_rates["blocks.1.mlp.neuron2"] == 0


def test_what_cannot_be_saved_is_refused_before_anything_is_tried() -> None:
    network = network_of()
    config = prime_config(min_memory_saving=0.6, layers=("blocks.0.*",), round_to=1)
    with pytest.raises(ValueError, match=r"min_memory_saving=0.6 cannot be met: all 3 layers at max_sparsity=0.9 save"):
        primesvt(network, holdout_of(network), config)
    with pytest.raises(ValueError, match=r"layers: 'stage9\.\*' matches nothing that can be pruned"):
        primesvt(network, holdout_of(network), prime_config(layers="stage9.*"))
    with pytest.raises(ValueError, match="Spikformer has no group of kind 'head_dim'"):
        primesvt(network, holdout_of(network), prime_config(kinds=("head_dim",)))
    with pytest.raises(ValueError, match="criterion='taylor' needs gradients"):
        primesvt(network, holdout_of(network), prime_config(criterion="taylor"))
    masked = network_of()
    register_masks(masked, ["blocks.0.mlp.fc1.0.weight"])
    with pytest.raises(ValueError, match="granularity='filter': Spikformer has masked weights already"):
        primesvt(masked, holdout_of(masked), prime_config(granularity="filter"))
    with pytest.raises(ValueError, match="the hold-out is empty"):
        primesvt(network, HoldOut(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0}, "tolerance=0: it has to be in points, above 0"),
        ({"min_memory_saving": 25}, "min_memory_saving=25: it has to be a part, 0 to below 1"),
        ({"min_memory_saving": 0.95}, "min_memory_saving=0.95 contradicts max_sparsity=0.9"),
        ({"granularity": "weight"}, "granularity='weight': it has to be one of structured, filter"),
        ({"order": "random"}, "order='random': it has to be one of robustness, size"),
        ({"rates": ()}, r"rates=\(\): it has to be above 0 and at most max_sparsity=0.9"),
        ({"rates": (0.5, 0.95)}, "rates=.*at most max_sparsity=0.9"),
        ({"target_sets": (1.5,)}, r"target_sets=\(1.5,\): it has to be parts"),
        ({"increments": (0.1, 0.2)}, "increments=.*it has to be falling"),
        ({"frozen": "always"}, "frozen='always': it has to be one of last, never"),
        ({"min_block_share": 1}, "min_block_share=1: it has to be a part of an average block"),
        ({"theta": 0}, "theta=0: it has to be above 0"),
        ({"max_sparsity": 1.0}, "max_sparsity=1.0: it has to be above 0 and below 1"),
        ({"round_to": 0}, "round_to=0: it has to be an integer of 1 or more"),
        ({"criterion": "largest"}, "criterion='largest': it has to be one of magnitude"),
        ({"batchnorm": "fold"}, "batchnorm='fold': it has to be one of keep, correct"),
        ({"granularity": "filter", "kinds": ("mlp",)}, r"kinds=\('mlp',\): granularity='filter' prunes filters"),
        ({"benefit_resolution_points": 0}, "benefit_resolution_points=0: it has to be above 0"),
        ({"robustness_resolution_points": 0.0}, "robustness_resolution_points=0.0: it has to be above 0, e.g. 0.2"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prime_config(**options)


def _search_on_ranks(store: Path | None, rank: int) -> list[tuple[str, bool, float]]:
    if store is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = network_of()
    config = prime_config(tolerance=30, min_memory_saving=0.0, **{**QUICK, "rates": (0.1,)})
    result = primesvt(network, holdout_of(network), config)
    weights = sum(float(p.detach().double().abs().sum()) for p in network.parameters())
    return [*((c.label, c.accepted, c.saving) for c in result.candidates), ("weights", result.met, weights)]


def test_ranks_decide_together(tmp_path: Path) -> None:
    alone = _search_on_ranks(None, 0)
    for found in on_ranks(tmp_path, 2, lambda rank: _search_on_ranks(tmp_path / "store", rank)):
        assert found == alone
