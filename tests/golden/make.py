"""Writes the golden files of this version: `python tests/golden/make.py tests/golden/VERSION`.

Run once for each released version and committed; never run again for an old one. `tests/test_golden.py` holds that
every later version reads them, and that they give the same bits.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import swincompress_pl
from swincompress_pl import accel, report
from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.models import CompressibleClassifier, create_model
from swincompress_pl.quant import QuantizedNetwork, diagnose, quantize

CLASSES = 4
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
SWIN: tuple[str, dict[str, Any]] = (
    "SwinTransformer",
    {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
)
VIT: tuple[str, dict[str, Any]] = (
    "VisionTransformer",
    {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
)
SPIKFORMER: tuple[str, dict[str, Any]] = (
    "Spikformer",
    {"T": 2, "img_size_h": 32, "img_size_w": 32, "patch_size": 4, "embed_dims": 16, "num_heads": 2, "depths": 1},
)


def pixels(size: int, count: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(count, size, size, 3) images; NumPy keeps PCG64's integers the same in every version."""
    return np.random.Generator(np.random.PCG64(7)).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def normalized(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """(N, 3, H, W) as the networks take them."""
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def lively(network: nn.Module) -> nn.Module:
    """Random weights that make the network answer, and of a spiking one neurons that fire."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.constant_(module.bias, 2.0)
    return network


def write_artifacts(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """One artifact for each way of storing and each kind of network; with its integer logits."""
    variants: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any], str | None]] = {
        "swin": (SWIN, {}, None),
        "vit": (VIT, {}, None),
        "spikformer": (SPIKFORMER, {}, None),
        "swin_w4a8": (SWIN, {"bits": "W4A8"}, None),
        "vit_lzma": (VIT, {}, "lzma"),
    }
    logits = {}
    for name, ((model, kwargs), options, compression) in variants.items():
        torch.manual_seed(0)
        network = lively(create_model(model, num_classes=CLASSES, **kwargs)).eval()
        images = pixels(32 if model == "Spikformer" else 16)
        quantized = quantize(network, [normalized(images)], preprocessing=PREPROCESSING, **options).eval()
        quantized.classes = ("plane", "car", "bird", "cat")
        path = accel.export(quantized, folder / f"{name}.safetensors", compression)
        logits[f"artifact/{name}"] = accel.reference(path).run_integer(images)
    return logits


def loader(size: int) -> DataLoader[Any]:
    """16 images in batches of 8, with labels that mean nothing."""
    images = normalized(pixels(size, 16))
    return DataLoader(TensorDataset(images, torch.arange(16) % CLASSES), batch_size=8)


class SGDClassifier(CompressibleClassifier):
    """Plain SGD: an optimizer without state keeps the checkpoints small."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1e-3)


def make_trainer(callbacks: list[Callback], epochs: int) -> Trainer:
    """A quiet trainer on the CPU that writes nothing."""
    return Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def write_checkpoint(path: Path, network: tuple[str, dict[str, Any]], callbacks: list[Callback], epochs: int) -> None:
    """A fit of `epochs` epochs, and its checkpoint."""
    torch.manual_seed(0)
    model, kwargs = network
    module = SGDClassifier(model, CLASSES, model_kwargs=kwargs)
    lively(module.net)
    size = 32 if model == "Spikformer" else 16
    trainer = make_trainer(callbacks, epochs)
    trainer.fit(module, loader(size), loader(size))
    trainer.save_checkpoint(path)  # and not a ModelCheckpoint, which would write this machine's paths into it


def logits_of(path: Path) -> np.ndarray[Any, Any]:
    """The integer logits of the quantized network in a checkpoint."""
    module = SGDClassifier.load_from_checkpoint(path, map_location="cpu").eval()
    assert isinstance(module.net, QuantizedNetwork)
    size = 32 if module.hparams["model"] == "Spikformer" else 16
    return module.net.integer_logits(torch.from_numpy(pixels(size))).numpy()


def fits(memo: Path | None) -> dict[str, tuple[tuple[str, dict[str, Any]], list[Callback]]]:
    """{name: network, callbacks}: searches that are not over after two epochs, each quantized in the same fit."""
    greedy: dict[str, Any] = {"tolerance": 100.0, "step": 0.25, "max_sparsity": 0.75, "round_to": 1, "max_rounds": 3}
    shot: dict[str, Any] = {"rates": (0.25, 0.5), "max_sparsity": 0.6, "round_to": 1, "min_memory_saving": 0.05}
    paper: dict[str, Any] = {"granularity": "filter", "policy": "prioritized", "blocks": "block"}

    def quantizer(**options: Any) -> QuantizationAwareTraining:
        return QuantizationAwareTraining(
            start_epoch=1, calibration_images=16, preprocessing=PREPROCESSING, method="max", **options
        )

    return {
        "pruned": (SWIN, [AdaptiveIterativePruning(**greedy), quantizer()]),
        "masked": (VIT, [AdaptiveIterativePruning(granularity="weight", **greedy), quantizer(bits="W4A8")]),
        "quantized": (VIT, [quantizer(distillation=0.5)]),
        "primesvt": (SPIKFORMER, [PrimeSVT(tolerance=100.0, evaluation_cache=memo, **shot), quantizer()]),
        "primesvt_paper": (SPIKFORMER, [PrimeSVT(tolerance=100.0, **paper, **shot), quantizer()]),
    }


def write_checkpoints(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The checkpoints of `fits`, with their integer logits."""
    logits = {}
    for name, (network, callbacks) in fits(folder / "primesvt_memo.jsonl").items():
        path = folder / f"{name}.ckpt"
        write_checkpoint(path, network, callbacks, epochs=2)
        logits[f"checkpoint/{name}"] = logits_of(path)
    return logits


def write_records(folder: Path) -> None:
    """report.json, with a search and a diagnosis of the other golden files, and report_steps.json, with steps of a
    search that is not known."""
    network = lively(create_model(SWIN[0], num_classes=CLASSES, **SWIN[1])).eval()
    quantized = quantize(network, [normalized(pixels(16))], preprocessing=PREPROCESSING, bits="W4A8").eval()
    engine = accel.load(folder / "swin.safetensors", threads=1)
    size = report.program_size(engine.program, file=folder / "swin.safetensors")
    record = report.RunRecord(name="golden", environment={"cpu": "none", "packages": {"torch": "2"}}, data="noise")
    record.add_stage("float", parameters=1000, macs=2000, size=report.network_size(network))
    record.add_stage(
        "engine", parameters=report.program_parameters(engine.program), macs=report.program_macs(engine.program),
        size=size, accuracy=report.Accuracy(correct=5, images=8),
        latency_ms={"engine": report.Latency(samples_ms=(1.5, 1.25), threads=1)},
    )  # fmt: skip
    counts = {"both_right": 4, "right_to_wrong": 1, "wrong_to_right": 1, "both_wrong": 2, "same_predictions": 5}
    record.add_comparison("engine against float", report.PairedComparison(**counts))
    record.add_check("engine == reference", True, "8 images")
    record.layers.extend(report.layer_sparsity(network, quantized.network))
    record.operations.append(report.OperationTime(name="head", kind="linear", time_ms=0.5, macs=32, size_bytes=64))
    record.notes.append("a note")
    search = torch.load(folder / "pruned.ckpt", weights_only=True)["callbacks"]["AdaptiveIterativePruning"]["search"]
    labels = torch.arange(8) % CLASSES
    record.add_quantization(diagnose(quantized, normalized(pixels(16)), labels, histograms=2).to_dict())
    step = report.PruningStep(group="layers.0.mlp", units_before=8, units_after=4, accepted=False)
    replace(record, quantization=None, stages=[], layers=[], steps=[step]).save(folder / "report_steps.json")
    record.add_pruning(search, tolerance=2)
    record.save(folder / "report.json")


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    logits = {**write_artifacts(folder), **write_checkpoints(folder)}
    write_records(folder)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(swincompress_pl.__file__).parent, check=True,
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    facts = {
        "version": swincompress_pl.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "images": "tests/golden/make.py: pixels()",
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())},
        "integer_logits": {name: values.tolist() for name, values in logits.items()},
    }
    (folder / "expected.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
