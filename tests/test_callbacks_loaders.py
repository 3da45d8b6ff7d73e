"""What is read beside the fit leaves its own data alone: the same batches come as without the callbacks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.utilities import CombinedLoader
from support.callback_cases import make_trainer
from support.matrix_cases import MEAN, STD, Own, normalized, pixels_and_labels
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.callbacks.loaders import given_loaders, undisturbed

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
COUNT = 48
PREPROCESSING = {"mean": MEAN, "std": STD}


class Numbered(Dataset[Any]):
    """Images with their number, and noise of a generator of its own; a transform has another, and counts."""

    def __init__(self) -> None:
        pixels, self.labels = pixels_and_labels(COUNT, 1)
        self.images = normalized(pixels)
        self.generator = np.random.default_rng(0)
        self.transform = Jitter()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        noise = float(self.generator.random()) * 1e-3
        return self.transform(self.images[index] + noise), self.labels[index], index


class Jitter:
    def __init__(self) -> None:
        self.generator, self.calls = random.Random(1), 0

    def __call__(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image + self.generator.random() * 1e-3 + self.calls * 1e-6


class Stream(IterableDataset[Any]):
    """Goes on where it was: an epoch is a part of it."""

    def __init__(self) -> None:
        self.data, self.place = Numbered(), 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(24):
            self.place += 1
            yield self.data[self.place % COUNT]


class ByEpoch(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.epoch)).tolist())


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Numbered(), 8, shuffle=True),
    "own generator": lambda: DataLoader(Numbered(), 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "sampler with state": lambda: DataLoader(Numbered(), 8, sampler=ByEpoch()),
    "part of a dataset": lambda: DataLoader(Subset(Numbered(), range(20, 44)), 8, shuffle=True),
    "persistent workers": lambda: DataLoader(Numbered(), 8, shuffle=True, num_workers=1, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), 8),
    "stream of a worker": lambda: DataLoader(Stream(), 8, num_workers=1, persistent_workers=True),
    "combined": lambda: CombinedLoader(
        {"first": DataLoader(Numbered(), 8, shuffle=True), "second": DataLoader(Numbered(), 4, shuffle=True)},
        "min_size",
    ),
    "dictionary": lambda: {"first": DataLoader(Numbered(), 8, shuffle=True), "second": DataLoader(Numbered(), 4)},
}
CALLBACKS: dict[str, Callable[[], Callback]] = {
    "quantization": lambda: QuantizationAwareTraining(
        start_epoch=0, calibration_images=COUNT, learn_scales=False, method="max", preprocessing=PREPROCESSING
    ),
    "gradients": lambda: AdaptiveIterativePruning(tolerance=90.0, criterion="taylor", max_rounds=1, start_epoch=1),
}


class Watch(Own):
    def __init__(self) -> None:
        super().__init__("tuple")
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mine = batch["first"] if isinstance(batch, dict) else batch
        self.seen.append((mine[2].tolist(), float(mine[0].double().sum())))
        return super().training_step(batch, batch_idx)


def batches_of_a_fit(tmp_path: Path, loader: Any, *callbacks: Callback) -> list[tuple[list[int], float]]:
    module = Watch()  # before the seeds: the first one is trained
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    trainer = make_trainer(tmp_path, 2, *callbacks, num_sanity_val_steps=0, limit_val_batches=2)
    trainer.fit(module, loader, LOADERS["shuffled"]())
    return module.seen


@pytest.mark.parametrize("kind", LOADERS)
def test_a_fit_trains_on_the_same_batches(tmp_path: Path, kind: str) -> None:
    alone = batches_of_a_fit(tmp_path, LOADERS[kind]())
    for callback in CALLBACKS.values():
        assert batches_of_a_fit(tmp_path, LOADERS[kind](), callback()) == alone


def test_a_stream_that_can_be_read_only_once_is_refused_by_name(tmp_path: Path) -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.source = iter(Numbered()[index] for index in range(COUNT))

        def __iter__(self) -> Iterator[Any]:
            return self.source

    module = Watch()
    with pytest.raises(ValueError, match=r"Once.source is of type generator.*only once.*calibration_dataloader="):
        make_trainer(tmp_path, 1, CALLBACKS["quantization"]()).fit(module, DataLoader(Once(), 8), LOADERS["shuffled"]())
    assert module.seen == []
    callback = QuantizationAwareTraining(
        start_epoch=0, method="max", preprocessing=PREPROCESSING, calibration_dataloader=LOADERS["shuffled"]()
    )
    make_trainer(tmp_path, 1, callback).fit(module, DataLoader(Once(), 8), LOADERS["shuffled"]())
    assert len(module.seen) == COUNT // 8


def test_limits_hold_for_calibration_and_scoring(tmp_path: Path) -> None:
    seen: set[int] = set()

    class Reads(Watch):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.update(batch[2].tolist())
            super().validation_step(batch, batch_idx)

    ordered = DataLoader(Numbered(), 8)
    callbacks = [
        CALLBACKS["quantization"](),
        AdaptiveIterativePruning(tolerance=90.0, criterion="taylor", max_rounds=1),
    ]
    trainer = make_trainer(tmp_path, 1, *callbacks, limit_train_batches=3, limit_val_batches=2)
    trainer.fit(Reads(), ordered, ordered)
    assert seen == set(range(24))


@pytest.mark.parametrize("monitor", [None, "val/top1"])
def test_validation_loaders_read_together_are_one_holdout(tmp_path: Path, monitor: str | None) -> None:
    class Together(Watch):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch["one"] if isinstance(batch, dict) else batch, batch_idx)

    callback = AdaptiveIterativePruning(tolerance=90.0, max_rounds=1, monitor=monitor)
    both = CombinedLoader({"one": DataLoader(Numbered(), 16), "other": DataLoader(Numbered(), 8)}, "min_size")
    make_trainer(tmp_path, 1, callback).fit(Together(), LOADERS["shuffled"](), both)
    assert callback.search_state is not None
    images = 0 if monitor else COUNT  # a metric's hold-out has no known size
    assert callback.search_state.scoring["naive_images"] % max(1, images) == 0
    assert callback.search_state.baseline_score > 50


def test_a_copy_shares_data_and_has_its_own_state() -> None:
    loader = DataLoader(Numbered(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(loader.generator.get_state())
    passes = [[batch[2].tolist() for batch in undisturbed(loader)] for _ in range(2)]
    assert passes[0] == passes[1] == [batch[2].tolist() for batch in loader]
    assert not torch.equal(loader.generator.get_state(), before)  # moved by its own pass alone
    assert loader.dataset.transform.calls == COUNT  # type: ignore[attr-defined]
    assert given_loaders([undisturbed(loader)]) == [loader]
