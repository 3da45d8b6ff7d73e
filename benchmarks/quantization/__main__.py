"""Post-training int8 on trained networks: accuracy of float and integers on the same images, and three-way equality.

    python -m benchmarks.quantization --model deit_tiny --weights deit.safetensors --data imagenet_mini
    python -m benchmarks.quantization --model swin_cifar10 --weights swin_cifar10.safetensors --data cifar10

Calibrates on 128 training images without augmentation; settings are the package's defaults. Every image of the test
split goes through the float network, the torch twin, the NumPy reference and the C++ engine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open

from swincompress_pl import accel
from swincompress_pl.data import CIFAR10, ImageClassificationData, ImageNetFolder
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize
from swincompress_pl.report import (
    Accuracy,
    PairedComparison,
    describe_environment,
    network_size,
    program_macs,
    program_size,
)

RESULTS = Path(__file__).resolve().parent.parent / "results"


def _network_and_data(model: str, weights: Path, root: Path) -> tuple[torch.nn.Module, ImageClassificationData]:
    if model == "deit_tiny":
        return create_model("deit_tiny_patch16_224", checkpoint_path=weights), ImageNetFolder(root, batch_size=50)
    with safe_open(weights, framework="np") as file:
        arch = json.loads(file.metadata()["arch"])
    return create_model("SwinTransformer", checkpoint_path=weights, **arch), CIFAR10(root, batch_size=250)


def measure(model: str, weights: Path, root: Path, method: str, images: int) -> dict[str, Any]:
    """Quantizes, exports, and runs every test image through all four; returns the figures."""
    network, data = _network_and_data(model, weights, root)
    network.eval()
    start = time.perf_counter()
    quantized = quantize(
        network,
        data.calibration_dataloader(images),
        method=method,
        images=images,
        preprocessing=data.preprocessing.to_dict(),
        progress=True,
    ).eval()
    seconds = time.perf_counter() - start
    answers: dict[str, list[np.ndarray]] = {"float": [], "twin": [], "reference": [], "engine": []}
    labels = []
    with tempfile.TemporaryDirectory() as folder:
        file = accel.export(quantized, Path(folder) / "model.safetensors")
        engine, reference = accel.load(file), accel.reference(file)
        size = program_size(engine.program, file=file)
        for pixels, numbers in track(list(data.uint8_batches("test")), "images"):
            labels.append(numbers)
            batch = torch.from_numpy(pixels)
            with torch.inference_mode():
                answers["float"].append(network(data.preprocessing.normalize(batch)).argmax(1).numpy())
                answers["twin"].append(quantized.integer_logits(batch).numpy())
            answers["reference"].append(reference.run_integer(pixels))
            answers["engine"].append(engine.run_integer(pixels))
    truth = np.concatenate(labels)
    joined = {name: np.concatenate(parts) for name, parts in answers.items()}
    integer = joined["engine"].argmax(1)
    return {
        "model": model,
        "method": method,
        "calibration_images": images,
        "quantize_seconds": round(seconds, 1),
        "float": Accuracy.of(joined["float"], truth).to_dict(),
        "int8": Accuracy.of(integer, truth).to_dict(),
        "paired": PairedComparison.of(joined["float"], integer, truth).to_dict(),
        "summary": str(PairedComparison.of(joined["float"], integer, truth)),
        "equal": {
            "twin == reference": bool(np.array_equal(joined["twin"], joined["reference"])),
            "engine == reference": bool(np.array_equal(joined["engine"], joined["reference"])),
            "logits": int(joined["engine"].size),
        },
        "macs": program_macs(engine.program),
        "size": {"float": network_size(network).to_dict(), "int8": size.to_dict()},
        "environment": describe_environment(threads=torch.get_num_threads()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["deit_tiny", "swin_cifar10"], required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", choices=["searched", "max"], default="searched")
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    given = parser.parse_args()
    result = measure(given.model, given.weights, given.data, given.method, given.images)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"quantization_{given.model}_{given.method}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    before, after = (result[name]["top1_percent"] for name in ("float", "int8"))
    print(f"float {before:.2f} %, int8 {after:.2f} %: {result['summary']}")
    print(f"equal: {result['equal']}; calibrated and searched in {result['quantize_seconds']} s; {file.name}")


if __name__ == "__main__":
    main()
