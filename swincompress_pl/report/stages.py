"""Measures a whole run: the networks that a compression started from and went through, and the engine it ended in."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from swincompress_pl import accel
from swincompress_pl.evaluation_mode import evaluation_mode
from swincompress_pl.history import origin_of
from swincompress_pl.pruning import count_macs, count_parameters
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.report.accuracy import Accuracy, PairedComparison
from swincompress_pl.report.comparison.bench import ENGINE, compare_engine
from swincompress_pl.report.comparison.compare import Result
from swincompress_pl.report.layers import layer_sparsity
from swincompress_pl.report.operations import operation_times
from swincompress_pl.report.record import RunRecord
from swincompress_pl.report.sizes import Size, network_size, program_macs, program_parameters, program_size

Predictions = npt.NDArray[np.int64]
_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class TestImages:
    """The images that a run is reported on.

    Attributes:
        pixels: (N, H, W, C) uint8.
        labels: (N,) int64.
        normalize: Makes (N, C, H, W) inputs of a network from pixels as a tensor.
        name: What they are called in the report.
    """

    __test__ = False  # no class of tests

    pixels: npt.NDArray[np.uint8]
    labels: Predictions
    normalize: Callable[[Tensor], Tensor]
    name: str = "test"

    @classmethod
    def of(
        cls, batches: Iterable[tuple[npt.NDArray[np.uint8], Predictions]], normalize: Callable[[Tensor], Tensor]
    ) -> TestImages:
        """Collects the batches of a data module's `uint8_batches("test")`."""
        pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return cls(pixels=pixels, labels=labels, normalize=normalize)

    def inputs(self, start: int, stop: int) -> Tensor:
        """Some of the images as a network takes them, (stop - start, C, H, W) float32."""
        return self.normalize(torch.from_numpy(self.pixels[start:stop]))


def measure_run(
    record: RunRecord,
    test: TestImages,
    *,
    networks: Mapping[str, nn.Module],
    quantized: QuantizedNetwork,
    artifact: Path,
    threads: int,
    checked_images: int | None = None,
) -> None:
    """Measures every stage on the test images, and compares the engine's integers with those of the reference.

    Args:
        record: Gets the stages, checks, the paired comparison, sparsities and times of operations.
        test: The images.
        networks: {stage: network in float}, with one named "float" first, in eval mode.
        quantized: What they became, in eval mode.
        artifact: The file that `quantized` was exported to.
        threads: Threads of the engine.
        checked_images: How many images the NumPy reference and the torch twin run, which are slow; None for all.
    """
    size = program_size(accel.load(artifact, threads=threads).program, file=artifact)
    predictions = {name: network_stage(record, test, name, network) for name, network in networks.items()}
    network_stage(record, test, "quantized", quantized, size)
    after = engine_stage(record, test, quantized, artifact, threads=threads, checked_images=checked_images)
    record.add_comparison("engine against float", PairedComparison.of(predictions["float"], after, test.labels))
    record.layers.extend(layer_sparsity(networks["float"], quantized.network))


def engine_stage(
    record: RunRecord,
    test: TestImages,
    quantized: QuantizedNetwork,
    artifact: Path,
    *,
    threads: int,
    checked_images: int | None = None,
) -> Predictions:
    """Adds the stage "engine", the times of its operations and the checks of its integers; returns its predictions."""
    engine = accel.load(artifact, threads=threads)
    logits = engine.run_integer(test.pixels)
    predictions: Predictions = logits.argmax(1)
    record.add_stage(
        "engine",
        parameters=program_parameters(engine.program),
        macs=program_macs(engine.program),
        size=program_size(engine.program, file=artifact),
        accuracy=Accuracy.of(predictions, test.labels),
    )
    checked = test.pixels[:checked_images]
    with torch.inference_mode():
        twin = quantized.integer_logits(torch.from_numpy(checked)).numpy()
    expected = accel.reference(artifact).run_integer(checked)
    count = f"{len(checked)} {test.name} images"
    found = logits[: len(checked)]
    record.add_check("engine == NumPy reference, integer logits", np.array_equal(found, expected), count)
    record.add_check("torch twin == engine, integer logits", np.array_equal(twin, found), count)
    record.operations.extend(operation_times(engine.profile(test.pixels[:1])))
    return predictions


def network_stage(
    record: RunRecord, test: TestImages, name: str, network: nn.Module, size: Size | None = None
) -> Predictions:
    """Adds a network as a stage of the record, where its parameters are; returns its predictions."""
    count, device = len(test.pixels), next(network.parameters()).device
    with evaluation_mode(network), torch.inference_mode():
        answers = [
            network(test.inputs(start, start + _BATCH).to(device)).argmax(1).cpu() for start in range(0, count, _BATCH)
        ]
    predictions: Predictions = torch.cat(answers).numpy()
    floats = network.network if isinstance(network, QuantizedNetwork) else network
    record.add_stage(
        name,
        parameters=count_parameters(floats),
        macs=count_macs(floats, tuple(test.inputs(0, 1).shape)),
        size=size or network_size(network),
        accuracy=Accuracy.of(predictions, test.labels),
    )
    return predictions


def measure_latency(record: RunRecord, network: nn.Module, artifact: Path, threads: int) -> None:
    """Races the engine with the uncompressed network in torch and onnxruntime, where they are installed.

    The other runtimes get random weights: the time does not depend on them.

    Args:
        record: Its stages "float" and "engine" get the times; a runtime that is missing becomes a note.
        network: The network before compression.
        artifact: The compressed network.
        threads: Threads of every runtime.
    """
    engine = accel.load(artifact, threads=threads)
    origin = origin_of(network, [])
    with tempfile.TemporaryDirectory() as scratch:
        results = compare_engine(
            engine, artifact, against=("torch", "onnxruntime"), origin=origin, threads=threads, directory=Path(scratch)
        )
    _add_latencies(record, {result.name: result for result in results})


def _add_latencies(record: RunRecord, results: Mapping[str, Result]) -> None:
    measured = {name: result.latency for name, result in results.items() if result.latency is not None}
    of_stage = {"engine": {ENGINE}, "float": set(measured) - {ENGINE}}
    for number, stage in enumerate(record.stages):
        latencies = {name: measured[name] for name in measured if name in of_stage.get(stage.name, set())}
        record.stages[number] = replace(stage, latency_ms=latencies)
    for name, result in results.items():
        if result.latency is None:
            record.notes.append(f"{name} was not measured: {result.unavailable}")
