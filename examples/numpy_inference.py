"""Run an artifact with NumPy and the C++ engine alone: classify images, and see where the time goes. No torch.

$ python examples/own_module.py
$ python examples/numpy_inference.py runs/own_module/model.safetensors
Engine(27 operations, images (32, 32, 3), 10 classes, implementation='avx512_vnni', threads=2)
270 of 300 images right
one image: 1,157,952 MACs; the longest of 21 steps is patch_embed.proj
...
torch was not imported
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from swincompress_pl import accel


def digits(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as (N, height, width, 3) uint8, and their labels."""
    data = load_digits()
    gray = [Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)) for image in data.images]
    resized = [np.asarray(image.resize((width, height), Image.Resampling.NEAREST).convert("RGB")) for image in gray]
    return np.stack(resized), data.target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="what accel.export wrote; its images are digits here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="30 images instead of 300")
    given = parser.parse_args()

    engine = accel.load(given.artifact, threads=given.threads)
    print(engine)
    height, width, _ = engine.input_shape
    pixels, labels = digits(height, width)
    count = 30 if given.quick else 300
    logits = engine(pixels[:count])  # uint8 (N, H, W, 3) -> float32 (N, classes)
    right = int((logits.argmax(1) == labels[:count]).sum())
    print(f"{right} of {count} images right")

    profile = engine.profile(pixels[:1])
    slowest = max(profile, key=lambda row: row.time_ms)
    print(f"one image: {profile.macs:,} MACs; the longest of {len(profile)} steps is {slowest.operation}")
    print(f"time per image: {1000 * profile.time_ms:.0f} microseconds")
    assert "torch" not in sys.modules
    print("torch was not imported")


if __name__ == "__main__":
    main()
