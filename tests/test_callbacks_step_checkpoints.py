"""Fits that go on from a checkpoint written after any batch: every round and the exchange happen, once."""

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
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.history import history_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*mid-epoch.*:UserWarning"),
]
BATCHES, EPOCHS = 2, 3


def pruning(**options: Any) -> AdaptiveIterativePruning:
    settings: dict[str, Any] = options if options else {"kinds": ("mlp",), "round_to": 1}
    return AdaptiveIterativePruning(tolerance=90.0, step=0.25, max_rounds=2, start_epoch=1, **settings)


def qat(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(start_epoch=1, method="max", calibration_images=8, **options)


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "rounds": lambda: [pruning()],
    "masks": lambda: [pruning(granularity="weight")],
    "integers": lambda: [qat(freeze_epoch=2)],
    "both": lambda: [pruning(), qat(learn_scales=False)],
}


def loader() -> DataLoader[Any]:
    pixels, labels = pixels_and_labels(16, 2)
    return DataLoader(TensorDataset(normalized(pixels), labels), 16 // BATCHES)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_every_step_checkpoint_leads_to_the_same_end(tmp_path: Path, kind: str) -> None:
    """The same network everywhere, and at an epoch's end, where Lightning's loader starts over, the same weights."""

    def fit(name: str, **options: Any) -> Own:
        keep = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=1)
        module = Own("tuple")
        make_trainer(tmp_path, EPOCHS, *CALLBACKS[kind](), keep).fit(module, loader(), loader(), **options)
        return module

    whole = fit("whole")
    assert history_of(whole.net)
    for step in range(1, BATCHES * EPOCHS + 1):
        resumed = fit("resumed", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt", weights_only=False)
        assert shapes(resumed) == shapes(whole), step
        assert [list(entry) for entry in history_of(resumed.net)] == [list(entry) for entry in history_of(whole.net)]
        if step % BATCHES == 0:
            state = whole.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in resumed.state_dict().items()), step
