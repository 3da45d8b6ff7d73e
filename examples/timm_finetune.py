"""Fine-tune a timm network on a folder of images, quantize it with its own preprocessing, and classify a file.

$ python examples/timm_finetune.py
float: 92.00% of 300 images
int8: 92.00% of 300 images
runs/timm_finetune/val/digit 7/7.png: digit 7
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from swincompress_pl import accel
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize


def write_images(root: Path) -> None:
    """Stands for data of your own: root/train/<class>/*.png and root/val/<class>/*.png."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("val" if number < 300 else "train") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(np.kron(image, np.ones((4, 4))) * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--model", default="test_vit", help="a ViT of timm that takes img_size and patch_size")
    parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights (a download)")
    parser.add_argument("--output", type=Path, default=Path("runs/timm_finetune"))
    given = parser.parse_args()

    torch.manual_seed(0)
    write_images(given.output)
    size = {"img_size": 32, "patch_size": 8, "dynamic_img_size": False}
    network = create_model(given.model, pretrained=given.pretrained, num_classes=10, **size)
    config = resolve_data_config({"img_size": 32, "crop_pct": 1.0}, model=network)
    transform = create_transform(**config)
    train, val = (ImageDataset(str(given.output / split), transform=transform) for split in ("train", "val"))
    names = sorted(train.reader.class_to_idx, key=train.reader.class_to_idx.get)

    epochs, batches = 1 if given.quick else 40, DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    quantized = quantize(network.eval(), batches, preprocessing=config, classes=names).eval()
    images, labels = next(iter(DataLoader(val, batch_size=len(val))))
    for name, model in (("float", network), ("int8", quantized)):
        with torch.no_grad():
            print(f"{name}: {(model(images).argmax(1) == labels).float().mean():.2%} of {len(labels)} images")
    engine = accel.load(accel.export(quantized, given.output / "model.safetensors"))
    file = given.output / "val" / "digit 7" / "7.png"
    best = engine.classify(file, top=1)[0]
    print(f"{file}: {best.name}")


if __name__ == "__main__":
    main()
