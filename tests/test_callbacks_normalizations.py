"""Mean and std are found wherever a dataset holds them, by reading alone, and only if the images fit them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning import Callback
from support.callback_cases import make_trainer
from support.ddp_cases import ddp
from support.qat_cases import Plain
from support.rank_cases import on_ranks
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.transforms import Compose, Normalize, v2

from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.callbacks.calibration import Sample, normalization
from swincompress_pl.callbacks.normalizations import normalizations_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STATED = {"mean": list(MEAN), "std": list(STD)}


class Pictures(Dataset[Any]):
    """Normalized pixels from 40 to 200, which do not tell by themselves; attributes as given."""

    def __init__(self, **attributes: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(40, 200, (24, 3, 16, 16), generator=generator)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        return Normalize(MEAN, STD)(self.pixels[index] / 255), index % 3


class Constants:
    """Numbers of the class."""

    mean, std = MEAN, STD


class Slots:
    __slots__ = ("mean", "std", "unset")

    def __init__(self) -> None:
        self.mean, self.std = np.array(MEAN), torch.tensor(STD)


class Named(NamedTuple):
    mean: Any = MEAN
    std: Any = STD


class InPixels:
    """As albumentations and mmcv have it."""

    def __init__(self) -> None:
        self.mean, self.std = [255 * m for m in MEAN], [255 * s for s in STD]


class Processor:
    image_mean, image_std = MEAN, STD


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))


class OfClass(Pictures):
    preprocess = Compose([Normalize(MEAN, STD)])


def closure() -> Callable[[Tensor], Tensor]:
    normalize = Normalize(MEAN, STD)
    return lambda image: normalize(image)


HOLDERS: dict[str, Callable[[], Dataset[Any]]] = {
    "t": lambda: Pictures(t=Compose([nn.Identity(), Normalize(MEAN, STD)])),
    "transform": lambda: Pictures(transform=Normalize(MEAN, STD)),
    "v2 by another name": lambda: Pictures(preprocess=v2.Compose([v2.Identity(), v2.Normalize(list(MEAN), list(STD))])),
    "in a dictionary": lambda: Pictures(tfms={"train": None, "val": nn.Sequential(Normalize(MEAN, STD))}),
    "constants of a class": lambda: Pictures(tfm=Constants()),
    "transform of the class": OfClass,
    "slots": lambda: Pictures(tfm=Slots()),
    "named tuple": lambda: Pictures(_config=Named()),
    "dictionary": lambda: Pictures(config={"data": {"mean": MEAN, "std": STD}}),
    "itself": lambda: Pictures(mean=MEAN, std=STD),
    "buffers": lambda: Pictures(aug=Buffers()),
    "pixels": lambda: Pictures(aug=InPixels()),
    "processor": lambda: Pictures(processor=Processor()),
    "partial": lambda: Pictures(t=partial(print, mean=MEAN, std=STD)),
    "closure": lambda: Pictures(t=closure()),
    "method": lambda: Pictures(t=Normalize(MEAN, STD).forward),
    "nested": lambda: Subset(ConcatDataset([Subset(Pictures(t=[Normalize(MEAN, STD)]), range(24))]), range(20)),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_it_is_found(kind: str) -> None:
    (held,) = normalizations_in([DataLoader(HOLDERS[kind]())], 3)
    assert held.preprocessing == STATED
    assert held.place.startswith("DataLoader.dataset.") or kind == "itself"


def test_a_single_number_is_that_of_all_channels() -> None:
    (held,) = normalizations_in([Pictures(t=Normalize(0.5, (0.25,)))], 3)
    assert held.preprocessing == {"mean": [0.5] * 3, "std": [0.25] * 3}


def test_only_means_with_deviations_in_range_count() -> None:
    wrong = [Normalize((0.1, 0.2), (0.1, 0.2)), Normalize(MEAN, (0.1, 0.0, 0.2)), Normalize((-0.1, 0, 0), STD)]
    assert (
        normalizations_in([Pictures(a=wrong, b={"mean": MEAN}, c={"mean": "no", "std": STD}, d=[MEAN, STD])], 3) == []
    )
    twice = Pictures(a=Normalize(MEAN, STD), b=Normalize([m + 1e-5 for m in MEAN], STD))
    assert len(normalizations_in([twice], 3)) == 1


def test_nothing_of_the_users_runs_and_circles_end() -> None:
    class Runs:
        @property
        def transform(self) -> Any:
            raise AssertionError("a property ran")

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"__getattr__({name!r}) ran")

        def __call__(self, *_: Any) -> Any:
            raise AssertionError("it was called")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("it was compared")

        __hash__ = None  # type: ignore[assignment]

    circle: list[Any] = [Runs()]
    circle.append(circle)
    dataset = Pictures(a=circle, samples=list(range(10_000)), t=Normalize(MEAN, STD))
    vars(dataset)["me"] = dataset
    assert len(normalizations_in([dataset], 3)) == 1


class Kept(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        (callback,) = (each for each in trainer.callbacks if isinstance(each, QuantizationAwareTraining))
        self.found = callback._found_preprocessing
        trainer.should_stop = True


def found_in(folder: Path, dataset: Dataset[Any], batch_size: int = 4, **options: Any) -> dict[str, Any]:
    """What a fit finds, in which nothing else says how the images are normalized."""
    module, kept = Plain(), Kept()
    module.backbone.pretrained_cfg = {}  # type: ignore[assignment]
    vars(module.backbone).pop("preprocessing", None)
    qat = QuantizationAwareTraining(start_epoch=1, method="max", model_attribute="backbone", calibration_images=8)
    trainer = make_trainer(folder, 2, qat, kept, num_sanity_val_steps=0, limit_train_batches=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fit ends before anything is quantized
        trainer.fit(module, DataLoader(dataset, batch_size), DataLoader(dataset, batch_size))
    assert kept.found is not None
    return {name: kept.found[name] for name in ("mean", "std")}


@pytest.mark.parametrize("kind", ["t", "v2 by another name", "nested", "closure"])
def test_a_fit_takes_it(tmp_path: Path, kind: str) -> None:
    assert found_in(tmp_path, HOLDERS[kind]()) == STATED


def test_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    other = Normalize((0.1, 0.2, 0.9), (0.21, 0.23, 0.29))
    assert found_in(tmp_path, Pictures(a=other, b=Normalize(MEAN, STD))) == STATED


def test_one_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no attribute of the dataset \(Pictures\).*Loader.dataset.a \(mean \[0.1.* do not fit"
    ):
        found_in(tmp_path, Pictures(a=Normalize((0.1, 0.2, 0.9), (0.21, 0.23, 0.29))))
    with pytest.raises(ValueError, match=r"no attribute of the dataset \(Subset\).*the first 20 images do not cover"):
        found_in(tmp_path, Subset(Pictures(), range(20)))


def test_what_a_network_states_of_the_crop_is_stored_only_with_its_mean_and_std() -> None:
    """The images tell mean and std. The rest of timm's description is assumed, and may be of other images."""
    dataset = Pictures(a=Normalize(MEAN, STD))
    images = torch.stack([dataset[number][0] for number in range(8)])
    network = nn.Identity()
    framing = {"crop_pct": 0.9, "interpolation": "bilinear"}
    for mean, kept in ((list(MEAN), True), ([0.485, 0.456, 0.406], False), ([0.5], False)):
        network.pretrained_cfg = {"mean": mean, "std": list(STD), **framing}  # type: ignore[assignment]
        found = normalization(None, None, network, Sample(images, ()), [DataLoader(dataset, 4)])
        assert found == {"height": 16, "width": 16, **STATED} | (framing if kept else {})
    network.preprocessing = {"mean": [0.1] * 3, "std": [0.1] * 3, **framing}  # type: ignore[assignment]
    found = normalization(None, None, network, Sample(images, ()), [DataLoader(dataset, 4)])
    assert found == {"height": 16, "width": 16, **STATED, **framing}


def test_several_that_fit_are_refused(tmp_path: Path) -> None:
    shifted = tuple(m + 10 / 255 for m in MEAN)  # other pixels, but whole ones in range
    with pytest.raises(
        ValueError, match=r"fit several normalizations: .*dataset.a .* and .*dataset.b .*preprocessing="
    ):
        found_in(tmp_path, Pictures(a=Normalize(MEAN, STD), b=Normalize(shifted, STD)))


class Telling(Pictures):
    """Only its second image shows black and white: rank 1 has it of two ranks, and it is in no first batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels[1] = torch.arange(256).view(16, 16)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_ranks_find_what_a_single_process_does(tmp_path: Path, batch_size: int) -> None:
    alone = found_in(tmp_path / "alone", Telling(), batch_size)
    assert alone["mean"] == pytest.approx(MEAN, abs=1e-4)
    ranks = on_ranks(
        tmp_path / "ranks", 2, lambda rank: found_in(tmp_path, Telling(), batch_size, devices=2, strategy=ddp())
    )
    assert ranks == [alone, alone]


def test_all_ranks_refuse_what_a_single_process_does(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        with pytest.raises(ValueError, match="nothing says") as failure:
            found_in(tmp_path, Pictures(), devices=2, strategy=ddp())
        return str(failure.value)

    with pytest.raises(ValueError, match="nothing says") as alone:
        found_in(tmp_path / "alone", Pictures())
    assert on_ranks(tmp_path / "ranks", 2, work) == [str(alone.value)] * 2
