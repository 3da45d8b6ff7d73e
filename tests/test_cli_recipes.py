"""The ImageNet recipes run end to end on a small part of ImageNet, shortened to two batches per epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from swincompress_pl import accel
from swincompress_pl.cli import main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def shortened(name: str, root: Path, folder: Path) -> Path:
    """The recipe with random weights: two epochs of two batches, a round on two images, quantized in the second."""
    recipe: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    model, data, trainer = recipe["model"]["init_args"], recipe["data"]["init_args"], recipe["trainer"]
    model["distillation"] = None
    model.get("model_kwargs", {}).pop("pretrained", None)
    data |= {"root": str(root), "holdout": 8, "batch_size": 4, "num_workers": 0}
    # 2, not 1: Lightning takes a 1 that the parser read as 1.0 for all batches
    trainer |= {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 2, "default_root_dir": str(folder)}
    trainer |= {"enable_progress_bar": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    for callback in trainer["callbacks"]:
        options = callback["init_args"]
        if callback["class_path"].endswith("AdaptiveIterativePruning"):
            options |= {"start_epoch": 0, "every_n_epochs": 1, "max_rounds": 1, "max_images": 2, "tolerance": 100.0}
        elif callback["class_path"].endswith("QuantizationAwareTraining"):
            options |= {"start_epoch": 1, "calibration_images": 4, "method": "max"}
        else:
            options["dirpath"] = str(folder)
    path = folder / name
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_imagenet.yaml", "deit_tiny_imagenet.yaml"])
def test_recipe_fits_exports_and_agrees(name: str, imagenet_mini: Path, tmp_path: Path) -> None:
    assert main(["fit", "-c", str(shortened(name, imagenet_mini, tmp_path))]) == 0
    file = tmp_path / "model.safetensors"
    assert main(["export", str(tmp_path / "best.ckpt"), "-o", str(file), "--reference-check", "1"]) == 0
    history = accel.reference(file).program.origin["history"]
    assert [next(iter(entry)) for entry in history] == ["prune", "quantize"]
