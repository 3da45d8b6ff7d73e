"""An audit decides only at the end of a round, its bounds hold, and a search goes on with the one it began with."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prime_cases import holdout_of, network_of, prime_config
from support.rank_cases import on_ranks
from timm.models import VisionTransformer
from torch import Tensor, nn

from swincompress_pl.pruning import (
    AdaptivePruningConfig,
    HoldOut,
    PrimeSVTConfig,
    PrimeSVTResult,
    SearchSession,
    SearchState,
    primesvt,
    prune,
)
from swincompress_pl.pruning.evaluation.audit import ERROR, Audit, error_of_look, images_needed, loss_bound

PART = 0.4
COARSE = "cannot resolve a tolerance"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{COARSE}", "ignore:.*neurons never spike")


def _network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3)


def _left(network: nn.Module) -> float:
    """The part of the weights of the two MLPs that is not 0; 1 before pruning."""
    weights = [p for name, p in network.named_parameters() if "mlp.fc2.weight" in name]
    return sum(int(p.count_nonzero()) for p in weights) / (2 * 32 * 128)


class Fitted:
    """Right on all images that decide, and on the part of the images of the audit that the weights' part allows.

    An image holds the part from which on it is right; 0 for always.
    """

    fingerprint = "fitted"

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, network: nn.Module, images: Tensor) -> Tensor:
        network(torch.zeros(1, 3, 16, 16))  # so that spikes are counted
        right = images[:, 0] <= self.left(network) + 1e-6
        label = images[:, 1].long()
        return nn.functional.one_hot(torch.where(right, label, (label + 1) % 3), 3).float()

    def left(self, network: nn.Module) -> float:
        return _left(network)


def _fitted(count: int = 300, seed: int = 0, part: float = PART, kind: type[Fitted] = Fitted) -> HoldOut:
    labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    images = torch.stack([torch.zeros(count), labels.float()], dim=1)
    holdout = HoldOut(images, labels, predict=kind(labels), batch_size=20)
    _, auditing = holdout.split(part)
    images[auditing._rows, 0] = torch.linspace(0, 1, auditing.images)  # the parts do not depend on the images
    return holdout


# The bound.


@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0, 1), st.floats(0.5, 0.9999))
def test_the_bound_is_above_the_loss_and_grows_with_the_confidence(
    images: int, discordant: float, before: float, confidence: float
) -> None:
    changed = int(discordant * images)
    only_before = int(before * changed)
    only_after = changed - only_before
    bound = loss_bound(only_before, only_after, images, confidence)
    assert 100 * (only_before - only_after) / images - 1e-9 <= bound <= 100
    assert bound <= loss_bound(only_before, only_after, images, (1 + confidence) / 2) + 1e-9


@given(st.integers(1, 60), st.integers(0, 60), st.sampled_from([0.9, 0.95, 0.999]))
def test_the_bound_inverts_the_binomial_tail(images: int, lost: int, confidence: float) -> None:
    lost = min(lost, images - 1)
    p = loss_bound(lost, 0, images, confidence) / 100
    tail = sum(math.comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(lost + 1))
    assert tail == pytest.approx((1 - confidence) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "q", "images"), [(0.01, 0.0, 100), (0.05, 0.02, 200), (0.2, 0.19, 50), (0.001, 0.001, 1000), (0.6, 0.1, 30)]
)
def test_the_bound_covers(p: float, q: float, images: int) -> None:
    rng, confidence = np.random.default_rng(0), 0.9
    counts = rng.multinomial(images, [p, q, 1 - p - q], size=1500)
    found: dict[tuple[int, int], float] = {}
    for before, after, _ in counts.tolist():
        found[before, after] = loss_bound(before, after, images, confidence)
    missed = np.mean([found[b, a] < 100 * (p - q) - 1e-9 for b, a, _ in counts.tolist()])
    assert missed <= 1 - confidence


def test_the_errors_of_all_networks_that_a_search_can_come_to_add_up() -> None:
    assert error_of_look(1, 0) == pytest.approx(ERROR * 6 / math.pi**2)
    total = sum(math.comb(look - 1, k) * error_of_look(look, k) for look in range(1, 200) for k in range(look))
    assert 0.99 * ERROR < total <= ERROR


def test_the_bounds_of_a_search_that_gives_back_what_fails_hold_together() -> None:
    """Each look is at another network on the same images, and the search keeps whatever happens to hold."""
    rng, images, rates, wrong = np.random.default_rng(1), 300, [0.02, 0.03, 0.04, 0.06], 0
    for _ in range(300):
        uniform, failed, missed = rng.random(images), 0, False
        for look in range(1, 13):
            rate = rates[look % len(rates)]
            own = rng.random(images)  # another network errs on other images
            lost = int((np.where(uniform < 0.5, uniform * 2, own) < rate).sum())
            bound = loss_bound(lost, 0, images, 1 - error_of_look(look, failed))
            missed |= bound < 100 * rate
            failed += 100 * lost / images > 3
        wrong += missed
    assert wrong / 300 <= ERROR


@given(st.integers(10, 400), st.floats(0, 0.3), st.floats(0.1, 5))
@settings(max_examples=40)
def test_as_many_images_as_needed_resolve_the_tolerance(images: int, rate: float, tolerance: float) -> None:
    audit = _audit(images=images, only_before=int(rate * images), tolerance=tolerance)
    needed = images_needed(audit)
    lost = 100 * audit.only_before / images
    scaled = audit.only_before * needed / images
    assert loss_bound(scaled, 0, needed, audit.confidence) - lost <= tolerance + 1e-9


def _audit(**fields: Any) -> Audit:
    given = {
        "round": 1, "images": 100, "tolerance": 1.0, "baseline_points": 90.0, "lost_points": 2.0,
        "deciding_lost_points": 0.5, "only_before": 3, "only_after": 1, "bound_points": 7.0, "confidence": 0.97,
        "look": 1,
    } | fields  # fmt: skip
    return Audit(**given)  # type: ignore[arg-type]


# The parts of a hold-out.


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_split_has_every_image_once_and_the_classes_in_proportion(labels: list[int], part: float, seed: int) -> None:
    count = len(labels)
    holdout = HoldOut(torch.arange(count)[:, None].float(), torch.tensor(labels))
    deciding, auditing = holdout.split(part, seed=seed)
    assert auditing.images == min(max(round(part * count), 1), count - 1)
    assert sorted([*deciding._rows.tolist(), *auditing._rows.tolist()]) == list(range(count))
    assert torch.equal(deciding._labels, holdout._labels[deciding._rows])
    again = holdout.split(part, seed=seed)
    assert all(torch.equal(one._rows, two._rows) for one, two in zip((deciding, auditing), again, strict=True))
    for label in set(labels):
        wanted = auditing.images * labels.count(label) / count
        assert abs(int((auditing._labels == label).sum()) - wanted) <= len(set(labels))


def test_parts_score_their_own_images_and_have_fingerprints_of_their_own() -> None:
    network = _network()
    images, labels = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    holdout = HoldOut(images, labels)
    deciding, auditing = holdout.split(0.25)
    for each in (deciding, auditing):
        own = HoldOut(images[each._rows], labels[each._rows])
        assert each.full(network) == own.full(network)
        assert each.begin_round(network) == own.begin_round(network)
        assert each.judge(network, 10.0, []) == own.judge(network, 10.0, [])
        assert each.fingerprint == own.fingerprint
        assert each.cost == own.cost
    assert holdout.cost.images_scored == 0
    assert len({deciding.identity(), auditing.identity(), holdout.identity()}) == 3
    assert deciding.earlier_fingerprint is None


@pytest.mark.parametrize("part", [0, 1, -0.1, 1.5, True, "half", math.nan])
def test_a_part_outside_its_range_is_refused(part: Any) -> None:
    holdout = HoldOut(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"part=.*above 0 and below 1"):
        holdout.split(part)
    with pytest.raises(ValueError, match="one image, which cannot be split"):
        HoldOut(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)).split(0.5)
    with pytest.raises(RuntimeError, match="right: no network was scored"):
        holdout.right  # noqa: B018


@pytest.mark.parametrize("config", [AdaptivePruningConfig, PrimeSVTConfig])
@pytest.mark.parametrize("audit", [-0.1, 1, 1.5, math.nan, "a third", None])
def test_a_config_refuses_an_audit_that_is_no_part(config: Any, audit: Any) -> None:
    with pytest.raises(ValueError, match=r"audit=.*0 \(none\) to below 1"):
        config(audit=audit)


# The adaptive search.

CONFIG = AdaptivePruningConfig(tolerance=20.0, step=0.25, round_to=1, kinds=("mlp",), audit=PART)


def test_steps_are_given_back_until_the_audit_holds() -> None:
    free, audited = _network(), _network()
    without = prune(free, _fitted(), replace(CONFIG, audit=0.0))
    result = prune(audited, _fitted(), CONFIG)
    assert _left(free) == pytest.approx(0.5, abs=0.05)  # 40 % of the hold-out lose a half
    assert _left(audited) >= 0.8 - 1 / 128
    assert without.state.audits == []
    audits = result.state.audits
    assert [audit.round for audit in audits] == list(range(1, result.state.rounds + 1))
    assert all(audit.holds for audit in audits)
    assert sum(audit.given_back for audit in audits) == sum(not step.accepted for step in result.steps) > 0
    failed = 0
    for before, audit in zip([None, *audits], audits, strict=False):
        failed += audit.given_back
        looked = before is None or audit.look > before.look + audit.given_back  # else it is that of the round before
        assert audit.look == (0 if before is None else before.look) + audit.given_back + looked
        if looked:
            assert audit.confidence == 1 - error_of_look(audit.look, failed)
    last = audits[-1]
    assert 100 * (1 - _left(audited)) == pytest.approx(last.lost_points, abs=1)
    assert last.lost_points == pytest.approx(100 * (last.only_before - last.only_after) / last.images)
    assert last.lost_points <= 20 < last.bound_points
    assert (last.deciding_lost_points, last.optimism_points) == (0.0, last.lost_points)
    assert (last.images, last.baseline_points) == (120, 100.0)
    for told in (f"{last.lost_points:.2f} points on 120 images", "optimism +"):
        assert told in result.summary()
    spent = result.state.scoring
    assert spent["images_scored"] > 120 * (1 + sum(audit.given_back for audit in audits))


def test_keep_notes_the_audit_and_gives_nothing_back() -> None:
    network = _network()
    result = prune(network, _fitted(), replace(CONFIG, overshoot="keep", max_rounds=3))
    assert [audit.given_back for audit in result.state.audits] == [0, 0, 0]
    assert not result.state.audits[-1].holds
    assert all(step.accepted for step in result.steps)


def _search(state: SearchState) -> dict[str, Any]:
    return {**state.to_dict(), "elapsed_s": 0.0, "scoring": {}}


def test_a_search_goes_on_with_the_audit_it_began_with() -> None:
    one, other, holdout = _network(), _network(), _fitted()
    whole = SearchSession(one, holdout, CONFIG)
    first = SearchSession(other, _fitted(), CONFIG)
    for _ in range(2):
        whole.round()
    first.round()
    state = SearchState.from_dict(json.loads(json.dumps(first.state.to_dict())))
    assert state == first.state
    again = SearchSession(other, _fitted(), CONFIG, state=state)
    again.round()
    assert _search(again.state) == _search(whole.state)
    assert len(again.state.audits) == 2


def _damaged(state: SearchState, answers: str) -> SearchState:
    changed = copy.deepcopy(state)
    changed.audit_before = [answers]
    return changed


def test_another_audit_than_that_of_the_search_is_refused() -> None:
    network, holdout = _network(), _fitted()
    state = SearchSession(network, holdout, CONFIG).state
    score, identity, answers = state.audit_before[0].split(" ")
    plain = SearchSession(network, holdout, replace(CONFIG, audit=0.0)).state
    cases: list[tuple[float, SearchState, HoldOut, str]] = [
        (0.0, state, holdout, "the search was begun with an audit"),
        (PART, plain, holdout, "the search was begun without an audit"),
        (0.5, state, holdout, "the audit has other images"),
        (PART, state, _fitted(seed=1), "the audit has other images"),
        (PART, _damaged(state, f"{score} {identity} {answers[:-2]}"), holdout, "damaged: 120 answers"),
        (PART, _damaged(state, f"{score} {identity} xy"), holdout, "answers of the audit are damaged"),
        (PART, _damaged(state, f"nan {identity} {answers}"), holdout, "answers of the audit are damaged"),
        (PART, _damaged(state, ""), holdout, "other images"),
    ]
    for part, known, images, text in cases:
        with pytest.raises(ValueError, match=text):
            SearchSession(network, images, replace(CONFIG, audit=part), state=known)
    several = copy.deepcopy(state)
    several.audit_before *= 2
    with pytest.raises(ValueError, match="the number of processes was 2 when the search began and is 1"):
        SearchSession(network, holdout, CONFIG, state=several)


def test_what_cannot_be_split_has_no_audit() -> None:
    with pytest.raises(ValueError, match=r"audit=0.4: .* give a HoldOut of images"):
        prune(_network(), lambda network: 90.0, CONFIG)
    with pytest.raises(ValueError, match=r"audit=0.5: .* give a HoldOut of images"):
        primesvt(network_of(), lambda network: 90.0, prime_config(audit=0.5))


def test_states_without_an_audit_are_those_of_earlier_versions() -> None:
    state = SearchSession(_network(), _fitted(), replace(CONFIG, audit=0.0)).state
    plain = state.to_dict()
    assert not {"audits", "audit_before", "score_kind", "first_answers"} & plain.keys()
    assert SearchState.from_dict(plain) == state
    assert state.audits == []


def test_an_audit_that_cannot_resolve_the_tolerance_warns() -> None:
    small, config = _fitted(25), replace(CONFIG, tolerance=2.0)
    with pytest.warns(UserWarning, match="one of the 10 images .* is 10 points, .* tolerance of 2; 50 images"):
        SearchSession(_network(), small, config)
    with pytest.warns(UserWarning, match="about [0-9,]+ images of the audit would") as found:
        prune(_network(), _fitted(), CONFIG)
    assert sum("of the audit would" in str(each.message) for each in found) == 1  # once in a search


# PrimeSVT.


class FittedSpikes(Fitted):
    """The same for a spiking network: by all weights that are not zero."""

    def __call__(self, network: nn.Module, images: Tensor) -> Tensor:
        network(PICTURE)
        right = images[:, 0] <= self.left(network) + 1e-6
        label = images[:, 1].long()
        return nn.functional.one_hot(torch.where(right, label, (label + 1) % 3), 3).float()

    def left(self, network: nn.Module) -> float:
        return sum(int(p.count_nonzero()) for p in network.parameters() if p.ndim > 1) / WEIGHTS


SPIKING = network_of()
PICTURE = holdout_of(SPIKING, 2)._images
WEIGHTS = sum(int(p.count_nonzero()) for p in SPIKING.parameters() if p.ndim > 1)


def test_primesvt_applies_the_best_candidate_that_holds_on_the_audit() -> None:
    settings = {"tolerance": 20.0, "min_memory_saving": 0.05, "rates": (0.1, 0.3), "granularity": "filter"}
    free = primesvt(copy.deepcopy(SPIKING), _fitted(kind=FittedSpikes), prime_config(**settings))
    network = copy.deepcopy(SPIKING)
    result = primesvt(network, _fitted(kind=FittedSpikes), prime_config(audit=PART, **settings))
    audit = result.audit
    assert free.audit is None
    assert audit is not None
    assert audit.holds
    assert audit.given_back > 0
    assert audit.lost_points == pytest.approx(100 * (1 - FittedSpikes(PICTURE).left(network)), abs=1)
    assert result.met
    within = [each for each in result.candidates if each.accepted]
    assert max(each.saving for each in within) > result.saving > 0.05
    assert "optimism" in super(PrimeSVTResult, result).summary()
    back = PrimeSVTResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert back.audit == audit
    assert "audit" not in free.to_dict()


def test_primesvt_applies_nothing_where_no_candidate_holds_on_the_audit() -> None:
    network = copy.deepcopy(SPIKING)
    settings = {"tolerance": 0.5, "min_memory_saving": 0.2, "rates": (0.3,), "granularity": "filter", "blocks": "block"}
    with pytest.warns(UserWarning, match="nothing is pruned"):
        result = primesvt(network, _fitted(kind=FittedSpikes), prime_config(audit=PART, **settings))
    assert result.applied is None
    assert result.audit is not None
    assert (result.audit.lost_points, result.audit.only_before) == (0.0, 0)
    assert result.audit.given_back > 0
    with pytest.warns(UserWarning, match="applied: within the memory"):
        result = primesvt(network, _fitted(kind=FittedSpikes), prime_config(audit=PART, prefer="memory", **settings))
    assert result.audit is not None
    assert not result.audit.holds


# Several processes.


def _process(number: int, world: int) -> list[Any]:
    dist.init_process_group("gloo", rank=number, world_size=world)
    try:
        found: list[Any] = []
        for sharded in (False, True):
            images = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            labels, mine = torch.arange(50) % 3, slice(number, None, world) if sharded else slice(None)
            holdout = HoldOut(images[mine], labels[mine], sharded=sharded)
            deciding, auditing = holdout.split(0.3)
            config = AdaptivePruningConfig(tolerance=30.0, step=0.5, audit=0.3, kinds=("mlp",))
            session = SearchSession(_network(), holdout, config)
            session.round()
            again = SearchSession(session.network, holdout, config, state=session.state)
            again.round()
            sizes = [deciding.images, auditing.images, deciding.own_images + auditing.own_images, holdout.images]
            found.append([_search(again.state), sizes])
        return found
    finally:
        dist.destroy_process_group()


def test_ranks_audit_together(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lambda number: _process(number, 2))
    assert first == second
    assert first[0] == first[1]  # the shares are the same images
    search, sizes = first[0]
    assert sizes == [35, 15, 25, 50]
    assert [audit["images"] for audit in search["audits"]] == [15, 15]
    assert len(search["audit_before"]) == 2
