"""Scores without labels: agreement is accuracy by the first network's answers, and kl is what its formula says."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prime_cases import holdout_of, network_of, prime_config
from support.rank_cases import on_ranks
from timm.models import VisionTransformer
from torch import Tensor, nn

from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, SearchSession, SearchState, primesvt, prune
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.registry import adapter_for

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot resolve a tolerance", "ignore:.*neurons never spike")


def _vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=4, num_classes=4)
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return network.eval()


VIT, OTHER = _vit(), _vit(1)
IMAGES = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor = IMAGES) -> Tensor:
    logits: Tensor = network(images)
    return logits


def _kl_score(first: nn.Module, network: nn.Module) -> float:
    before, after = (_logits(each).double().log_softmax(1) for each in (first, network))
    divergence = nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")
    return float(100 * torch.exp(-divergence))


def _groups(network: nn.Module) -> list[Any]:
    return [group for group in adapter_for(network).groups(network) if group.kind in ("heads", "mlp")]


def _verdicts(holdout: HoldOut, floor: float) -> Iterator[tuple[Any, float]]:
    """What the hold-out says of one unit less of each group, and the score of all images then."""
    network = copy.deepcopy(VIT)
    holdout.begin_round(network)
    with ExitStack() as masks:
        for group in _groups(network):
            tensors = [s.tensor for s in group.slices]
            with ExitStack() as trial:
                trial.enter_context(mask_units(network, group, [0, 1]))
                verdict = holdout.judge(network, floor, tensors)
                yield verdict, _kl_score(VIT, network)
                if verdict.accepted:
                    holdout.accept(tensors)
                    masks.enter_context(trial.pop_all())


def test_agreement_is_the_accuracy_by_the_answers_of_the_first_network() -> None:
    agreement, accuracy = HoldOut(IMAGES, score="agreement"), HoldOut(IMAGES, _logits(VIT).argmax(1))
    assert agreement.full(VIT) == accuracy.full(VIT) == 100.0
    assert agreement.full(OTHER) == accuracy.full(OTHER) < 90
    assert agreement.right.tolist() == (_logits(OTHER).argmax(1) == _logits(VIT).argmax(1)).tolist()
    kinds = [[verdict.accepted for verdict, _ in _verdicts(each, 85.0)] for each in (agreement, accuracy)]
    assert kinds[0] == kinds[1]
    assert len(set(kinds[0])) == 2


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=200, max_size=200))
def test_the_accuracy_lost_is_at_most_the_disagreement(labels: list[int]) -> None:
    holdout = HoldOut(IMAGES, score="agreement")
    holdout.full(VIT)
    disagreement = 100 - holdout.full(OTHER)
    right = [100 * float((_logits(each).argmax(1) == torch.tensor(labels)).float().mean()) for each in (VIT, OTHER)]
    assert right[0] - right[1] <= disagreement + 1e-4


def test_kl_is_the_formula_and_decides_on_all_images_with_the_cache() -> None:
    holdout = HoldOut(IMAGES, score="kl", batch_size=32)
    assert holdout.full(VIT) == 100.0
    assert holdout.full(OTHER) == pytest.approx(_kl_score(VIT, OTHER), abs=1e-5)
    assert holdout.right.tolist() == (_logits(OTHER).argmax(1) == _logits(VIT).argmax(1)).tolist()
    before = copy.copy(holdout.cost)
    found = list(_verdicts(holdout, 95.0))
    for verdict, score in found:
        assert verdict.score == pytest.approx(score, abs=1e-4)
        assert (verdict.images, verdict.exact, verdict.error_points) == (200, True, 0.0)
        assert verdict.accepted == (verdict.score >= 95.0)
    assert len({verdict.accepted for verdict, _ in found}) == 2
    assert holdout.cost.decisions - before.decisions == len(found)
    assert holdout.cost.image_forwards < holdout.cost.images_scored == 400 + 200 * (len(found) + 1)


def test_a_network_that_excludes_an_answer_of_the_first_has_no_points() -> None:
    first, other = nn.Linear(1, 2), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.zero_()
        other.weight.copy_(torch.tensor([[0.0], [-torch.inf]]))
    excluded = HoldOut(torch.zeros(4, 1), score="kl", predict=lambda n, x: x + next(n.parameters()).T)
    assert excluded.full(first) == 100.0
    assert excluded.full(other) == 0.0


@pytest.mark.parametrize("score", ["agreement", "kl"])
def test_parts_and_searches_compare_with_the_network_that_was_scored_first(score: Any) -> None:
    holdout = HoldOut(IMAGES, score=score)
    holdout.full(VIT)
    deciding, auditing = holdout.split(0.25)
    whole = holdout.full(OTHER)
    assert whole < 95
    assert deciding.full(VIT) == auditing.full(VIT) == 100.0
    one, two = deciding.full(OTHER), auditing.full(OTHER)
    assert min(one, two) <= whole <= max(one, two)
    fingerprints = [HoldOut(IMAGES, score=score), HoldOut(IMAGES, score=score), HoldOut(IMAGES, score=score)]
    for each, network in zip(fingerprints, (VIT, OTHER, VIT), strict=True):
        each.full(network)
    found = [each.fingerprint for each in fingerprints]
    assert found[0] == found[2] != found[1]
    assert holdout.earlier_fingerprint is None


CONFIG = {"tolerance": 20.0, "step": 0.25, "round_to": 1, "max_rounds": 3}


def _search(state: SearchState) -> dict[str, Any]:
    return {**state.to_dict(), "elapsed_s": 0.0, "scoring": {}}


@pytest.mark.parametrize("audit", [0.0, 0.3])
@pytest.mark.parametrize("score", ["agreement", "kl"])
def test_a_search_without_labels_goes_on_where_it_was(score: Any, audit: float) -> None:
    config = AdaptivePruningConfig(**CONFIG, audit=audit)  # type: ignore[arg-type]
    one, other = copy.deepcopy(VIT), copy.deepcopy(VIT)
    result = prune(one, HoldOut(IMAGES, score=score), config)
    assert (result.baseline_score, result.state.score_kind) == (100.0, score)
    assert 80 - 1e-9 <= result.score < 100
    assert len(result.state.audits) == (3 if audit else 0)
    label = "agreement on the hold-out" if score == "agreement" else "100 exp(-KL) on the hold-out"
    assert label in result.summary()
    assert (f"at most {100 - result.score:.2f} points" in result.summary()) == (score == "agreement")
    session = SearchSession(other, HoldOut(IMAGES, score=score), config)
    while session.state.stopped is None:
        session.round(retrains=False)
        state = SearchState.from_dict(json.loads(json.dumps(session.state.to_dict())))
        session = SearchSession(other, HoldOut(IMAGES, score=score), config, state=state)  # as in another process
    assert _search(session.state) == _search(result.state)


def test_a_search_without_labels_refuses_other_answers() -> None:
    config = AdaptivePruningConfig(**CONFIG)  # type: ignore[arg-type]
    network = copy.deepcopy(VIT)
    state = SearchSession(network, HoldOut(IMAGES, score="agreement"), config).state
    (text,) = state.first_answers
    labels = _logits(VIT).argmax(1)

    def with_answers(*answers: str, kind: str = "agreement") -> SearchState:
        changed = copy.deepcopy(state)
        changed.first_answers, changed.score_kind = list(answers), kind
        return changed

    cases: list[tuple[Any, SearchState, str]] = [
        (HoldOut(IMAGES, labels), state, "score='accuracy': the search was begun with 'agreement'"),
        (lambda network: 90.0, state, "score='accuracy': the search was begun with 'agreement'"),
        (HoldOut(IMAGES, score="kl"), state, "score='kl': the search was begun with 'agreement'"),
        (HoldOut(IMAGES, score="kl"), with_answers(text, kind="kl"), "score='kl': .* begun with 'agreement'"),
        (HoldOut(IMAGES, labels), with_answers(text, kind="accuracy"), "begun with a score without labels"),
        (lambda network: 90.0, with_answers(text, kind="accuracy"), "goes on with a function"),
        (HoldOut(IMAGES[1:], score="agreement"), state, "the hold-out has 199"),
        (HoldOut(IMAGES, score="agreement"), with_answers(text[:40]), "damaged"),
        (HoldOut(IMAGES, score="agreement"), with_answers("agreement !"), "damaged"),
        (HoldOut(IMAGES, score="agreement"), with_answers(text, text), "number of processes was 2"),
        (HoldOut(IMAGES, score="agreement"), with_answers(), "begun with 'accuracy'"),
    ]
    for scorer, known, told in cases:
        with pytest.raises(ValueError, match=told):
            SearchSession(network, scorer, config, state=known)
    with pytest.raises(ValueError, match=r"search\.score_kind='top-5'"):
        SearchState.from_dict({**state.to_dict(), "score_kind": "top-5"})


def test_bad_hold_outs_and_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="score='accuracy' needs labels"):
        HoldOut(IMAGES)
    with pytest.raises(ValueError, match="score='top-5'"):
        HoldOut(IMAGES, score="top-5")  # type: ignore[arg-type]
    five = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=4, num_classes=5).eval()
    holdout = HoldOut(IMAGES, score="kl")
    holdout.full(VIT)
    with pytest.raises(ValueError, match="has 5 classes, and the network that was scored first 4"):
        holdout.full(five)
    two = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=4, num_classes=2).eval()
    holdout = HoldOut(IMAGES, score="agreement")
    holdout.full(VIT)
    with pytest.raises(ValueError, match="has 2 classes, and the network that was scored first answered"):
        holdout.full(two)


def test_a_failed_first_pass_is_no_first_network() -> None:
    calls = 0

    def fails(network: nn.Module, images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("on purpose")
        logits: Tensor = network(images)
        return logits

    holdout = HoldOut(IMAGES, score="agreement", predict=fails, batch_size=50)
    with pytest.raises(ZeroDivisionError):
        holdout.full(OTHER)
    assert holdout.full(VIT) == 100.0


def test_batches_may_have_images_only() -> None:
    for batches in ([IMAGES[:90], IMAGES[90:]], [(IMAGES[:90],), (IMAGES[90:],)]):
        holdout = HoldOut.from_batches(batches, score="agreement")
        assert torch.equal(holdout._images, IMAGES)
        assert holdout.full(VIT) == 100.0
        assert HoldOut.from_batches(batches, score="kl", max_images=50).images == 50
        with pytest.raises(TypeError, match=r"tensors \(images, labels, \.\.\.\) are expected"):
            HoldOut.from_batches(batches)
    mixed = [(IMAGES[:90],), (IMAGES[90:], torch.zeros(110, dtype=torch.long))]
    with pytest.raises(ValueError, match="some batches of the hold-out have labels and others have none"):
        HoldOut.from_batches(mixed, score="kl")


@pytest.mark.parametrize("score", ["agreement", "kl"])
def test_primesvt_without_labels(score: Any) -> None:
    network = network_of()
    images = holdout_of(network)._images
    result = primesvt(
        network,
        HoldOut(images, score=score, batch_size=20),
        prime_config(tolerance=10.0, min_memory_saving=0.05, rates=(0.1, 0.3), audit=0.3),
    )
    assert (result.baseline_score, result.score_kind) == (100.0, score)
    assert result.audit is not None
    assert result.met
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))).score_kind == score


def _process(number: int, world: int) -> list[Any]:
    dist.init_process_group("gloo", rank=number, world_size=world)
    try:
        found: list[Any] = []
        for score in ("agreement", "kl"):
            for sharded in (False, True):
                images = IMAGES[number::world] if sharded else IMAGES
                holdout = HoldOut(images, score=score, sharded=sharded, batch_size=16)  # type: ignore[arg-type]
                config = AdaptivePruningConfig(**CONFIG, audit=0.3)  # type: ignore[arg-type]
                network = copy.deepcopy(VIT)
                session = SearchSession(network, holdout, config)
                session.round(retrains=False)
                again = HoldOut(images, score=score, sharded=sharded, batch_size=16)  # type: ignore[arg-type]
                session = SearchSession(network, again, config, state=session.state)
                session.round(retrains=False)
                found.append([_search(session.state), again.full(VIT), again.full(OTHER)])
        return found
    finally:
        dist.destroy_process_group()


def test_ranks_score_together_without_labels(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lambda number: _process(number, 2))
    assert first == second
    assert first[0] == first[1]
    assert first[2][1:] == first[3][1:]
    for each, score in ((first[0], "agreement"), (first[2], "kl")):
        alone = HoldOut(IMAGES, score=score)  # type: ignore[arg-type]
        assert each[1:] == [alone.full(VIT), pytest.approx(alone.full(OTHER), abs=1e-6)]
