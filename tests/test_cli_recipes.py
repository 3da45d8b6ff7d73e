"""Every config of configs/ fits, prunes, exchanges and validates, shortened by the command line and a second config."""

from __future__ import annotations

import itertools
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from swincompress_pl import accel
from swincompress_pl.cli import main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# 2 batches, not 1: Lightning takes a 1 that the parser read as 1.0 for all batches.
SHORT = {
    "--trainer.max_epochs": 2,
    "--trainer.limit_train_batches": 2,
    "--trainer.limit_val_batches": 2,
    "--trainer.log_every_n_steps": 1,
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
    "--data.batch_size": 2,
    "--data.holdout": 4,
    "--data.num_workers": 0,
}
IMAGES = 24  # of each split


def callbacks(name: str, folder: Path) -> Path:
    """The recipe's callbacks for two epochs: a round on a few images before the first, integers in the second."""
    listed: list[dict[str, Any]] = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    for callback in listed:
        options, kind = callback["init_args"], callback["class_path"].rpartition(".")[2]
        if kind == "AdaptiveIterativePruning":
            options |= {"start_epoch": 0, "every_n_epochs": 1, "max_rounds": 1, "max_images": 2, "tolerance": 100.0}
            options["layers"] = ["*blocks.0.*"]
        elif kind == "QuantizationAwareTraining":
            options |= {"start_epoch": 1, "calibration_images": 4, "method": "max"}
        elif kind == "PrimeSVT":
            options |= {"tolerance": 100.0, "min_memory_saving": 0.05, "rates": [0.16, 0.32]}
            options |= {"max_images": 2, "evaluation_cache": str(folder / "evaluations.jsonl")}
        else:
            options["dirpath"] = str(folder)
    path = folder / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}), encoding="utf-8")
    return path


def cifar10_part(archive: Path, folder: Path) -> Path:
    """The first two images of each class and split, from the archive."""
    taken: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            group = str(Path(member.name).parent)
            if member.isfile() and member.name.endswith(".jpg") and taken[group] < 2:
                taken[group] += 1
                tar.extract(member, folder, filter="data")
    (train,) = folder.rglob("train")
    return train.parent


def imagenet_part(tree: Path, folder: Path) -> Path:
    """Some of the images of each split."""
    for split in ("train", "val"):
        for file in itertools.islice(sorted((tree / split).glob("*/*")), IMAGES):
            (folder / split / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / split / file.parent.name)
    return folder


def overrides(name: str, shared_data: Path, request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """What the comments of the recipe ask for: the data, and weights where the repository has none."""
    if name == "spikformer_cifar10.yaml":
        archive = shared_data / "cifar10_jpeg.tar.xz"
        if not archive.is_file():
            pytest.skip(f"{archive}: absent.")
        return {"--data.root": cifar10_part(archive, folder)}
    root = imagenet_part(request.getfixturevalue("imagenet_mini"), folder)
    if name == "deit_tiny_imagenet.yaml":
        weights = shared_data / "deit_tiny_patch16_224.safetensors"
        if not weights.is_file():
            pytest.skip(f"{weights}: absent.")
        return {"--data.root": root, "--model.checkpoint_path": weights}
    stand_in = folder / "swin_tiny.safetensors"  # of the right keys and shapes
    torch.manual_seed(0)
    save_file(timm.create_model("swin_tiny_patch4_window7_224").state_dict(), stand_in)
    return {
        "--data.root": root,
        "--model.checkpoint_path": stand_in,
        "--model.model_kwargs.pretrained": "false",
    }


def fit(name: str, folder: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits the recipe, from another working directory than the repository."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["swincompress"])
    options = {**SHORT, "--trainer.default_root_dir": folder, **more}
    given = [str(each) for option in options.items() for each in option]
    assert main(["fit", "-c", str(CONFIGS / name), "-c", str(callbacks(name, folder)), *given]) == 0


def history_of_export(folder: Path, count: int) -> list[str]:
    """The changes of the exported network, whose integers are compared on `count` images."""
    file = folder / "model.safetensors"
    assert main(["export", str(folder / "best.ckpt"), "-o", str(file), "--reference-check", str(count)]) == 0
    return [next(iter(entry)) for entry in accel.reference(file).program.origin["history"]]


@pytest.mark.slow
def test_the_digits_fit_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit("digits_swin.yaml", tmp_path, {}, monkeypatch)
    assert history_of_export(tmp_path, 1) == ["prune", "quantize"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_imagenet.yaml", "deit_tiny_imagenet.yaml"])
def test_an_imagenet_recipe_fits_and_agrees(
    name: str, shared_data: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(name, tmp_path, overrides(name, shared_data, request, tmp_path), monkeypatch)
    assert history_of_export(tmp_path, 1) == ["prune", "quantize"]


@pytest.mark.slow
def test_the_spikformer_fits_its_weights_and_is_pruned(
    shared_data: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "spikformer_cifar10.yaml"
    fit(name, tmp_path, overrides(name, shared_data, request, tmp_path), monkeypatch)
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert checkpoint["epoch"] >= 0
    assert (tmp_path / "evaluations.jsonl").read_text(encoding="utf-8")


def test_every_recipe_has_a_test() -> None:
    tested = {"digits_swin", "deit_tiny_imagenet", "swin_tiny_imagenet", "spikformer_cifar10"}
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == tested
