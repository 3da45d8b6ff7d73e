"""Order, augmentation and splits are functions of (seed, epoch, index)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swincompress_pl.data import CropAndColor, PadCropFlip, Preprocessing, ShiftRotate
from swincompress_pl.data.augmentation import Augmentation
from swincompress_pl.data.dataset import ImageDataset, MemoryImages
from swincompress_pl.data.sampling import (
    EpochIndex,
    EpochSampler,
    Purpose,
    derive_seed,
    seeded_torch,
    stratified_sample,
)

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(lambda labels: np.array(labels, dtype=np.int64))
AUGMENTATIONS: list[Augmentation] = [
    CropAndColor(randaugment_operations=2, color_jitter=0.4),
    PadCropFlip(),
    ShiftRotate(),
]


def dataset_of(count: int, augmentation: Augmentation | None = None, seed: int = 0) -> ImageDataset:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    source = MemoryImages(pixels, np.arange(count, dtype=np.int64))
    preprocessing = Preprocessing(height=12, width=12)
    return ImageDataset(source, np.arange(count), preprocessing, augmentation=augmentation, seed=seed)


@given(labels=LABELS, seed=st.integers(0, 5), data=st.data())
def test_stratified_sample_is_within_one_of_the_proportion(labels: np.ndarray, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(labels)))
    chosen = stratified_sample(labels, count, seed)
    assert np.array_equal(chosen, stratified_sample(labels, count, seed))
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert np.array_equal(chosen, np.sort(chosen))
    for label in np.unique(labels):
        share = count * np.mean(labels == label)
        assert abs(np.sum(labels[chosen] == label) - share) < 1


def test_stratified_sample_depends_on_the_seed_and_refuses_too_many() -> None:
    labels = np.zeros(100, dtype=np.int64)
    assert not np.array_equal(stratified_sample(labels, 10, 0), stratified_sample(labels, 10, 1))
    with pytest.raises(ValueError, match="cannot take 101 of 100"):
        stratified_sample(labels, 101, 0)


@given(count=st.integers(1, 50), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation_that_can_be_repeated(count: int, seed: int, epoch: int) -> None:
    sampler = EpochSampler(dataset_of(count), seed)
    sampler.set_epoch(epoch)
    requests = list(sampler)
    assert requests == list(sampler)
    assert {request.epoch for request in requests} == {epoch}
    assert sorted(request.item for request in requests) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed in range(3):
        sampler = EpochSampler(dataset_of(50), seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.add(tuple(request.item for request in sampler))
    assert len(orders) == 9


@given(count=st.integers(1, 30), ranks=st.integers(1, 4))
def test_ranks_share_the_permutation(count: int, ranks: int) -> None:
    alone = EpochSampler(dataset_of(count), seed=7)
    order = [request.item for request in alone]
    shares = []
    for rank in range(ranks):
        sampler = EpochSampler(dataset_of(count), seed=7)
        sampler.num_replicas, sampler.rank = ranks, rank
        sampler.num_samples = -(-count // ranks)
        sampler.total_size = sampler.num_samples * ranks
        shares.append([request.item for request in sampler])
    assert {len(share) for share in shares} == {-(-count // ranks)}
    dealt = [item for step in zip(*shares, strict=True) for item in step]
    assert dealt[:count] == order


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: type(augmentation).__name__)
def test_augmentation_is_a_function_of_seed_epoch_and_item(augmentation: Augmentation) -> None:
    first, again = dataset_of(6, augmentation), dataset_of(6, augmentation)
    forward = [first[EpochIndex(epoch, item)][0] for epoch in range(3) for item in range(6)]
    torch.manual_seed(123)  # what the global generator does must not matter, nor the order of requests
    backward = [again[EpochIndex(epoch, item)][0] for epoch in (2, 1, 0) for item in range(5, -1, -1)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert all(image.shape == (12, 12, 3) and image.dtype == torch.uint8 for image in forward)
    assert len({image.numpy().tobytes() for image in forward}) > 12  # epochs differ
    other = dataset_of(6, augmentation, seed=1)
    assert any(not torch.equal(forward[item], other[EpochIndex(0, item)][0]) for item in range(6))


def test_a_bare_index_means_epoch_zero() -> None:
    dataset = dataset_of(4, PadCropFlip())
    assert torch.equal(dataset[2][0], dataset[EpochIndex(0, 2)][0])


def test_without_augmentation_the_epoch_does_not_matter() -> None:
    dataset = dataset_of(4)
    assert torch.equal(dataset[EpochIndex(0, 2)][0], dataset[EpochIndex(5, 2)][0])


def test_seeded_torch_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded_torch(99):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_purposes_have_their_own_streams() -> None:
    seeds = {derive_seed(seed, purpose, 0) for seed in range(4) for purpose in Purpose}
    assert len(seeds) == 4 * len(Purpose)


@given(padding=st.integers(0, 6), flip=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_pad_crop_flip_only_moves_pixels(padding: int, flip: bool, seed: int) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1).repeat(3, -1) + 1
    with seeded_torch(seed):
        image = Image.fromarray(pixels)
        moved = PadCropFlip(padding_px=padding, flip=flip).apply(image, Preprocessing(height=8, width=8))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(pixels[..., 0], padding), (8, 8)).reshape(-1, 8, 8)
    candidates = [*windows, *(window[:, ::-1] for window in windows)] if flip else list(windows)
    assert any(np.array_equal(moved[..., 0], candidate) for candidate in candidates)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropAndColor(area_min=0), "area_min is 0"),
        (lambda: CropAndColor(randaugment_operations=-1), "randaugment_operations is -1"),
        (lambda: CropAndColor(randaugment_magnitude=31), "randaugment_magnitude is 31"),
        (lambda: CropAndColor(color_jitter=2), "color_jitter is 2"),
        (lambda: PadCropFlip(padding_px=-1), "padding_px is -1"),
        (lambda: ShiftRotate(shift_px=-1), "shift_px is -1"),
        (lambda: ShiftRotate(rotation_deg=181), "rotation_deg is 181"),
    ],
)
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
