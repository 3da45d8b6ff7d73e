"""Where a LightningModule holds its network: by a path, made late, or in a place that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from support.callback_cases import make_trainer
from support.matrix_cases import Own, network, normalized, pixels_and_labels
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.checkpoint.holder import held_by, network_of, put_network
from swincompress_pl.quant import QuantizedNetwork

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def loader() -> DataLoader[Any]:
    pixels, labels = pixels_and_labels(16, 1)
    return DataLoader(TensorDataset(normalized(pixels), labels), 8)


def inside(**places: Any) -> LightningModule:
    module = LightningModule()
    for name, place in places.items():
        setattr(module, name, place)
    return module


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda net: inside(net=net), "net"),
        (lambda net: inside(model=nn.Sequential(nn.Identity(), net)), "model.1"),
        (lambda net: inside(nets=nn.ModuleList([net])), "nets.0"),
        (lambda net: inside(nets=nn.ModuleDict({"student": net})), "nets.student"),
        (lambda net: inside(model=inside(backbone=net)), "model.backbone"),
        (lambda net: inside(net=torch.compile(net, backend="eager")), "net"),
    ],
)
def test_a_network_is_found_and_replaced_by_its_path(build: Callable[[nn.Module], LightningModule], path: str) -> None:
    mine = network()
    module = build(mine)
    assert network_of(module, path) is mine
    other = network()
    put_network(module, path, other)
    assert network_of(module, path) is other
    assert any(name.startswith(f"{path}.") for name in module.state_dict())


def test_a_wrong_path_names_the_networks_that_there_are() -> None:
    module = inside(model=inside(backbone=network()), head=nn.Linear(2, 2))
    with pytest.raises(
        AttributeError, match=r"model_attribute='net'.*model.backbone.*Pass model_attribute='model.back"
    ):
        held_by(module, "net")
    with pytest.raises(AttributeError, match=r"holds head, none of a supported family.*configure_model or setup"):
        held_by(inside(head=nn.Linear(2, 2)), "net")
    with pytest.raises(AttributeError, match=r"model_attribute='model\.7'"):
        held_by(module, "model.7")


@pytest.mark.parametrize("late", ["configure_model", "setup", "never"])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: AdaptiveIterativePruning(tolerance=90.0, max_rounds=1, step=0.25, round_to=1, kinds=("mlp",)),
        lambda: QuantizationAwareTraining(start_epoch=0, method="max", calibration_images=8),
    ],
)
def test_a_network_that_is_made_when_a_trainer_runs(tmp_path: Path, late: str, callback: Callable[[], Any]) -> None:
    class Late(Own):
        def make(self) -> None:
            self.other = nn.Linear(1, 1)

        def made(self) -> None:
            if not hasattr(self, "net"):
                self.net = network()

        def setup(self, stage: str) -> None:
            if late == "setup":
                self.made()

        def configure_model(self) -> None:
            if late == "configure_model":
                self.made()

    module = Late("tuple")
    trainer = make_trainer(tmp_path, 1, callback())
    if late == "never":
        with pytest.raises(AttributeError, match=r"model_attribute='net'.*configure_model"):
            trainer.fit(module, loader(), loader())
        return
    trainer.fit(module, loader(), loader())
    compressed: Any = network_of(module, "net")
    quantized = isinstance(compressed, QuantizedNetwork)
    assert quantized or compressed.blocks[0].mlp.fc1.out_features < 128


def test_a_second_place_of_a_network_that_will_be_exchanged_is_refused(tmp_path: Path) -> None:
    class Twice(Own):
        def make(self) -> None:
            super().make()
            self.backbone = nn.Sequential(self.net)

    class Unseen(Own):
        model_attribute = "nets.0"

        def make(self) -> None:
            self.nets = [network()]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.nets[0].parameters(), lr=1e-3)

    for kind, message in ((Twice, "at 'net' and at 'backbone.0' as well"), (Unseen, "plain list or dictionary")):
        callback = QuantizationAwareTraining(start_epoch=0, model_attribute=kind.model_attribute)
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, 1, callback).fit(kind("tuple"), loader(), loader())
