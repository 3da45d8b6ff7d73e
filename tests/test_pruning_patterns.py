"""Patterns keep exactly what they say, the best first, deterministically, and a smaller mask inside a larger one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swincompress_pl.pruning.structure.patterns import (
    Blocks,
    FilterChannels,
    NOfM,
    Pattern,
    SingleWeights,
    parse_granularity,
)

GRANULARITIES = ["weight", "1:2", "2:4", "3:8", "block", "filter"]


@st.composite
def _pattern_and_saliency(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    pattern = parse_granularity(draw(st.sampled_from(GRANULARITIES)), block_shape=(2, 4))
    shape = (2 * draw(st.integers(1, 4)), 8 * draw(st.integers(1, 3)))
    # few levels: ties are the rule; one shape in three is that of a convolution
    levels = draw(st.sampled_from([1, 2, 5, 10**6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    saliency = torch.randint(levels, shape, generator=generator).to(
        draw(st.sampled_from([torch.float32, torch.float64]))
    )
    return pattern, saliency.reshape(shape[0], -1, 2, 2) if draw(st.integers(0, 2)) == 0 else saliency


def _units_kept(pattern: Pattern, mask: Tensor) -> list[float]:
    """How many units each independent part of the mask keeps."""
    rows = mask.flatten(1)
    if isinstance(pattern, NOfM):
        return rows.reshape(-1, pattern.m).sum(1).tolist()
    if isinstance(pattern, Blocks):
        blocks = rows.unfold(0, pattern.rows, pattern.rows).unfold(1, pattern.columns, pattern.columns)
        assert torch.equal(blocks.all(-1).all(-1), blocks.any(-1).any(-1)), "blocks stay or go as a whole"
        return [int(blocks.all(-1).all(-1).sum())]
    if isinstance(pattern, FilterChannels):
        channels = mask.flatten(2) if mask.ndim > 2 else mask[..., None]
        assert torch.equal(channels.all(-1), channels.any(-1)), "a channel of a filter stays or goes as a whole"
        return channels.all(-1).sum(1).tolist()
    return [int(rows.sum())]


@given(_pattern_and_saliency())
def test_masks_keep_as_many_as_asked_and_nest(case: tuple[Pattern, Tensor]) -> None:
    pattern, saliency = case
    units = pattern.units(saliency.shape)
    assert saliency.numel() % units == 0
    smaller = torch.zeros(saliency.shape, dtype=torch.bool)
    for keep in range(pattern.min_units, units + 1):
        mask = pattern.keep_mask(saliency, keep)
        assert (mask.shape, mask.dtype) == (saliency.shape, torch.bool)
        assert set(_units_kept(pattern, mask)) == {keep}
        assert int(mask.sum()) * units == keep * mask.numel()
        assert not bool((smaller & ~mask).any()), "nested"
        smaller = mask
    assert bool(smaller.all())


@given(_pattern_and_saliency(), st.data())
def test_the_best_stay(case: tuple[Pattern, Tensor], data: st.DataObject) -> None:
    pattern, saliency = case
    keep = data.draw(st.integers(pattern.min_units, pattern.units(saliency.shape)))
    mask = pattern.keep_mask(saliency, keep)
    scores = pattern.unit_scores(saliency)
    assert (scores.shape, scores.dtype) == ((pattern.units(saliency.shape),), torch.float64)
    # With the sums of units as their worth, no other choice of `keep` units keeps more.
    best = scores.sort(descending=True).values[:keep].sum()
    assert saliency.double()[mask].sum() == best


def test_of_equal_units_the_lower_index_goes_first() -> None:
    saliency = torch.tensor([[1.0, 2.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]])
    assert SingleWeights().keep_mask(saliency, 4).int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    assert NOfM(2, 4).keep_mask(saliency, 2).int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
    assert Blocks(1, 2).keep_mask(saliency, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert Blocks(1, 2).keep_mask(torch.ones(2, 4), 1).int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_units_by_example() -> None:
    saliency = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 5.0, 6.0, 7.0]])
    assert SingleWeights().unit_scores(saliency).tolist() == saliency.flatten().tolist()
    assert NOfM(1, 4).unit_scores(saliency).tolist() == [12.0, 10.0, 8.0, 6.0]
    assert NOfM(1, 4).keep_mask(saliency, 1).int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert Blocks(2, 2).unit_scores(saliency).tolist() == [18.0, 18.0]
    assert (SingleWeights().units((2, 3, 4)), NOfM(2, 4).units((2, 8)), Blocks(2, 4).units((4, 2, 2, 2))) == (24, 4, 4)
    assert (SingleWeights().min_units, NOfM(2, 4).min_units, Blocks(2, 4).min_units) == (1, 2, 1)


def test_a_million_weights_with_many_ties_keep_the_exact_number() -> None:
    saliency = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0)).sub(0.5).clamp(min=0)
    for granularity in GRANULARITIES:
        pattern = parse_granularity(granularity, block_shape=(16, 16))
        units = pattern.units(saliency.shape)
        keep = max(pattern.min_units, units // 3)
        assert int(pattern.keep_mask(saliency, keep).sum()) == keep * saliency.numel() // units


def test_names_of_granularities() -> None:
    assert parse_granularity("weight") == SingleWeights()
    assert parse_granularity("2:4") == NOfM(2, 4)
    assert parse_granularity("block", block_shape=(16, 1)) == Blocks(16, 1)
    assert [str(parse_granularity(name)) for name in GRANULARITIES] == [
        *("weight", "1:2", "2:4", "3:8", "block 8x8", "filter"),
    ]
    assert hash(NOfM(2, 4)) == hash(parse_granularity("2:4"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "structured",
            r"granularity 'structured': choose 'weight', 'n:m' such as '2:4', 'block', or 'filter' \('structured' rem",
        ),
        ("channel", r"granularity 'channel': choose 'weight', 'n:m' such as '2:4', 'block', or 'filter'$"),
        ("2:4:8", "granularity '2:4:8': choose"),
        ("-2:4", "granularity '-2:4': choose"),
        ("4:4", "granularity '4:4': n of m weights stay, so 1 <= n < m, e.g. '2:4'"),
        ("0:4", "granularity '0:4': n of m weights stay"),
    ],
)
def test_unknown_granularities_list_the_choices(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_granularity(name)


def test_a_block_has_a_size() -> None:
    with pytest.raises(ValueError, match=r"block_shape=\(0, 4\): both have to be 1 or more"):
        parse_granularity("block", block_shape=(0, 4))


def test_layers_that_do_not_divide_are_named_with_the_remedy() -> None:
    name = "layers.0.blocks.0.mlp.fc1.weight"
    for pattern in (SingleWeights(), NOfM(2, 4), Blocks(2, 4)):
        pattern.check(name, (4, 12))
    with pytest.raises(
        ValueError, match=f"{name}: 10 input weights are no multiple of 4, .*leave the layer out, or ch"
    ):
        NOfM(2, 4).check(name, (4, 10))
    for shape in ((3, 8), (4, 6)):
        with pytest.raises(
            ValueError, match=f"{name}: a weight of {shape[0]} x {shape[1]} is not divided by blocks of 2"
        ):
            Blocks(2, 4).check(name, shape)
    for pattern in (NOfM(2, 4), Blocks(2, 4), FilterChannels()):
        with pytest.raises(
            ValueError, match=rf"fc1.bias: shape \(8,\) has no rows and columns for granularity '{pattern}"
        ):
            pattern.check("fc1.bias", (8,))
    with pytest.raises(ValueError, match=r"fc1.weight: a weight of shape \(0, 4\) is empty"):
        SingleWeights().check("fc1.weight", (0, 4))


@pytest.mark.parametrize(("granularity", "keep"), [("weight", 0), ("weight", 33), ("2:4", 1), ("2:4", 5), ("block", 0)])
def test_too_few_or_too_many_units_are_refused(granularity: str, keep: int) -> None:
    pattern = parse_granularity(granularity, block_shape=(2, 4))
    least, most = pattern.min_units, pattern.units((4, 8))
    with pytest.raises(ValueError, match=rf"keep={keep}: .* of shape \(4, 8\) keeps {least} to {most}"):
        pattern.keep_mask(torch.rand(4, 8), keep)


def test_a_saliency_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the saliency of shape \(2, 4\) is not finite; are there NaN weights"):
        SingleWeights().keep_mask(torch.full((2, 4), math.nan), 3)
