"""What is measured when a fit ends: the networks that it went through, and the integers of its result."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from swincompress_pl import accel
from swincompress_pl.evaluation_mode import outside_inference_mode
from swincompress_pl.history import history_of
from swincompress_pl.pruning import count_macs, count_parameters
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.report.accuracy import PairedComparison
from swincompress_pl.report.layers import layer_sparsity
from swincompress_pl.report.record import RunRecord
from swincompress_pl.report.sizes import Size, network_size, program_macs, program_parameters, program_size
from swincompress_pl.report.stages import TestImages, engine_stage, measure_latency, network_stage
from swincompress_pl.report.training import PRUNED, QUANTIZED

FLOAT = "float"


def stage_name(network: nn.Module) -> str:
    """What a network is called in a report, by what was done to it."""
    if isinstance(network, QuantizedNetwork):
        return QUANTIZED
    return PRUNED if history_of(network) else FLOAT


@dataclass
class Snapshots:
    """Copies of a network on the CPU, as it was last seen in each stage, and what they cost.

    Attributes:
        networks: {stage: copy}. They take the memory of the network once per stage.
        costs: {stage: {"parameters", "macs", "size"}} of stages that are over, as plain data.
    """

    networks: dict[str, nn.Module] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, network: nn.Module, input_shape: Sequence[int] | None) -> None:
        """Copies a network that is not quantized; a stage that is now over is counted."""
        name = stage_name(network)
        for earlier in self.networks.keys() - {name} - self.costs.keys():
            self.costs[earlier] = _costs(self.networks[earlier], input_shape)
        if name != QUANTIZED:
            with outside_inference_mode():
                self.networks[name] = copy.deepcopy(network).cpu().eval()


def _costs(network: nn.Module, input_shape: Sequence[int] | None) -> dict[str, Any]:
    macs = None if input_shape is None else count_macs(network, tuple(input_shape))
    return {"parameters": count_parameters(network), "macs": macs, "size": network_size(network).to_dict()}


def add_counted_stage(record: RunRecord, name: str, costs: Mapping[str, Any]) -> None:
    """Adds a stage without an accuracy."""
    size = Size.from_dict(costs["size"])
    record.add_stage(name, parameters=costs["parameters"], macs=costs["macs"], size=size)


def spaced_images(data: Any, split: str, count: int) -> TestImages:
    """At most `count` images of a split, evenly spaced, as they may be sorted by class.

    Args:
        data: A datamodule with `dataset(split)` of pixels (H, W, C) uint8 and labels, and `preprocessing.normalize`.
        split: "test" or "holdout".
        count: Largest number of images, 1 or more.

    Raises:
        AttributeError: If the datamodule is of another kind.
        FileNotFoundError: If there are no such images.
    """
    dataset, normalize = data.dataset(split), data.preprocessing.normalize
    taken = np.linspace(0, len(dataset) - 1, min(len(dataset), count)).round().astype(np.int64)
    pixels, labels = zip(*(dataset[int(number)] for number in taken), strict=True)
    return TestImages(
        pixels=torch.stack(pixels).numpy(), labels=np.array(labels, np.int64), normalize=normalize, name=split
    )


def measure_networks(
    record: RunRecord,
    snapshots: Snapshots,
    last: nn.Module,
    test: TestImages | None,
    *,
    input_shape: Sequence[int] | None,
    device: torch.device,
    checked_images: int,
    latency: bool,
) -> None:
    """Adds the stages of a fit, its last one being `last`, on the CPU; without images only what they cost."""
    networks = dict(snapshots.networks)
    if stage_name(last) != QUANTIZED:
        networks[stage_name(last)] = last
    predictions = {}
    for name in (FLOAT, PRUNED):
        if name in networks and test is not None:
            predictions[name] = network_stage(record, test, name, networks[name].to(device))
            networks[name].cpu()
        elif name in networks:
            add_counted_stage(record, name, _costs(networks[name], input_shape))
        elif name in snapshots.costs:
            add_counted_stage(record, name, snapshots.costs[name])
    result = PRUNED
    if isinstance(last, QuantizedNetwork):
        result = "engine"
        predictions |= _integers(record, last, test, networks.get(FLOAT), checked_images, latency)
    if FLOAT in predictions and result in predictions:
        assert test is not None
        paired = PairedComparison.of(predictions[FLOAT], predictions[result], test.labels)
        record.add_comparison(f"{result} against float", paired)
    floats = last.network if isinstance(last, QuantizedNetwork) else last
    if FLOAT in networks and stage_name(last) != FLOAT:
        record.layers.extend(layer_sparsity(networks[FLOAT], floats))


def _integers(
    record: RunRecord,
    quantized: QuantizedNetwork,
    test: TestImages | None,
    before: nn.Module | None,
    checked_images: int,
    latency: bool,
) -> dict[str, Any]:
    """Adds the stage "engine" of an artifact that is written for it; {"engine": predictions} if there are images."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        artifact = accel.export(quantized, Path(folder) / "model.safetensors")
        if test is None:
            program = accel.load(artifact, threads=threads).program
            record.add_stage(
                "engine",
                parameters=program_parameters(program),
                macs=program_macs(program),
                size=program_size(program, file=artifact),
            )
            return {}
        found = engine_stage(record, test, quantized, artifact, threads=threads, checked_images=checked_images)
        if latency and before is not None:
            measure_latency(record, before, artifact, threads)
        return {"engine": found}
