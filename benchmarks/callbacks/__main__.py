"""`python -m benchmarks.callbacks`: epochs of DeiT-Tiny with the callbacks and without, and the checks at a start.

Epochs of a fit with the callbacks, in which neither a search nor the quantization is due, alternate with those of one
without; so what is compared is their hooks in every batch and epoch. The checks are timed alone: what looks at the
module's images and answers when training starts, and what compares the graph with the network.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.quant.fidelity import check_graph
from swincompress_pl.report.environment import describe_environment

PREPROCESSING = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_NEVER = 1_000


class _Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = create_model("deit_tiny_patch16_224", num_classes=1000)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


class _First(Callback):
    """Times epochs, and what comes before them; stands before the others."""

    def __init__(self) -> None:
        self.started, self.epochs, self.start_s = 0.0, list[float](), 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.epochs and not self.start_s:
            self.start_s = time.perf_counter() - self.started
        self.started = time.perf_counter()


class _Last(Callback):
    def __init__(self, first: _First) -> None:
        self.first = first

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first.epochs.append(time.perf_counter() - self.first.started)


class _Clock:
    """The time inside a callback's hooks of batches and epochs."""

    def __init__(self, callback: Callback) -> None:
        self.seconds = 0.0
        for name in dir(Callback):
            if name.startswith("on_") and ("epoch" in name or "batch" in name or "backward" in name or "step" in name):
                setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def _loader(images: int, batch: int) -> DataLoader[Any]:
    pixels = torch.randint(0, 256, (images, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return DataLoader(TensorDataset((pixels / 255 - mean) / std, torch.arange(images) % 1000), batch)


def _fit(callbacks: list[Callback], loader: DataLoader[Any], epochs: int) -> _First:
    first = _First()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[first, *callbacks, _Last(first)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        check_val_every_n_epoch=_NEVER,
    )
    trainer.fit(_Module(), loader, loader)
    return first


def _callbacks() -> list[Callback]:
    """None of them has anything to do in the epochs that are timed."""
    search = AdaptiveIterativePruning(tolerance=1.0, start_epoch=_NEVER)
    return [search, QuantizationAwareTraining(start_epoch=_NEVER, preprocessing=PREPROCESSING)]


def _comparison_s(repeats: int) -> list[float]:
    """Of the graph with the network, on the 8 images of `quantize`."""
    images = next(iter(_loader(8, 8)))[0]
    quantized = QuantizedNetwork(_Module().net.eval(), preprocessing=PREPROCESSING)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        check_graph(quantized.graph, quantized.network, images)
        found.append(time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.callbacks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="fits of two epochs of each kind (default 5)")
    parser.add_argument("--images", type=int, default=96, help="of an epoch (default 96)")
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loader = _loader(options.images, options.batch)
    _fit([], loader, 1)  # warm
    alone, beside, start, inside = list[float](), list[float](), list[float](), list[float]()
    for _ in range(options.rounds):
        alone += _fit([], loader, 2).epochs
        callbacks = _callbacks()
        clocks = [_Clock(callback) for callback in callbacks]
        timed = _fit(callbacks, loader, 2)
        beside += timed.epochs
        inside.append(sum(clock.seconds for clock in clocks))
        start.append(timed.start_s)
    comparison = _comparison_s(options.rounds)
    result = {
        "environment": describe_environment(threads=options.threads),
        "images": options.images,
        "batch": options.batch,
        "epoch_s": {"without": alone, "with": beside},
        "ratio_of_medians": statistics.median(beside) / statistics.median(alone),
        "hooks_s": inside,
        "hooks_share": sum(inside) / sum(beside),
        "start_s": start,
        "comparison_s": comparison,
    }
    print(
        f"epoch of {options.images} images: {statistics.median(alone):.2f} s without the callbacks, "
        f"{statistics.median(beside):.2f} s with them ({result['ratio_of_medians']:.3f}); inside their hooks "
        f"{result['hooks_share']:.3%} of it"
    )
    print(
        f"when training starts: {statistics.median(start):.2f} s for what the step gives and predicts, cuts on trial "
        f"and the graph; the graph against the network alone {statistics.median(comparison):.2f} s"
    )
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
