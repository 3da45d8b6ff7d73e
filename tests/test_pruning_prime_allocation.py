"""PrimeSVT with policy="allocated": the order of the steps is that of a knapsack, and more allowed never saves less."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.prime_cases import (
    ALLOCATED,
    QUICK,
    SHAPE,
    by_zeros,
    holdout_of,
    network_of,
    prime_config,
    same_state,
    state_of,
)
from torch import nn

from swincompress_pl.callbacks import PrimeSVT
from swincompress_pl.pruning import (
    AllocatedPolicy,
    PrimeProgress,
    PrimeSVTConfig,
    PrimeSVTResult,
    PrioritizedPolicy,
    primesvt,
)
from swincompress_pl.pruning.prime.allocation import steps_by_efficiency
from swincompress_pl.pruning.prime.result import CurvePoint

Curves = dict[str, list[CurvePoint]]


@st.composite
def _curves(draw: st.DrawFn) -> Curves:
    found = {}
    for block in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        savings = sorted(draw(st.sets(st.integers(1, 50), min_size=1, max_size=4)))
        drops = [draw(st.integers(1, 20)) for _ in savings]
        found[block] = [
            CurvePoint(rate=number / 10, saving=saving, drop=drop)
            for number, (saving, drop) in enumerate(zip(savings, drops, strict=True), start=1)
        ]
    return found


@given(_curves())
def test_no_other_choice_saves_more_for_what_any_number_of_steps_lose(curves: Curves) -> None:
    steps = steps_by_efficiency(curves)
    assert [step.efficiency for step in steps] == sorted((step.efficiency for step in steps), reverse=True)
    nothing = CurvePoint(rate=0.0, saving=0.0, drop=0.0)
    choices = [
        (sum(point.drop for point in chosen), sum(point.saving for point in chosen))
        for chosen in itertools.product(*([nothing, *curve] for curve in curves.values()))
    ]
    taken = dict.fromkeys(curves, nothing)
    for step in steps:
        point = next(point for point in curves[step.block] if point.rate == step.rate)
        assert point.saving > taken[step.block].saving
        taken[step.block] = point
        lost, saved = (sum(getattr(each, what) for each in taken.values()) for what in ("drop", "saving"))
        assert saved == max(saving for drop, saving in choices if drop <= lost)
    assert all(taken[block].saving == curve[-1].saving for block, curve in curves.items())


def _searched(drop: float, **options: Any) -> PrimeSVTResult:
    network, images = network_of(), torch.randn(*SHAPE)
    config = prime_config(tolerance=drop, min_memory_saving=0, min_block_share=0, **{**ALLOCATED, **options})
    return primesvt(network, by_zeros({"patch_embed": 40.0, "blocks.0": 25.0, "blocks.1": 2.0}, images), config)


@pytest.mark.slow
def test_more_allowed_never_saves_less_and_cheap_layers_go_first() -> None:
    savings = []
    for drop in (1.0, 3.0, 6.0, 12.0, 90.0):
        result = _searched(drop, granularity="filter")
        assert result.baseline_score - result.score <= drop
        rates = {block.name: block.rate for block in result.blocks}
        costly = [rate for name, rate in rates.items() if name.startswith("patch_embed")]
        cheap = [rate for name, rate in rates.items() if name.startswith("blocks.1")]
        assert min(cheap) >= max(costly)
        savings.append(result.saving)
        assert result.saving >= _searched(drop, granularity="filter", **{**QUICK, "blocks": "layer"}).saving
    assert savings == sorted(savings)
    assert savings[-1] > 2 * savings[0] > 0
    assert min(rates.values()) >= 0.3, "90 points buy all; a layer of a few units has no width below that"


def test_a_curve_ends_where_the_block_alone_is_refused_and_what_is_left_of_a_step_is_tried() -> None:
    result = _searched(3.0, granularity="filter")
    alone: dict[str, list[bool]] = {}
    for candidate in result.candidates:
        if candidate.phase == "robustness":
            alone.setdefault(str(candidate.block), []).append(candidate.accepted)
    assert any(not verdicts[-1] for verdicts in alone.values())
    assert all(all(verdicts[:-1]) for verdicts in alone.values())
    measured = {round(rate, 3) for rate in (0.0, 0.1, 0.3, 0.9)}
    assert any(round(block.rate, 3) not in measured for block in result.blocks), "half of a step, or a quarter"
    for block in result.blocks:
        assert (block.robustness is None) == (block.rate < 0.1)
        assert (block.robustness is None) == all(point.rate > block.rate for point in block.curve)
        rates = [point.rate for point in block.curve]
        assert rates == sorted(set(rates) & {0.1, 0.3, 0.9})
        assert all(point.drop <= 3.0 + 1e-9 for point in block.curve)
    assert (result.target_sets, result.initial_rate) == ([], 0.0)
    assert PrimeSVTResult.from_dict(result.to_dict()).blocks == result.blocks


@pytest.mark.parametrize("granularity", ["structured", "filter"])
@pytest.mark.parametrize("blocks", ["layer", "block"])
def test_what_is_applied_holds_on_the_hold_out(granularity: str, blocks: str) -> None:
    network, told = network_of(), list[PrimeProgress]()
    holdout = holdout_of(network)
    config = prime_config(tolerance=30, min_memory_saving=0.02, granularity=granularity, blocks=blocks, **ALLOCATED)
    result = primesvt(network, holdout, config, input_shape=SHAPE, progress=told.append)
    assert result.met
    assert holdout.full(network) == result.score >= result.baseline_score - 30
    gone = 0 if granularity == "filter" else round(result.parameters_before * result.saving)
    assert result.parameters_after == result.parameters_before - gone
    assert [each.candidate for each in told] == result.candidates
    assert all(1 <= each.done <= each.total for each in told)


class KilledError(Exception):
    pass


def test_a_killed_search_goes_on_from_its_memo(tmp_path: Path) -> None:
    config = prime_config(tolerance=30, min_memory_saving=0, **ALLOCATED)
    whole = primesvt(network_of(), holdout_of(network_of()), config)
    seen = 0

    def kill(progress: PrimeProgress) -> None:
        nonlocal seen
        seen += 1
        if seen == len(whole.candidates) * 2 // 3:
            raise KilledError

    with pytest.raises(KilledError):
        primesvt(network_of(), holdout_of(network_of()), config, evaluation_cache=tmp_path / "memo", progress=kill)
    result = primesvt(network_of(), holdout_of(network_of()), config, evaluation_cache=tmp_path / "memo")
    assert result.applied == whole.applied
    assert result.scoring["evaluations"] == whole.scoring["evaluations"] - seen


def test_nothing_is_applied_where_nothing_is_acceptable() -> None:
    network, images = network_of(), torch.randn(*SHAPE)
    before = state_of(network)

    def brittle(tried: nn.Module) -> float:
        tried(images)
        return 90.0 if same_state(before, state_of(tried)) else 10.0

    config = prime_config(min_memory_saving=0.1, **ALLOCATED)
    with pytest.warns(UserWarning, match="within the accuracy: none; within the memory"):
        result = primesvt(network, brittle, config)
    assert (result.applied, result.met, {block.rate for block in result.blocks}) == (None, False, {0.0})
    assert same_state(before, state_of(network))


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"policy": "allocated", "tolerance": 1.5}, 0.2),
        ({"policy": "allocated", "tolerance": 6.0}, 0.4),
        ({"policy": AllocatedPolicy(resolution_points=0.1), "tolerance": 6.0}, 0.1),
        ({"policy": "prioritized", "tolerance": 6.0}, 0.2),
    ],
)
def test_curves_are_measured_as_finely_as_the_constraint_wants(options: dict[str, Any], points: float) -> None:
    assert prime_config(**options).resolution_points()["robustness"] == pytest.approx(points)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "size"},
        {"target_sets": (1.0,)},
        {"theta": 2.0},
        {"increments": (0.08, 0.0)},
        {"frozen": "never"},
        {"benefit_resolution_points": 0.5},
    ],
)
def test_what_only_the_papers_policy_reads_is_a_setting_of_that_policy(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        AllocatedPolicy(**options)
    stored = PrimeSVTConfig(policy=PrioritizedPolicy(**options)).to_dict()["policy"]
    assert (stored["name"], stored[name]) == ("prioritized", list(value) if isinstance(value, tuple) else value)
    for make in (PrimeSVTConfig, PrimeSVT):  # version 0.1 had them beside the policy's name
        with pytest.raises(ValueError, match=f"{name}: not a setting of policy='allocated', but of 'prioritized'"):
            make(**options)
        with pytest.warns(DeprecationWarning, match=rf"\({name}=...\) is the name of version 0.1 .*; use policy="):
            made = make(policy="prioritized", **options)
        config = made.config if isinstance(made, PrimeSVT) else made
        assert config.policy == PrioritizedPolicy(**options)


def test_the_papers_search_is_one_call() -> None:
    paper = PrimeSVTConfig.paper(tolerance=2.0)
    assert isinstance(paper.policy, PrioritizedPolicy)
    found = (paper.granularity, paper.policy.frozen, paper.policy.order, paper.blocks, paper.min_block_share)
    assert found == ("filter", "never", "robustness", "block", 0.0)
    assert paper.tolerance == 2.0
    assert PrimeSVT(config=paper).config is paper


@pytest.mark.filterwarnings("ignore:.*of version 0.1 and will be removed:DeprecationWarning")
def test_the_spelling_of_the_first_version_gives_the_same_config() -> None:
    old: dict[str, Any] = {
        "max_accuracy_drop": 2.0, "mode": "paper", "max_rate": 0.7, "batchnorm": "reestimate", "theta": 2.0,
        "policy": "prioritized", "robustness_resolution_points": None,
    }  # fmt: skip
    policy = PrioritizedPolicy(theta=2.0)
    new = PrimeSVTConfig(tolerance=2.0, granularity="filter", max_sparsity=0.7, batchnorm="correct", policy=policy)
    assert PrimeSVTConfig(**old) == new == PrimeSVT(**old, memo="file").config
    with pytest.raises(TypeError, match="got tolerance and max_accuracy_drop, its former name; give tolerance alone"):
        PrimeSVTConfig(tolerance=1.0, max_accuracy_drop=1.0)  # type: ignore[call-arg]


def test_policies_are_named() -> None:
    with pytest.raises(ValueError, match="policy='best': it has to be one of allocated, prioritized"):
        prime_config(policy="best")  # type: ignore[arg-type]
    assert (PrimeSVT().config.policy, PrimeSVT().config.blocks) == (AllocatedPolicy(), "layer")


@pytest.mark.filterwarnings("ignore:.*cannot resolve a tolerance", "ignore:PrimeSVT. no candidate")
def test_an_audit_has_candidates_that_save_less() -> None:
    tried = {}
    for audit in (0.0, 0.4):
        network = network_of()
        config = prime_config(tolerance=40.0, min_memory_saving=0.0, min_block_share=0.0, audit=audit, **ALLOCATED)
        found = primesvt(network, holdout_of(network), config).candidates
        tried[audit] = [each.saving for each in found if each.phase == "policy" and each.accepted]
    assert len(set(tried[0.4])) > len(set(tried[0.0]))
