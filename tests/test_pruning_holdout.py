"""The hold-out's answers are those of all its images, its counters count, and several processes agree."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rank_cases import on_ranks
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from swincompress_pl.pruning.evaluation.holdout import FunctionScorer, HoldOut, ScoringCost, _needed
from swincompress_pl.pruning.evaluation.images import TooLargeError
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero, gather_results, rank, sum_over_ranks, world_size
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.registry import adapter_for

CLASSES = 4


def _decided(network: nn.Module) -> nn.Module:
    """Weights large enough that the images get different answers."""
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return network.eval()


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return _decided(
        VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=4, num_classes=CLASSES)
    )


def _swin() -> nn.Module:
    torch.manual_seed(0)
    return _decided(
        SwinTransformer(
            img_size=8, patch_size=2, window_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], num_classes=CLASSES
        )
    )


def _sharpened(network: nn.Module, images: Tensor) -> Tensor:
    """Labels that the network mostly gets right, about one in six wrong."""
    with torch.no_grad():
        labels = network(images).argmax(1)
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=generator) < 1 / 6
    return torch.where(wrong, (labels + 1) % CLASSES, labels)


VIT, SWIN = _vit(), _swin()
IMAGES = torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = {id(VIT): _sharpened(VIT, IMAGES), id(SWIN): _sharpened(SWIN, IMAGES)}


def _accuracy(network: nn.Module, labels: Tensor, images: Tensor = IMAGES) -> float:
    with torch.no_grad():
        return 100.0 * int((network(images).argmax(1) == labels).sum()) / len(labels)


def _tensors(group: Any) -> list[str]:
    return [s.tensor for s in group.slices]


@settings(max_examples=8)
@given(
    swin=st.booleans(),
    picks=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 8), st.sampled_from([-2.0, 0.0, 2.0])), max_size=4),
    confidence=st.sampled_from([0.99, 1.0]),
    cache_size_bytes=st.sampled_from([0, 100_000, 1 << 30]),
    seed=st.integers(0, 5),
)
def test_exact_verdicts_are_those_of_all_images(
    swin: bool, picks: list[tuple[int, int, float]], confidence: float, cache_size_bytes: int, seed: int
) -> None:
    """A round of random candidates with floors at and around their true scores; those accepted stay."""
    source = SWIN if swin else VIT
    network, labels = copy.deepcopy(source), LABELS[id(source)]
    holdout = HoldOut(
        IMAGES, labels, batch_size=16, confidence=confidence, cache_size_bytes=cache_size_bytes, seed=seed
    )
    assert holdout.begin_round(network) == _accuracy(network, labels)
    groups = [g for g in adapter_for(network).groups(network) if g.kind in ("heads", "mlp")]
    scored = holdout.images
    with ExitStack() as masks:
        for pick, units, above in picks:
            group = groups[pick % len(groups)]
            with ExitStack() as trial:
                trial.enter_context(mask_units(network, group, range(min(units, group.units - 1))))
                true = _accuracy(network, labels)
                verdict = holdout.judge(network, true + above, _tensors(group))
                scored += verdict.images
                assert verdict.exact == (verdict.images == len(labels))
                if verdict.exact:
                    assert verdict.score == pytest.approx(true, abs=1e-9)
                if verdict.exact or confidence == 1:
                    assert verdict.accepted == (above <= 0)
                if verdict.accepted:
                    masks.enter_context(trial.pop_all())
                    holdout.accept(_tensors(group))
        assert holdout.full(network) == pytest.approx(_accuracy(network, labels), abs=1e-9)
    cost = holdout.cost
    assert cost.images_scored == scored + len(labels)
    assert (cost.decisions, cost.naive_images) == (len(picks), (len(picks) + 1) * len(labels))
    assert cost.image_forwards <= cost.images_scored + 1e-6
    if cache_size_bytes == 0:
        assert cost.image_forwards == cost.images_scored


def _round(network: nn.Module, holdout: HoldOut, floor: float) -> list[tuple[Any, ...]]:
    holdout.begin_round(network)
    found = []
    with ExitStack() as masks:
        for group in adapter_for(network).groups(network):
            if group.kind not in ("heads", "mlp"):
                continue
            with ExitStack() as trial:
                trial.enter_context(mask_units(network, group, [0]))
                verdict = holdout.judge(network, floor, _tensors(group))
                if verdict.accepted:
                    masks.enter_context(trial.pop_all())
                    holdout.accept(_tensors(group))
            found.append((verdict.score, verdict.accepted, verdict.images, verdict.exact))
        found.append((holdout.full(network),))
    return found


def test_the_same_calls_give_the_same_verdicts_and_draw_no_random_numbers() -> None:
    labels = LABELS[id(VIT)]
    floor = _accuracy(VIT, labels) - 5
    before = torch.random.get_rng_state()
    first, second = (HoldOut(IMAGES, labels, batch_size=16) for _ in range(2))
    assert _round(VIT, first, floor) == _round(VIT, second, floor)
    assert first.cost == second.cost
    assert first.cost.image_forwards < first.cost.images_scored < first.cost.naive_images
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_network_is_scored_in_eval_mode_and_comes_back_in_its_own() -> None:
    network = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES)
    network.train()
    network.get_submodule("blocks.0").eval()
    modes, seen = [m.training for m in network.modules()], []

    def predict(network: nn.Module, images: Tensor) -> Tensor:
        seen.append((any(m.training for m in network.modules()), torch.is_grad_enabled()))
        logits: Tensor = network(images)
        return logits

    holdout = HoldOut(IMAGES[:40], torch.zeros(40, dtype=torch.int32), predict=predict)
    holdout.begin_round(network)
    holdout.judge(network, 0.0, [])
    holdout.judge(network, 30.0, ["blocks.1.mlp.fc1.weight"])
    assert set(seen) == {(False, False)}
    assert [m.training for m in network.modules()] == modes


def test_an_unchanged_network_is_not_scored_again() -> None:
    holdout = HoldOut(IMAGES, LABELS[id(VIT)])
    score = holdout.full(VIT)
    assert holdout.begin_round(VIT, unchanged=True) == score
    assert holdout.cost.images_scored == len(IMAGES)
    assert holdout.begin_round(VIT) == score
    assert holdout.cost.images_scored == 2 * len(IMAGES)
    fresh = HoldOut(IMAGES, LABELS[id(VIT)])
    assert fresh.begin_round(VIT, unchanged=True) == score  # nothing to use again


def test_another_network_than_the_rounds_is_judged_without_the_cache() -> None:
    labels = LABELS[id(VIT)]
    holdout = HoldOut(IMAGES, labels, confidence=1.0)
    score = holdout.begin_round(VIT)
    assert holdout.judge(copy.deepcopy(VIT), score, ["blocks.2.mlp.fc2.weight"]).accepted
    assert not holdout.judge(copy.deepcopy(VIT), score + 0.1, ["blocks.2.mlp.fc2.weight"]).accepted
    assert holdout.cost.image_forwards == holdout.cost.images_scored


def test_a_network_without_an_adapter_is_scored_all_the_same() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    labels = _sharpened(network, IMAGES)
    holdout = HoldOut(IMAGES, labels)
    score = holdout.begin_round(network)
    assert score == _accuracy(network, labels)
    assert holdout.judge(network, score - 5, ["1.weight"]).accepted
    assert not holdout.judge(network, score + 5, ["1.weight"]).accepted


@given(images=st.integers(1, 20_000), right=st.integers(0, 20_000), below=st.sampled_from([0.0, 1e-12, 0.5, 1.0, 2.0]))
def test_the_floor_in_points_and_in_images_are_the_same(images: int, right: int, below: float) -> None:
    right = min(right, images)
    floor = 100.0 * right / images - below
    needed = _needed(floor, images)
    assert needed == next((k for k in range(max(0, needed - 2), images + 1) if 100.0 * k / images >= floor - 1e-9), -1)
    assert needed <= right
    assert _needed(100.5, images) == images + 1
    assert _needed(-3.0, images) == 0


# What comes in.


def _batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, str]]:
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size], "more"


def test_from_batches_keeps_all_or_a_stratified_part() -> None:
    labels = torch.arange(1000) % 10
    labels[labels == 9] = 0  # class 0 twice as often
    images = torch.arange(1000.0)[:, None]
    assert torch.equal(HoldOut.from_batches(_batches(images, labels, 64))._images, images)
    for seed in range(5):
        part = HoldOut.from_batches(_batches(images, labels, 64), max_images=200, seed=seed)
        assert part.images == 200
        assert torch.equal(part._labels, labels[part._images[:, 0].long()])
        counts = torch.bincount(part._labels).tolist()
        assert all(abs(count - (40 if label == 0 else 20)) <= 2 for label, count in enumerate(counts))
        assert part._images[:, 0].max() > 900  # not the first ones
    again = HoldOut.from_batches(_batches(images, labels, 10), max_images=200, seed=4)
    assert torch.equal(again._images, part._images)


def test_a_hold_out_that_is_too_large_is_refused_with_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"max_size_bytes=40000.*max_images=52.*FunctionScorer"):
        HoldOut.from_batches(_batches(IMAGES, LABELS[id(VIT)], 64), max_size_bytes=40_000)
    kept = HoldOut.from_batches(_batches(IMAGES, LABELS[id(VIT)], 64), max_size_bytes=40_000, max_images=52)
    assert kept.images == 52
    with pytest.raises(ValueError, match=r"max_size_bytes=5, \d+ per image; allow more"):  # not one fits
        HoldOut.from_batches(_batches(IMAGES, LABELS[id(VIT)], 64), max_size_bytes=5)
    assert TooLargeError(40_000, 768, ranks=2).max_images == 104  # each rank has its own


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: HoldOut(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), ValueError, "the hold-out is empty"),
        (lambda: HoldOut.from_batches([]), ValueError, "the hold-out is empty"),
        (lambda: HoldOut(IMAGES, torch.zeros(3, dtype=torch.long)), ValueError, "one label for each image"),
        (lambda: HoldOut(IMAGES, torch.zeros(600, 2, dtype=torch.long)), ValueError, "one label for each image"),
        (lambda: HoldOut(IMAGES, torch.zeros(600)), ValueError, "torch.float32: integers"),
        (lambda: HoldOut(IMAGES, torch.full((600,), -1)), ValueError, "label -1 of the hold-out is negative"),
        (lambda: HoldOut(IMAGES, LABELS[id(VIT)], batch_size=0), ValueError, "batch_size=0"),
        (lambda: HoldOut(IMAGES, LABELS[id(VIT)], confidence=0.4), ValueError, "confidence=0.4"),
        (lambda: HoldOut(IMAGES, LABELS[id(VIT)], confidence=math.nan), ValueError, "confidence=nan"),
        (lambda: HoldOut(IMAGES, LABELS[id(VIT)], cache_size_bytes=-1), ValueError, "cache_size_bytes=-1"),
        (lambda: HoldOut.from_batches([], max_images=0), ValueError, "max_images=0"),
        (lambda: HoldOut.from_batches([IMAGES]), TypeError, "has a batch of type Tensor; tensors"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("pixel", [math.nan, math.inf])
def test_pixels_that_are_not_finite_are_refused(pixel: float) -> None:
    """Spiking neurons would not show them."""
    images = IMAGES.clone()
    images[77, 1, 2, 3] = pixel
    with pytest.raises(ValueError, match="image 77 of the hold-out holds NaN or infinite pixels"):
        HoldOut(images, LABELS[id(VIT)])
    assert HoldOut(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3)).images == 3  # no such pixels


def test_bad_logits_are_refused() -> None:
    labels = LABELS[id(VIT)]

    def spoilt(network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        logits[images[:, 0, 0, 0] == IMAGES[77, 0, 0, 0]] = math.nan
        return logits

    with pytest.raises(ValueError, match="VisionTransformer gives NaN logits for image 77"):
        HoldOut(IMAGES, labels, predict=spoilt).full(VIT)
    with pytest.raises(ValueError, match="label 4 of the hold-out is not among the 4 classes of VisionTransformer"):
        HoldOut(IMAGES, torch.where(labels == 0, 4, labels)).full(VIT)
    for predict, shape in (
        (lambda network, images: network(images)[:, 0], r"shape \(64,\)"),
        (lambda network, images: network(images)[:, :1], r"shape \(64, 1\)"),
        (lambda network, images: network(images)[:3], r"shape \(3, 4\)"),
        (lambda network, images: [network(images)], "list"),
    ):
        with pytest.raises(ValueError, match=rf"gave {shape} for 64 images"):
            HoldOut(IMAGES, labels, predict=predict).full(VIT)


def test_infinite_logits_are_only_far_away() -> None:
    def masked(network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        logits[:, 0] = -math.inf
        return logits

    labels = LABELS[id(VIT)]
    holdout = HoldOut(IMAGES, labels, predict=masked, confidence=1.0)
    with torch.no_grad():
        true = 100.0 * int((masked(VIT, IMAGES).argmax(1) == labels).sum()) / len(labels)
    assert holdout.begin_round(VIT) == true
    assert holdout.judge(VIT, true, []).accepted


def test_calls_out_of_order_are_refused() -> None:
    holdout = HoldOut(IMAGES, LABELS[id(VIT)])
    with pytest.raises(RuntimeError, match="call begin_round"):
        holdout.judge(VIT, 50.0, [])
    with pytest.raises(RuntimeError, match="call judge first"):
        holdout.accept([])
    holdout.begin_round(VIT)
    with pytest.raises(RuntimeError, match="call judge first"):
        holdout.accept([])
    with pytest.raises(ValueError, match="floor=nan"):
        holdout.judge(VIT, math.nan, [])
    with pytest.raises(ValueError, match=r"blocks.7.mlp.fc1.weight: no parameter"):
        holdout.judge(VIT, 50.0, ["blocks.7.mlp.fc1.weight"])


# The function of the user's, and the counters.


def test_a_function_scores_exactly() -> None:
    network, modes = nn.Linear(2, 2), []

    def evaluate(network: nn.Module) -> Tensor:
        modes.append((network.training, torch.is_grad_enabled()))
        return torch.tensor(80.0)

    scorer = FunctionScorer(evaluate)
    assert scorer.begin_round(network) == 80.0
    assert scorer.begin_round(network, unchanged=True) == 80.0
    assert len(modes) == 1
    verdict = scorer.judge(network, 80.0, [])
    assert (verdict.score, verdict.accepted, verdict.images, verdict.exact) == (80.0, True, 0, True)
    assert not scorer.judge(network, 80.1, []).accepted
    scorer.accept([])
    assert (scorer.images, scorer.cost) == (0, ScoringCost(decisions=2))
    assert set(modes) == {(False, False)}
    assert network.training


@pytest.mark.parametrize("value", [math.nan, -0.1, 100.5])
def test_a_function_that_gives_no_points_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"the score of this Linear is {value}; an accuracy in points"):
        FunctionScorer(lambda network: value).full(nn.Linear(2, 2))


def test_costs_add_up_and_travel_as_plain_data() -> None:
    one = ScoringCost(images_scored=3, image_forwards=1.5, naive_images=10, decisions=1)
    assert one + ScoringCost() == one
    assert one + one == ScoringCost(images_scored=6, image_forwards=3.0, naive_images=20, decisions=2)
    assert ScoringCost.from_dict(one.to_dict()) == one


# Several processes.


def test_alone_the_ranks_are_nobody() -> None:
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_ranks([1, 2.5]) == [1, 2.5]
    assert from_rank_zero("x") == "x"
    assert gather_results(lambda: 3) == [3]
    with pytest.raises(KeyError):
        gather_results(lambda: {}["missing"])


def _fail_on_the_last() -> int:
    if rank() == world_size() - 1:
        raise ZeroDivisionError("on purpose")
    return 1


def _process(number: int, world: int) -> dict[str, Any]:
    dist.init_process_group("gloo", rank=number, world_size=world)
    try:
        network = _vit()
        labels = _sharpened(network, IMAGES)
        floor = _accuracy(network, labels) - 5
        found: dict[str, Any] = {
            "sums": sum_over_ranks([number, 0.5]),
            "zero": from_rank_zero(f"rank {number}"),
        }
        try:
            gather_results(_fail_on_the_last)
        except (RuntimeError, ZeroDivisionError) as error:
            found["failure"] = str(error)
        same = HoldOut(IMAGES, labels, batch_size=16)
        found["same"] = (same.images, _round(network, same, floor), same.cost.to_dict())
        mine = slice(number, None, world)
        own = HoldOut(IMAGES[mine], labels[mine], batch_size=16, sharded=True)
        found["sharded"] = (own.images, _round(network, own, floor), own.cost.to_dict())
        # fewer images than ranks: some have none
        few = HoldOut(IMAGES[:1], labels[:1], confidence=1.0)
        found["few"] = (few.images, _round(network, few, 50.0))
        part = HoldOut.from_batches([(IMAGES[mine], labels[mine])], max_images=100, sharded=True)
        found["part"] = part.images
        return found
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_agree_on_every_verdict(world: int, tmp_path: Path) -> None:
    found = on_ranks(tmp_path, world, lambda number: _process(number, world))
    assert all(each["sums"] == [sum(range(world)), 0.5 * world] for each in found)
    assert all(each["zero"] == "rank 0" for each in found)
    assert all("on purpose" in each["failure"] for each in found)
    assert "rank" in found[0]["failure"]
    for key in ("same", "sharded", "few", "part"):
        assert all(each[key] == found[0][key] for each in found)
    assert found[0]["same"] == found[0]["sharded"]  # the shares are the same images
    labels = LABELS[id(VIT)]
    alone = HoldOut(IMAGES, labels, batch_size=16)
    expected = _round(VIT, alone, _accuracy(VIT, labels) - 5)
    images, verdicts, cost = found[0]["same"]
    assert images == len(IMAGES)
    assert [v[1] for v in verdicts[:-1]] == [v[1] for v in expected[:-1]]
    assert verdicts[-1] == expected[-1]
    assert cost["naive_images"] == alone.cost.naive_images
    assert cost["images_scored"] < cost["naive_images"]
    assert found[0]["few"][0] == 1
    assert found[0]["part"] == 100


def test_accepted_scores_are_resolved_as_finely_as_asked_and_refused_ones_are_not() -> None:
    network, labels = copy.deepcopy(VIT), LABELS[id(VIT)]
    holdout = HoldOut(IMAGES, labels, batch_size=8)
    holdout.begin_round(network)
    group = next(g for g in adapter_for(network).groups(network) if g.kind == "mlp")
    with mask_units(network, group, range(group.units // 2)):
        true = _accuracy(network, labels)
        found = [
            holdout.judge(network, true - 30, _tensors(group), resolution_points=points)
            for points in (None, 3.0, 1.0, 1e-9)
        ]
        assert all(verdict.accepted for verdict in found)
        assert [verdict.images for verdict in found] == sorted(verdict.images for verdict in found)
        assert found[0].images < found[2].images < found[3].images == len(labels)
        for verdict, points in zip(found[1:], (3.0, 1.0, 1e-9), strict=True):
            assert verdict.error_points <= points
        assert (found[3].score, found[3].error_points, found[3].exact) == (pytest.approx(true), 0.0, True)
        refused = [
            holdout.judge(network, true + 30, _tensors(group), resolution_points=points) for points in (None, 1e-9)
        ]
        assert not any(verdict.accepted for verdict in refused)
        assert refused[0].images == refused[1].images < len(labels)


def test_a_fingerprint_tells_hold_outs_apart() -> None:
    labels = LABELS[id(VIT)]
    same = HoldOut(IMAGES.clone(), labels.clone(), batch_size=7).fingerprint
    assert HoldOut(IMAGES, labels).fingerprint == same
    changed = IMAGES.clone()
    changed[-1, 0, 0, 0] += 1
    others = [
        HoldOut(changed, labels),
        HoldOut(IMAGES, (labels + 1) % CLASSES),
        HoldOut(IMAGES[:-1], labels[:-1]),
        HoldOut(IMAGES.half(), labels),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 5
