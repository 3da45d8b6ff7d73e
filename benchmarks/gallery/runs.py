"""The runs behind the gallery's reports."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from swincompress_pl import accel, demo, primesvt, quantize
from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.data import Preprocessing
from swincompress_pl.data.cifar import CIFAR10_PREPROCESSING
from swincompress_pl.pruning import HoldOut, PrimeSVTConfig
from swincompress_pl.quant import QuantizedNetwork, diagnose
from swincompress_pl.report import RunRecord, describe_environment, spiking_cost
from swincompress_pl.report.stages import TestImages, measure_latency, measure_run

from ..primesvt.subjects import SUBJECTS
from ..pruning.batches import MemoryData
from ..pruning.subjects import Place, subject, trainer

_DIAGNOSED_IMAGES = 32
_CHECKED_IMAGES = 16
_COSTED_IMAGES = 64
_HOLDOUT_IMAGES = 2000  # of 5,000
_TEST_IMAGES = 2000  # at most; networks in float and the torch twin take long
_QUANTIZE_EPOCH, _EPOCHS = 4, 6


def demo_swin(place: Place) -> RunRecord:
    """`swincompress demo`."""
    return _demo("swin")


def demo_spikformer(place: Place) -> RunRecord:
    """`swincompress demo --model spikformer`."""
    return _demo("spikformer")


def _demo(model: str) -> RunRecord:
    with tempfile.TemporaryDirectory() as folder:
        return RunRecord.load(demo.run(folder, model=model).parent)


def deit_tiny(place: Place) -> RunRecord:
    """DeiT-Tiny, pruned between epochs, then fine-tuned in integers, on ImageNet-mini."""
    what = subject("deit_tiny", 0, place, {"epochs": _EPOCHS, "start_epoch": 0, "max_rounds": _QUANTIZE_EPOCH})
    data, module = what.data(), what.classifier()
    before = copy.deepcopy(module.net).eval()
    pruning = AdaptiveIterativePruning(
        tolerance=1.0,
        step=0.1,
        max_rounds=_QUANTIZE_EPOCH - 1,
        kinds=("heads", "mlp"),
    )
    snapshot = demo.PrunedSnapshot(_QUANTIZE_EPOCH)
    qat = QuantizationAwareTraining(start_epoch=_QUANTIZE_EPOCH, preprocessing=what.preprocessing.to_dict())
    trainer(_EPOCHS, [snapshot, pruning, qat], place).fit(module, datamodule=data)
    assert isinstance(module.net, QuantizedNetwork)
    assert snapshot.network is not None
    assert pruning.search_state is not None
    record = _record("DeiT-Tiny on ImageNet-mini: pruned between epochs, fine-tuned in integers", what.test_data)
    record.add_pruning(pruning.search_state.to_dict(), tolerance=pruning.config.tolerance)
    _measure(record, data, what.preprocessing, {"float": before, "pruned": snapshot.network}, module.net.eval())
    return record


def spikformer_cifar10(place: Place) -> RunRecord:
    """A Spikformer: PrimeSVT in a single shot, then int8 without training, on CIFAR-10."""
    what = SUBJECTS["spikformer"]
    data = what.data(place, what.fine_tuning, 0)
    network = what.classifier(what.fine_tuning, 0, trained=True).net.eval()
    pruned = copy.deepcopy(network)
    calibration = [images for images, _ in data.calibration_dataloader(128)]
    config = PrimeSVTConfig(tolerance=2.0, min_memory_saving=0.2)
    result = primesvt(
        pruned,
        HoldOut.from_batches(data.holdout_dataloader(), max_images=_HOLDOUT_IMAGES),
        config,
        calibration=calibration,
    )
    preprocessing = CIFAR10_PREPROCESSING.to_dict()
    quantized = quantize(copy.deepcopy(pruned), calibration, preprocessing=preprocessing).eval()
    record = _record(
        "A Spikformer on CIFAR-10: PrimeSVT in a single shot, int8 without training",
        f"CIFAR-10 (JPEG copy), {_TEST_IMAGES} of the test images",
    )
    record.notes.append(f"PrimeSVT, on the hold-out: {result.summary()}.")
    networks = {"float": network, "pruned": pruned.eval()}
    images = _test_images(data, CIFAR10_PREPROCESSING, _COSTED_IMAGES).inputs(0, _COSTED_IMAGES)
    record.notes += [_spikes(name, each, images) for name, each in networks.items()]
    _measure(record, data, CIFAR10_PREPROCESSING, networks, quantized)
    return record


def _record(name: str, data: str) -> RunRecord:
    return RunRecord(name=name, environment=describe_environment(threads=torch.get_num_threads()), data=data)


def _measure(
    record: RunRecord,
    data: MemoryData,
    preprocessing: Preprocessing,
    networks: Mapping[str, nn.Module],
    quantized: QuantizedNetwork,
) -> None:
    """Adds the diagnosis, the stages on the test images and the latencies."""
    threads = torch.get_num_threads()
    few = _test_images(data, preprocessing, _DIAGNOSED_IMAGES)
    images, labels = few.inputs(0, len(few.labels)), torch.from_numpy(few.labels)
    record.add_quantization(diagnose(quantized, images, labels).to_dict())
    test = _test_images(data, preprocessing, _TEST_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        artifact = accel.export(quantized, Path(folder) / "model.safetensors")
        measure_run(
            record, test, networks=networks, quantized=quantized, artifact=artifact, threads=threads,
            checked_images=_CHECKED_IMAGES,
        )  # fmt: skip
        measure_latency(record, networks["float"], artifact, threads)


def _test_images(data: MemoryData, preprocessing: Preprocessing, count: int) -> TestImages:
    """At most `count` of them, evenly spaced, as they are sorted by class."""
    pixels, labels = (part.cpu().numpy() for part in data.parts["test"])
    taken = np.linspace(0, len(labels) - 1, min(len(labels), count)).round().astype(np.int64)
    edge = (pixels.shape[1] - preprocessing.height) // 2
    seen = slice(edge, edge + preprocessing.height)
    return TestImages(
        pixels=np.ascontiguousarray(pixels[taken, seen, seen]),
        labels=labels[taken],
        normalize=preprocessing.normalize,
    )


def _spikes(name: str, network: nn.Module, images: torch.Tensor) -> str:
    cost = spiking_cost(network, images)
    return (
        f"The {name} network, per image over {len(images)} test images: {cost.sops / 1e6:.2f} M synaptic operations, "
        f"{cost.spike_rate:.1%} of its neurons spike per time step; {cost.energy_compute_pj / 1e6:.2f} uJ of "
        "arithmetic by spikingjelly's estimate (45 nm, float32)."
    )


RUNS: dict[str, Callable[[Place], RunRecord]] = {
    run.__name__: run for run in (demo_swin, demo_spikformer, deit_tiny, spikformer_cifar10)
}
