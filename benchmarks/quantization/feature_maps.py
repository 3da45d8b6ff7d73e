"""DeiT-Tiny as a backbone of four feature maps: what quantization does to each, and what several outputs cost.

python -m benchmarks.quantization.feature_maps --data FOLDER [--images 64] [--out FILE.json]

FOLDER has deit_tiny_patch16_224.safetensors and imagenet_mini.tar. Calibrates on images of `train`, measures on `val`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from swincompress_pl import accel, quantize
from swincompress_pl.models import create_model
from swincompress_pl.report.latency import measure

NAME, BLOCKS = "deit_tiny_patch16_224", (2, 5, 8, 11)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels_of(archive: Path, split: str, count: int) -> Tensor:
    """(count, 3, 224, 224) uint8 of images that are drawn at random, always the same ones."""
    prepared = accel.Preprocess(height=224, width=224, resize=256, interpolation="bicubic")
    with tarfile.open(archive) as tar:
        files = sorted(
            (m for m in tar.getmembers() if m.isfile() and f"/{split}/" in f"/{m.name}"), key=lambda m: m.name
        )
        chosen = random.Random(0).sample([m for m in files if m.name.lower().endswith((".jpg", ".jpeg"))], count)
        pictures = [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in chosen]  # type: ignore[union-attr]
    return torch.from_numpy(np.asarray(prepared(pictures))).permute(0, 3, 1, 2)


def normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def backbone(weights: Path) -> torch.nn.Module:
    network = create_model(NAME, features_only=True, out_indices=BLOCKS)
    state = {f"model.{key}": value for key, value in load_file(weights).items()}
    result = network.load_state_dict(state, strict=False)
    assert not result.missing_keys, result.missing_keys
    return network.eval()


def median_ms(engine: accel.Engine, images: Any, rounds: int = 15) -> float:
    return measure({"engine": partial(engine, images)}, rounds=rounds)["engine"].median_ms


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--images", type=int, default=64)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--out", type=Path, default=None)
    given = command.parse_args()
    torch.set_num_threads(given.threads)
    network = backbone(given.data / f"{NAME}.safetensors")
    archive = given.data / "imagenet_mini.tar"
    images = normalized(pixels_of(archive, "val", given.images))
    with torch.no_grad():
        expected = [torch.cat(parts) for parts in zip(*map(network, images.split(8)), strict=True)]
    calibration = normalized(pixels_of(archive, "train", 128))
    quantized = quantize(network, [calibration], preprocessing={"mean": MEAN, "std": STD}).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = accel.export(quantized, Path(folder) / "maps.safetensors")
        engine, reference = accel.load(path, threads=given.threads), accel.reference(path)
        pixels = quantized.pixels(images).numpy()
        maps = engine(pixels)
        two = reference.run_integer(pixels[:2])
        equal = all(np.array_equal(integers, two[name]) for name, integers in engine.run_integer(pixels[:2]).items())
        last = quantized.to_program()
        alone = accel.Engine(replace(last, outputs=last.outputs[-1:]), threads=given.threads)
        turns = [(median_ms(engine, pixels[:1]), median_ms(alone, pixels[:1])) for _ in range(5)]
    rows = [
        row(output.name, torch.from_numpy(maps[output.name]), e)
        for output, e in zip(engine.outputs, expected, strict=True)
    ]
    record = {
        "network": NAME,
        "images": given.images,
        "engine_equals_reference": equal,
        "maps": rows,
        "ms_four_outputs": statistics.median(four for four, _ in turns),
        "ms_one_output": statistics.median(one for _, one in turns),
        "threads": given.threads,
        "implementation": engine.implementation,
    }
    print(json.dumps(record, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def row(name: str, found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Signal to noise in dB, and the cosine of each patch's channels: mean and least over all patches."""
    wanted = expected.permute(0, 2, 3, 1)
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
    noise = (found - wanted).double().square().sum()
    return {
        "name": name,
        "sqnr_db": round(10 * float((wanted.double().square().sum() / noise).log10()), 2),
        "cosine_mean": round(float(cosine.mean()), 5),
        "cosine_least": round(float(cosine.min()), 5),
    }


if __name__ == "__main__":
    main()
