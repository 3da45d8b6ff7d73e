"""Training of the baselines."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from ..pruning.batches import PlainBatches
from ..pruning.subjects import Place
from ..pruning.training import accuracy
from .subjects import Subject

_WATCHED_IMAGES = 2000  # of the hold-out after each epoch, for the curve; every so manieth, for all classes


class _Curve(Callback):
    """Notes the accuracy on a part of the hold-out after each epoch; in the checkpoint, so it survives."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics
        self.points.append(
            {
                "epoch": trainer.current_epoch + 1,
                "holdout_percent": round(100 * float(found["val/top1"]), 2),
                "train_loss": round(float(found["train/loss"]), 4),
            }
        )
        print(self.points[-1], flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = state_dict["points"]


def train(subject: Subject, place: Place, out: Path, commit: str) -> dict[str, Any]:
    """Train the baseline, going on where a killed run left off; writes `subject.weights`."""
    started, recipe = time.perf_counter(), subject.baseline
    data, module = subject.data(place, recipe, seed=0), subject.classifier(recipe, 0, trained=False)
    folder, curve = out / subject.name, _Curve()
    trainer = Trainer(
        max_epochs=recipe.epochs,
        accelerator="gpu" if place.device == "cuda" else "cpu",
        devices=1,
        precision=place.precision,  # type: ignore[arg-type]  # Lightning checks it
        callbacks=[curve, ModelCheckpoint(dirpath=folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    watched = torch.arange(0, data.images("holdout"), data.images("holdout") // _WATCHED_IMAGES).split(500)
    trainer.fit(
        module,
        data.train_dataloader(),
        PlainBatches(data, "holdout", watched),
        ckpt_path=str(last) if last.is_file() else None,
    )
    network = module.net.to(place.device)
    record = {
        "subject": subject.to_dict(),
        "curve": curve.points,
        "holdout": _counts(accuracy(network, data, "holdout")),
        "test": _counts(accuracy(network, data, "test")),
        "seconds": round(time.perf_counter() - started),
        "commit": commit,
        "precision": place.precision,
    }
    temporary = subject.weights.with_suffix(".tmp")
    state = {key: tensor.cpu().contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, temporary, metadata={"record": json.dumps(record)})
    os.replace(temporary, subject.weights)
    return record


def _counts(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("images", "correct", "percent")}
