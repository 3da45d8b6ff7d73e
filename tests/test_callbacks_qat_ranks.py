"""Quantization-aware training of a spiking network under DDP (gloo): what ranks share, and what is each one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule
from support.ddp_cases import ddp
from support.qat_cases import Plain, loader, pixels_and_labels, trainer
from support.rank_cases import digest, on_ranks
from support.spiking_qat_cases import Spiking, norms_of, spiking_qat, statistics
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from swincompress_pl import accel
from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.callbacks import quantization as callback_module
from swincompress_pl.quant import QuantizedNetwork

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Data(LightningDataModule):
    """8 images per step in all; every rank validates and calibrates on all images."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = loader().dataset
        sampler: Any = DistributedSampler(dataset, self.world_size, self.rank, shuffle=False)
        return DataLoader(dataset, 8 // self.world_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader()

    def calibration_dataloader(self, images: int) -> DataLoader[Any]:
        return loader()


class Watch(Callback):
    """Hashes after each step: of all that DDP promises to be equal, and of the running statistics."""

    def __init__(self) -> None:
        self.shared: list[str] = []
        self.own: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        own = statistics(pl_module)
        shared = {key: value for key, value in pl_module.state_dict().items() if key not in own}
        self.shared.append(digest([shared, trainer.optimizers[0].state_dict()]))
        self.own.append(digest(own))


def fit(folder: Path, module: Plain, rank: int, world_size: int, epochs: int, *callbacks: Any, **options: Any) -> Any:
    if world_size > 1:
        options["strategy"] = ddp()
    run = trainer(folder, epochs, *callbacks, devices=world_size, use_distributed_sampler=False, **options)
    run.fit(module, datamodule=Data(rank, world_size))
    return run


class Quick(Spiking):
    """Running statistics that are near those of the batches after a few steps, so that images are told apart."""

    def __init__(self) -> None:
        super().__init__()
        for norm in norms_of(self.backbone):
            norm.momentum = 0.7


def test_ranks_end_with_the_network_that_rank_zero_exports(tmp_path: Path) -> None:
    """Parameters, scales and optimizer are equal to the bit after each step; running statistics from the validation on,
    for which DDP shares rank 0's, and it gives what the engine gives for rank 0's file. Rank 0 alone calibrates."""

    def work(rank: int) -> Any:
        calibrations, whole = [], callback_module.quantize

        def counted(*arguments: Any, **options: Any) -> Any:
            calibrations.append(torch.is_grad_enabled())
            return whole(*arguments, **options)

        callback_module.quantize = counted  # type: ignore[assignment]  # in this process alone
        module, watch = Quick(), Watch()
        torch.manual_seed(rank)  # what a rank draws by itself must not matter
        run = fit(tmp_path, module, rank, 2, 3, spiking_qat(), watch)
        quantized: Any = module.backbone
        if rank == 0:
            accel.export(quantized.eval(), tmp_path / "model.safetensors")
        return {
            "calibrations": len(calibrations),
            "shared": watch.shared,
            "own": watch.own,
            "state": {key: value.clone() for key, value in module.state_dict().items()},
            "accuracy": float(run.callback_metrics["val/top1"]),
            "logits": quantized.eval().integer_logits(pixels_and_labels()[0]),
        }

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert (first["calibrations"], second["calibrations"]) == (1, 0)
    assert first["shared"] == second["shared"]
    assert len(set(first["shared"])) == len(first["shared"]) == 12
    # as in DDP of floats, which the first epoch is: those of the latest batch are each rank's
    assert all(a != b for a, b in zip(first["own"], second["own"], strict=True))
    assert digest(first["state"]) == digest(second["state"])

    pixels, labels = pixels_and_labels()
    logits = accel.load(tmp_path / "model.safetensors", threads=1).run_integer(pixels.numpy())
    for rank in (first, second):
        assert np.array_equal(rank["logits"].numpy(), logits)
        assert rank["accuracy"] == pytest.approx((logits.argmax(1) == labels.numpy()).mean())
    assert len({tuple(row) for row in logits.tolist()}) > 1


class Steady(Spiking):
    """Norms in evaluation, so that a step does not depend on how its images are split; SGD, linear in the gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for norm in norms_of(self.backbone):
            norm.eval()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_step_of_two_ranks_is_that_of_one_device(tmp_path: Path) -> None:
    def work(rank: int, world_size: int = 2) -> Any:
        module = Steady()
        fit(tmp_path, module, rank, world_size, 1, spiking_qat(start_epoch=0), limit_train_batches=1)
        return {key: value.detach().clone() for key, value in module.state_dict().items()}

    alone, before = work(0, world_size=1), Steady().state_dict()
    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert digest(first) == digest(second)
    moved = 0
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6, msg=key)
        moved += not torch.equal(value, before.get(key.replace(".network.", "."), value))
    assert moved > 10


@pytest.mark.parametrize("kind", ["quantization", "pruning"])
def test_synchronized_norms_are_refused(tmp_path: Path, kind: str) -> None:
    """SyncBatchNorm has no time axis: Lightning's exchange would make the network another one, for good."""
    if kind == "quantization":
        who, callback = "QuantizationAwareTraining", spiking_qat()
    else:
        who, callback = "AdaptiveIterativePruning", AdaptiveIterativePruning(tolerance=9.0, model_attribute="backbone")

    def work(rank: int) -> Any:
        module = Spiking()
        try:
            fit(tmp_path, module, rank, 2, 1, callback, sync_batchnorm=True)
        except ValueError as error:
            return [str(error), any(isinstance(norm, nn.SyncBatchNorm) for norm in norms_of(module))]
        return ["nothing was raised", True]

    for message, converted in on_ranks(tmp_path / "ranks", 2, work):
        assert message.startswith(f"{who} beside Trainer(sync_batchnorm=True): TorchSyncBatchNorm would replace the ")
        assert "BatchNorms of Spikformer (patch_embed." in message
        assert "Leave it out" in message
        assert not converted


def test_networks_without_norms_do_not_mind(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        module = Plain()
        options = {"start_epoch": 0, "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3}}
        fit(tmp_path, module, rank, 2, 1, spiking_qat(**options), sync_batchnorm=True, limit_train_batches=1)
        return isinstance(module.backbone, QuantizedNetwork)

    assert on_ranks(tmp_path, 2, work) == [True, True]
