"""A Spikformer from training to the C++ engine: train, prune by PrimeSVT, train in integers, export, compare.

CIFAR-10 as folders (train|test/<class>/*.jpg) from `--data`, or from the archive cifar10_jpeg.tar.xz in the folder that
SWINCOMPRESS_DATA names; without either, scikit-learn's digits.

$ env -u SWINCOMPRESS_DATA python examples/spiking_cifar10.py
PrimeSVT: 31.44% of the parameters saved at 92.22 points, unpruned 92.22; both constraints are met
test: 89.17% in torch, 89.17% in the engine
per image: 1,693,497 synaptic operations, 15,845,856 MACs of the shapes
"""

import argparse
import os
import tarfile
from pathlib import Path

import numpy as np
from lightning import Trainer, seed_everything

from swincompress_pl import accel
from swincompress_pl.callbacks import CompressedCheckpoint, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.data import CIFAR10, Digits, ImageClassificationData
from swincompress_pl.models import CompressibleClassifier, OptimizationConfig

SPIKFORMER = {
    "T": 2,
    "img_size_h": 32,
    "img_size_w": 32,
    "patch_size": 4,
    "embed_dims": 48,
    "num_heads": 4,
    "depths": 1,
}


def data_of(folder: str | None, output: Path) -> ImageClassificationData:
    archive = Path(os.environ.get("SWINCOMPRESS_DATA", "")) / "cifar10_jpeg.tar.xz"
    if folder is None and archive.is_file():
        folder = str(output / "cifar10")
        if not Path(folder).is_dir():
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    return Digits() if folder is None else CIFAR10(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with CIFAR-10")
    parser.add_argument("--quick", action="store_true", help="digits, few epochs, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("runs/spiking_cifar10"))
    given = parser.parse_args()
    data = Digits() if given.quick else data_of(given.data, given.output)
    prune_epoch, quantize_epoch, epochs = (3, 4, 5) if given.quick else (24, 28, 32)

    seed_everything(0)
    module = CompressibleClassifier(
        "Spikformer", 10, model_kwargs=SPIKFORMER, optimization=OptimizationConfig(lr=2e-3, warmup_epochs=1)
    )
    pruning = PrimeSVT(tolerance=3.0, min_memory_saving=0.25, round_to=4, start_epoch=prune_epoch)
    best = CompressedCheckpoint(dirpath=given.output, filename="best", monitor="val/top1", mode="max")
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[pruning, QuantizationAwareTraining(start_epoch=quantize_epoch), best],
        logger=False,
    )
    trainer.fit(module, data)
    print("PrimeSVT:", pruning.result.summary())

    module = CompressibleClassifier.load_from_checkpoint(best.best_model_path)
    (tested,) = Trainer(logger=False, enable_progress_bar=False).test(module, data, verbose=False)
    engine = accel.load(accel.export(module, given.output / "model.safetensors"))
    right = [(engine(pixels).argmax(1) == labels) for pixels, labels in data.uint8_batches("test")]
    print(f"test: {tested['test/top1']:.2%} in torch, {np.concatenate(right).mean():.2%} in the engine")
    profile = engine.profile(next(data.uint8_batches("test"))[0][:8])
    print(f"per image: {profile.sops // 8:,} synaptic operations, {profile.macs // 8:,} MACs of the shapes")


if __name__ == "__main__":
    main()
