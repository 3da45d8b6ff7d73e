"""Event data as spikingjelly's CIFAR10-DVS class gives it: trained on, pruned, accounted for, restored."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import spikingjelly.configure
import torch
from lightning import LightningDataModule
from support.callback_cases import make_trainer
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from swincompress_pl.callbacks import PrimeSVT, QuantizationAwareTraining
from swincompress_pl.cli import export
from swincompress_pl.data import Preprocessing
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.report import spiking_cost

T, SIZE_PX, CLASSES = 3, 32, 4
NETWORK = {"T": T, "in_channels": 2, "embed_dims": 16, "num_heads": 2, "depths": 2, "pooling_stat": "0011"}


def cifar10_dvs() -> Any:
    """spikingjelly's class; its package imports torchaudio for speech, which refuses to load beside a newer torch."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS
    finally:
        if not hasattr(sys.modules.get("torchaudio"), "__version__"):
            sys.modules.pop("torchaudio", None)
    return CIFAR10DVS


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Dataset[Any]:
    """Recordings in the layout of CIFAR10-DVS, 128 x 128; a class has its events in a quarter of the sensor."""
    root, rng = tmp_path_factory.mktemp("dvs"), np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / "events_np" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(6):
            count = 4000
            columns, rows = rng.integers(0, 64, (2, count)) + 64 * np.array([[label % 2], [label // 2]])
            stamps = np.sort(rng.integers(0, 1_000_000, count))
            np.savez(folder / f"{number}.npz", t=stamps, x=columns, y=rows, p=rng.integers(0, 2, count))

    def smaller(frames: Any) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(torch.as_tensor(frames).float(), 128 // SIZE_PX)

    # One thread: CPython 3.11 counts the recursion of `ast` for all threads together, and reading .npz files uses it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikingjelly.configure, "max_threads_number_for_datasets_preprocess", 1)
        return cifar10_dvs()(str(root), data_type="frame", frames_number=T, split_by="number", transform=smaller)  # type: ignore[no-any-return]


def loader(events: Dataset[Any], *, start: int) -> DataLoader[Any]:
    return DataLoader(Subset(events, range(start, 24, 2)), batch_size=4)


def classifier() -> CompressibleClassifier:
    torch.manual_seed(0)
    module = CompressibleClassifier("SpikeDrivenTransformer", CLASSES, model_kwargs=NETWORK)
    for part in module.net.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(part.weight, 2.0, 0.5)
            torch.nn.init.normal_(part.bias, 1.0, 1.0)
    return module


def test_events_have_the_layout_that_networks_take(events: Dataset[Any]) -> None:
    frames, label = events[7]
    assert frames.shape == (T, 2, SIZE_PX, SIZE_PX)
    assert label == 1
    assert float(frames.sum()) * (128 // SIZE_PX) ** 2 == 4000
    batch, _ = next(iter(loader(events, start=0)))
    assert batch.shape == (4, T, 2, SIZE_PX, SIZE_PX)
    network = classifier().net.eval()
    with torch.no_grad():
        assert network(batch).shape == (4, CLASSES)
        # a time step counts: the same events in another order are another input
        assert not torch.equal(network(batch), network(batch.flip(1)))
    with pytest.raises(ValueError, match=r"takes images \(N, C, H, W\) or events \(N, T, C, H, W\), not \(4, 3\)"):
        network(torch.zeros(4, 3))


def test_a_fit_on_events_prunes_and_is_restored(events: Dataset[Any], tmp_path: Path) -> None:
    module = classifier()
    pruning = PrimeSVT(
        tolerance=100.0, min_memory_saving=0.05, rates=(0.1, 0.25), round_to=1, max_sparsity=0.5, start_epoch=1,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, 2, pruning)
    before = spiking_cost(module.net, next(iter(loader(events, start=1)))[0])
    trainer.fit(module, loader(events, start=0), loader(events, start=1))
    assert pruning.result is not None
    assert pruning.result.met
    batch, _ = next(iter(loader(events, start=1)))
    after = spiking_cost(module.net, batch)
    assert after.parameters == pruning.result.parameters_after < before.parameters
    assert after.dense_macs == pruning.result.macs_after < before.dense_macs
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval()(batch))


EVENTS = {"mean": (0.0, 0.0), "std": (1 / 255, 1 / 255), "height": SIZE_PX, "width": SIZE_PX, "time_steps": T}


class Counts(LightningDataModule):
    """Counts of events; subclasses and tests say how they are described."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)

    def train_dataloader(self) -> DataLoader[Any]:
        frames = torch.randint(0, 6, (4, T, 2, SIZE_PX, SIZE_PX), generator=torch.Generator().manual_seed(0)).float()
        return DataLoader(TensorDataset(frames, torch.arange(4) % CLASSES), batch_size=4)

    val_dataloader = train_dataloader


def test_a_datamodule_describes_events_by_a_mapping(tmp_path: Path) -> None:
    module = classifier()
    data = Counts(preprocessing=EVENTS, class_names=("a", "b", "c", "d"))
    trainer = make_trainer(tmp_path, 1, QuantizationAwareTraining(start_epoch=0, method="max"))
    trainer.fit(module, datamodule=data)
    described = {**EVENTS, "mean": [0.0, 0.0], "std": [1 / 255, 1 / 255]}
    assert module.input_description == {"preprocessing": described, "class_names": ["a", "b", "c", "d"]}
    assert module.net.to_program().time_steps == T
    assert module.net.classes == ("a", "b", "c", "d")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.input_description == module.input_description


@pytest.mark.parametrize(
    ("attributes", "description"),
    [
        ({}, {}),
        ({"preprocessing": None, "class_names": ["a"]}, {}),
        ({"preprocessing": {"mean": [0], "std": [1]}}, {"preprocessing": {"mean": [0.0], "std": [1.0]}}),
        ({"preprocessing": Preprocessing(), "class_names": None}, {"preprocessing": Preprocessing().to_dict()}),
    ],
)
def test_what_a_datamodule_does_not_say_is_left_out(
    attributes: dict[str, Any], description: dict[str, Any], tmp_path: Path
) -> None:
    module = classifier()
    make_trainer(tmp_path, 1).validate(module, datamodule=Counts(**attributes), verbose=False)
    assert module.input_description == description


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({**EVENTS, "mean": (0.0,)}, r"preprocessing\['mean'\] has length 1 and preprocessing\['std'\] has length 2"),
        ({"mean": (0.0, 0.0)}, r"preprocessing\['std'\] is None"),
        ({**EVENTS, "std": (255.0, 255.0)}, r"preprocessing\['std'\] is .*; it is given in \[0, 1\] units"),
        ({**EVENTS, "timesteps": 3}, "preprocessing has unknown keys: 'timesteps'; there are mean, std, .*time_steps"),
        ({**EVENTS, "time_steps": 0}, r"preprocessing\['time_steps'\]=0: it has to be 1 or more, an integer"),
        ({**EVENTS, "height": "32"}, r"preprocessing\['height'\]='32': it has to be 1 or more, an integer"),
        ({**EVENTS, "interpolation": 3}, r"preprocessing\['interpolation'\]=3: it has to be a name"),
        (len, r"preprocessing is <built-in function len>; it must be a mapping with 'mean' and 'std'"),
    ],
)
def test_a_wrong_description_of_the_input_is_refused(preprocessing: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"the datamodule Counts: {message}"):
        make_trainer(tmp_path, 1).validate(classifier(), datamodule=Counts(preprocessing=preprocessing))


def test_export_quantizes_on_a_datamodule_with_a_mapping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = Counts(preprocessing=EVENTS)
    data.calibration_dataloader = lambda images: data.train_dataloader()
    monkeypatch.setattr(export, "load_data", lambda config, root: data)
    config = tmp_path / "data.yaml"
    config.touch()
    given = Namespace(data=str(config), data_root=None, images=4, bits=None, quantize="max")
    quantized = export._quantize(classifier().net, given)
    assert quantized.to_program().time_steps == T
    assert quantized.classes is None
