"""Accuracy of the trained baselines of `benchmarks.primesvt` in integers, before and after fine-tuning."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl import accel
from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.data.cifar import CIFAR10_PREPROCESSING
from swincompress_pl.quant import QuantizedNetwork, quantize

from ..primesvt.subjects import SUBJECTS
from ..pruning.batches import MemoryData
from ..pruning.subjects import Place, device_name, trainer
from ..pruning.training import accuracy, fingerprint

CALIBRATION_IMAGES = 128
BITS = ("W8A8", "W4A8")


class Engine(nn.Module):
    """The C++ engine of a quantized network, in the place of the network."""

    def __init__(self, network: QuantizedNetwork, threads: int) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            file = accel.export(network, Path(folder) / "network.safetensors")
            self.engine, self.file_bytes = accel.load(file, threads=threads), file.stat().st_size
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.engine(self.network.pixels(images.cpu()).numpy())).to(images.device)


def quantized(network: nn.Module, data: MemoryData, bits: str, *, rounding: str) -> QuantizedNetwork:
    """The network with integers, without training; the given one is used up."""
    batches = [images for images, _ in data.calibration_dataloader(CALIBRATION_IMAGES)]
    found = quantize(
        network.eval(), batches, bits=bits, preprocessing=CIFAR10_PREPROCESSING.to_dict(),
        search={"rounding": rounding},
    )  # fmt: skip
    return found.eval()


def measure(
    subject_name: str,
    bits: str | None,
    tuned: bool,
    place: Place,
    commit: str,
    seed: int = 0,
    *,
    rounding: str = "nearest",
) -> dict[str, Any]:
    """One row. bits None: the float control, which is only fine-tuned. rounding: of the weights, without training."""
    started, subject = time.perf_counter(), SUBJECTS[subject_name]
    data = subject.data(place, subject.fine_tuning, seed)
    module = subject.classifier(subject.fine_tuning, seed, trained=True).to(place.device)
    result: dict[str, Any] = {
        "network": subject_name,
        "bits": bits,
        "tuned": tuned,
        "rounding": rounding,
        "seed": seed,
        "commit": commit,
        "weights": fingerprint(subject.weights),
        "float": {"test": accuracy(module.net, data, "test")},
    }
    if tuned:
        callbacks: list[Any] = []
        if bits is not None:
            qat = QuantizationAwareTraining(
                start_epoch=0,
                bits=bits,
                calibration_images=CALIBRATION_IMAGES,
                preprocessing=CIFAR10_PREPROCESSING.to_dict(),
            )
            callbacks.append(qat)
        module.train()
        trainer(subject.fine_tuning.epochs, callbacks, place).fit(module, datamodule=data)
        network: Any = module.net.to(place.device).eval()
        result |= {"epochs": subject.fine_tuning.epochs, "fitted_on": device_name(place.device)}
    elif bits is not None:
        network = quantized(module.net, data, bits, rounding=rounding)
    if bits is not None:
        engine = Engine(network.cpu(), torch.get_num_threads())
        result["file_bytes"] = engine.file_bytes
        result["integer"] = {"test": accuracy(engine, data, "test")}
    else:
        result["integer"] = {"test": accuracy(network, data, "test")}
    result["seconds"] = round(time.perf_counter() - started)
    return result
