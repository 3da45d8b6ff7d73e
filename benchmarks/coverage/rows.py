"""What happens to one network: pruned, quantized, exported, run; or refused, and where."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.coverage.networks import Case
from swincompress_pl import export, load, quantize, spec
from swincompress_pl.pruning import Group, PruningPlan, apply_plan
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

IMAGES = 8
_CHECKED = 2  # images on which the reference runs
_SHARE = 0.25  # of the units of each group


def row_of(case: Case) -> dict[str, Any]:
    """The row of a network, as JSON-able data."""
    row: dict[str, Any] = {"library": case.library, "name": case.name, "changed": case.changed}
    torch.manual_seed(0)
    try:
        network: Any = _lively(case.build())
        row["class"] = type(network).__name__
        row["parameters"] = _count(network)
        adapter_for(network)  # without one nothing works
        row |= _pruned(network)
        return row | _quantized(network)
    except (UnsupportedNetworkError, ValueError) as error:
        return row | {"refused": str(error)}


def _pruned(network: nn.Module) -> dict[str, Any]:
    """Removes a quarter of every group; the kinds, and the parameters that are left."""
    try:
        groups: list[Group] = adapter_for(network).groups(network)
    except UnsupportedNetworkError as error:
        return {"kinds": [], "not_pruned": str(error)}
    removed = {group.name: list(range(int(_SHARE * group.units))) for group in groups}
    apply_plan(network, PruningPlan.removing(groups, removed))
    return {"kinds": sorted({group.kind for group in groups}), "left": _count(network)}


def _quantized(network: Any) -> dict[str, Any]:
    """Quantizes, exports and runs the network; a refusal says how long it took."""
    height, width = network.patch_embed.img_size
    channels = network.in_chans if hasattr(network, "in_chans") else network.patch_embed.proj.in_channels
    pixels = torch.randint(0, 256, (IMAGES, channels, height, width), dtype=torch.uint8)
    images = (pixels.float() / 255 - 0.5) / 0.5
    half: Mapping[str, Any] = {"mean": [0.5] * channels, "std": [0.5] * channels}
    start = time.perf_counter()
    embeds = not network.num_classes
    try:
        quantized = quantize(
            network, [images], method="max", preprocessing=half, calibration_images=IMAGES, embeddings=embeds
        ).eval()
    except UnsupportedNetworkError as error:
        return {"refused": str(error), "refused_after_s": round(time.perf_counter() - start, 2)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        export(quantized, path)
        engine, program = load(path), quantized.to_program()
        raw = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        equal = np.array_equal(engine.run_integer(raw[:_CHECKED]), spec.run(program, raw[:_CHECKED]))
        with torch.no_grad():
            expected = network(images)
        found = torch.from_numpy(engine.run_integer(raw)).float() * program.logit_scale
    centered = _correlation(found - found.mean(0), expected - expected.mean(0))
    return {
        "equal": bool(equal),
        "correlation": round(_correlation(found, expected), 5),
        "centered": round(centered, 5),
        "varying": round(float((expected - expected.mean(0)).square().sum() / expected.square().sum()), 5),
    }


def _correlation(one: Tensor, other: Tensor) -> float:
    """The correlation of all answers."""
    return float(torch.corrcoef(torch.stack([one.double().flatten(), other.double().flatten()]))[0, 1])


def _lively(network: nn.Module) -> nn.Module:
    """The network in evaluation, with weights of which each counts."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.eval()


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
