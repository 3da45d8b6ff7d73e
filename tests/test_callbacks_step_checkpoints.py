"""Fits that go on from a checkpoint written after any batch or epoch: all that is due happens, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import make_trainer, shapes
from support.matrix_cases import Own, normalized, pixels_and_labels
from support.qat_cases import loader as spiking_loader
from support.spiking_qat_cases import Spiking, spiking_qat
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.history import history_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*mid-epoch.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
]
BATCHES, EPOCHS = 2, 3


def pruning(**options: Any) -> AdaptiveIterativePruning:
    settings: dict[str, Any] = options if options else {"kinds": ("mlp",), "round_to": 1}
    return AdaptiveIterativePruning(tolerance=90.0, step=0.25, max_rounds=2, start_epoch=1, **settings)


def qat(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(start_epoch=1, method="max", calibration_images=8, **options)


def shot(**options: Any) -> PrimeSVT:
    search: dict[str, Any] = {"rates": (0.25,), "min_memory_saving": 0.05, "max_sparsity": 0.6, "round_to": 1}
    return PrimeSVT(tolerance=100.0, start_epoch=1, model_attribute="backbone", **search, **options)


def spiking_integers() -> QuantizationAwareTraining:
    return spiking_qat(start_epoch=2, calibration_images=8)  # type: ignore[no-any-return]


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "rounds": lambda: [pruning()],
    "masks": lambda: [pruning(granularity="weight")],
    "integers": lambda: [qat(freeze_epoch=2)],
    "both": lambda: [pruning(), qat(learn_scales=False)],
    "shot": lambda: [shot()],
    "filters": lambda: [shot(granularity="filter")],
    "shot, integers": lambda: [shot(), spiking_integers()],
}
SPIKING = ("shot", "filters", "shot, integers")


def loader(kind: str) -> DataLoader[Any]:
    if kind in SPIKING:
        images, labels = next(iter(DataLoader(spiking_loader().dataset, 16)))
    else:
        pixels, labels = pixels_and_labels(16, 2)
        images = normalized(pixels)
    return DataLoader(TensorDataset(images, labels), 16 // BATCHES)


def fit(
    folder: Path, kind: str, keep: ModelCheckpoint | None, trainer: dict[str, Any], ckpt: Path | None = None
) -> Any:
    module: Any = Spiking() if kind in SPIKING else Own("tuple")
    callbacks = [*CALLBACKS[kind](), *([] if keep is None else [keep])]
    run = make_trainer(folder, EPOCHS, *callbacks, **trainer)
    run.fit(module, loader(kind), loader(kind), ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module


def resumed_from_all(tmp_path: Path, kind: str, every: dict[str, Any], trainer: dict[str, Any]) -> int:
    """Resume a fit from all of its checkpoints; gives how many there were.

    The network is the same everywhere, and the weights where they are written at an epoch's end, since Lightning's
    loader starts over in its middle.
    """
    keep = ModelCheckpoint(tmp_path / "whole", "{epoch}-{step}", save_top_k=-1, **every)
    whole = fit(tmp_path, kind, keep, trainer)
    network = whole.backbone if kind in SPIKING else whole.net
    assert history_of(network)
    files = sorted((tmp_path / "whole").iterdir())
    for file in files:
        resumed = fit(tmp_path, kind, None, trainer, file)
        assert shapes(resumed) == shapes(whole), file.name
        again = resumed.backbone if kind in SPIKING else resumed.net
        assert [list(entry) for entry in history_of(again)] == [list(entry) for entry in history_of(network)]
        batches = torch.load(file, weights_only=False)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if batches["is_last_batch"]:
            state = whole.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in resumed.state_dict().items()), file.name
    return len(files)


def slow(*kinds: str) -> Any:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rounds", "masks", "integers", "both", "shot", *slow("filters", "shot, integers")])
def test_every_step_checkpoint_leads_to_the_same_end(tmp_path: Path, kind: str) -> None:
    assert resumed_from_all(tmp_path, kind, {"every_n_train_steps": 1}, {}) == BATCHES * EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rounds", "both", "shot, integers"])
@pytest.mark.parametrize("trainer", [{"accumulate_grad_batches": 2}, {"val_check_interval": 0.5}], ids=str)
@pytest.mark.parametrize("at_its_end", [True, False], ids=["after training", "after validation"])
def test_every_epoch_checkpoint_leads_to_the_same_end(
    tmp_path: Path, kind: str, trainer: dict[str, Any], at_its_end: bool
) -> None:
    """Steps of several batches, validations in an epoch's middle."""
    every = {"every_n_epochs": 1, "save_on_train_epoch_end": at_its_end}
    assert resumed_from_all(tmp_path, kind, every, trainer) >= EPOCHS
