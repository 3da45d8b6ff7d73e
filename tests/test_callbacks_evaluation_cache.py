"""The file of verdicts of the callback is about its module, hold-out and metric as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from support.callback_cases import Plain, data, loader, make_trainer
from support.spiking_cases import small_spikformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swincompress_pl.callbacks import PrimeSVT

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
]
ANOTHER = r"cache\.jsonl' is about another network, hold-out or constraint"
OPTIONS: dict[str, Any] = {
    "tolerance": 100.0, "min_memory_saving": 0.0, "rates": (0.25,), "max_sparsity": 0.6, "round_to": 1,
    "layers": ["blocks.0.mlp*"],
}  # fmt: skip


class Module(Plain):
    def __init__(self) -> None:
        super().__init__(small_spikformer)
        for part in self.net.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.constant_(part.bias, 2.0)


class Headed(Module):
    """The step makes more of the network's answer."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor([shift, 0.0, 0.0]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0]).flip(1) + self.bias
        self.log("val/top1", (logits.argmax(-1) == batch[1]).float().mean())


class Other(Headed):
    pass


class Unnamed(PrimeSVT):
    def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        return logits


class Named(PrimeSVT):
    def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        return logits

    predict.fingerprint = "the network alone, version 1"  # type: ignore[attr-defined]


def _evaluations(tmp_path: Path, module: Plain, *, kind: type[PrimeSVT] = PrimeSVT, **changed: Any) -> float:
    shown = DataLoader(data(24, seed=changed.pop("seed", 1)), batch_size=8)
    torch.manual_seed(7)
    callback = kind(**OPTIONS, evaluation_cache=tmp_path / "cache.jsonl", **changed)
    options = {"limit_train_batches": 1, "limit_val_batches": 3, "num_sanity_val_steps": 0}
    make_trainer(tmp_path, 1, callback, **options).fit(module, loader(), shown)
    assert callback.result is not None
    return float(callback.result.scoring["evaluations"])


def test_a_step_that_adds_nothing(tmp_path: Path) -> None:
    assert _evaluations(tmp_path, Module()) > 0
    assert _evaluations(tmp_path, Module()) == 0
    with pytest.raises(ValueError, match=ANOTHER):
        _evaluations(tmp_path, Module(), seed=2)
    with pytest.raises(ValueError, match=ANOTHER):
        _evaluations(tmp_path, Headed())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"monitor": "val/top1"}], ids=["step", "monitor"])
def test_a_module_that_makes_more_of_the_answer_or_a_metric(options: dict[str, Any], tmp_path: Path) -> None:
    assert _evaluations(tmp_path, Headed(), **options) > 0
    assert _evaluations(tmp_path, Headed(), **options) == 0
    for other, changed in ((Headed(1e-9), {}), (Other(), {}), (Headed(), {"seed": 2}), (Module(), {})):
        with pytest.raises(ValueError, match=ANOTHER):
            _evaluations(tmp_path, other, **options, **changed)


def test_a_predict_of_ones_own_has_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing tells Unnamed\.predict from another .*predict\.fingerprint = "):
        Unnamed(evaluation_cache=tmp_path / "cache.jsonl")
    assert Unnamed().evaluation_cache is None
    assert _evaluations(tmp_path, Module(), kind=Named) > 0
    assert _evaluations(tmp_path, Module(), kind=Named) == 0
    with pytest.raises(ValueError, match=ANOTHER):
        _evaluations(tmp_path, Module())


@pytest.mark.parametrize("bad", [3, "", b"cache", True, ["a"], "a\0b"])
def test_a_path_is_a_path(bad: Any) -> None:
    with pytest.raises(ValueError, match="evaluation_cache="):
        PrimeSVT(evaluation_cache=bad)
