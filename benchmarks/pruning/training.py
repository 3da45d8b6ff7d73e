"""A job's training and pruning, and what is recorded of a network."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.pruning import (
    AdaptivePruningConfig,
    Gradients,
    HoldOut,
    SearchState,
    collect_gradients,
    count_macs,
    prune,
)
from swincompress_pl.pruning.space import prunable_weights

from .batches import MemoryData
from .jobs import Job
from .subjects import Subject, trainer

_GRADIENT_IMAGES = 512
_CALIBRATION_BATCHES = 32  # of 64 images, for compensation


class Watched(AdaptiveIterativePruning):
    """The callback as it is, with a note taken of every round."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rounds: list[dict[str, Any]] = []
        self.search_seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A round, if there is one before this epoch."""
        done, started = self._rounds_done(), time.perf_counter()
        super().on_train_epoch_start(trainer, pl_module)
        if self._rounds_done() > done:
            assert self.search_state is not None
            self.search_seconds += time.perf_counter() - started
            self.rounds.append(latest_round(self.search_state) | {"epoch": trainer.current_epoch})

    def _rounds_done(self) -> int:
        return 0 if self.search_state is None else self.search_state.rounds


def fit(subject: Subject, module: LightningModule, data: MemoryData, callbacks: list[Callback]) -> float:
    """One fit by the subject's recipe; how long it took in seconds."""
    started = time.perf_counter()
    recipe = subject.recipe
    trainer(recipe.epochs, callbacks, subject.place, limit_train_batches=recipe.train_batches).fit(
        module, datamodule=data
    )
    return time.perf_counter() - started


def control(subject: Subject, job: Job) -> dict[str, Any]:
    """The given network, and the same fine-tuned without pruning: what every loss is measured against."""
    data, module = subject.data(), subject.classifier()
    given = network_figures(module.net, subject, data)
    seconds = fit(subject, module, data, [])
    return {"given": given, "after": network_figures(module.net, subject, data), "seconds": seconds}


def prune_with_recovery(subject: Subject, job: Job) -> dict[str, Any]:
    """The callback in a fit: rounds, each followed by an epoch, then the rest of the epochs."""
    data, module = subject.data(), subject.classifier()
    pruning = Watched(
        start_epoch=subject.recipe.start_epoch,
        max_rounds=1 if job.compensated else subject.recipe.max_rounds,
        **({"gradient_batches": _CALIBRATION_BATCHES} if job.compensated else {}),
        **search_options(subject, job, module.net),
    )
    seconds = fit(subject, module, data, [pruning])
    assert pruning.search_state is not None
    search = search_figures(pruning.search_state, job, pruning.rounds, pruning.search_seconds)
    after = network_figures(module.net, subject, data)
    lost = search["baseline_score"] - after["holdout"]["percent"]
    return {
        "after": after,
        "search": search,
        "seconds": seconds,
        "final_holdout_loss_points": lost,
        "final_holdout_within_tolerance": lost <= _tolerance(job) + 1e-9,
    }


def prune_alone(subject: Subject, job: Job) -> dict[str, Any]:
    """`pruning.prune` without any training; for the given CIFAR and DeiT weights the hold-out was part of their
    training, so that its accuracy is too high and what the search decides is too kind or too strict by chance."""
    data, module = subject.data(), subject.classifier()
    network = module.net.to(subject.place.device).eval()
    options = search_options(subject, job, network)
    started = time.perf_counter()
    holdout = HoldOut.from_batches(data.holdout_dataloader())
    result = prune(
        network,
        holdout,
        AdaptivePruningConfig(**options),
        input_shape=subject.input_shape,
        gradients=gradients_from(data),
    )
    seconds = time.perf_counter() - started
    search = search_figures(result.state, job, [latest_round(result.state)], seconds)
    return {"after": network_figures(network, subject, data), "search": search, "seconds": seconds}


def gradients_from(data: MemoryData) -> Callable[[nn.Module], Gradients]:
    """For the criteria that need gradients: over some training images."""
    return lambda network: collect_gradients(network, data.calibration_dataloader(_GRADIENT_IMAGES))


def search_options(subject: Subject, job: Job, network: nn.Module) -> dict[str, Any]:
    """Tolerance, granularity, steps and target of a job, for AdaptivePruningConfig or the callback."""
    recipe = subject.recipe
    assert job.granularity is not None
    options: dict[str, Any] = {
        "tolerance": _tolerance(job),
        "granularity": job.granularity,
        "step": recipe.step,
        "min_step": recipe.min_step,
        "criterion": recipe.criterion,
        "order": recipe.order,
        "ranking": recipe.ranking,
    }
    if job.ranked:
        criterion = "fisher" if job.granularity == "structured" else "layer_fisher"
        options |= {"ranking": "global", "criterion": criterion}
    if job.narrow:
        options["first_tolerance"] = _tolerance(job) / 8
    if job.compensated:
        options |= {
            "criterion": "second_order", "compensation": "ridge", "ranking": "global", "step": 0.9,
            "max_sparsity": 0.97,
        }  # fmt: skip
    if job.granularity == "structured":
        options |= {"kinds": recipe.kinds, "round_to": recipe.round_to, "target": job.target}
        if job.compensated:
            options |= {"kinds": ("mlp", "head_dim"), "round_to": 1}
    elif job.target is not None:
        # the target counts parts of all parameters, the job parts of the prunable weights
        prunable = sum(network.get_parameter(name).numel() for name in prunable_weights(network))
        part = prunable / sum(p.numel() for p in network.parameters())
        options |= {"target": job.target * part, "target_of": "parameters"}
    return options


def search_figures(state: SearchState, job: Job, rounds: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a search did and what it cost; rollback_held: no round that kept something ended beyond the tolerance."""
    floor = state.baseline_score - _tolerance(job) - 1e-9
    return {
        "baseline_score": state.baseline_score,
        "score": state.score,
        "stopped": state.stopped,
        "rounds": state.rounds,
        "steps": len(state.steps),
        "steps_accepted": sum(step.accepted for step in state.steps),
        "rollback_held": all(entry["score"] >= floor for entry in rounds if entry["accepted"]),
        "rounds_log": rounds,
        "scoring": state.scoring,
        "seconds": seconds,
        "decisions": [
            [s.round, s.target, s.units_before, s.units_after, int(s.accepted), s.images] for s in state.steps
        ],
    }


def latest_round(state: SearchState) -> dict[str, Any]:
    """The round that was just finished; score: of the whole hold-out after it."""
    steps = [step for step in state.steps if step.round == state.rounds]
    return {
        "round": state.rounds,
        "tried": len(steps),
        "accepted": sum(step.accepted for step in steps),
        "score": state.score,
        "parameters": steps[-1].parameters if steps else None,
        "macs": steps[-1].macs if steps else None,
    }


def network_figures(network: nn.Module, subject: Subject, data: MemoryData) -> dict[str, Any]:
    """Size, hold-out and test accuracy of a network as it is, in float32."""
    device = torch.device(subject.place.device)
    network = network.to(device)
    whole = subject.classifier().net
    names = prunable_weights(whole)
    before = sum(whole.get_parameter(name).numel() for name in names)
    parameters = dict(network.named_parameters())
    left = sum(int(parameters[name].count_nonzero()) for name in names)
    return {
        "holdout": accuracy(network, data, "holdout"),
        "test": accuracy(network, data, "test"),
        "prunable": {"before": before, "after": left, "removed": 1 - left / before},
        "parameters": sum(p.numel() for p in parameters.values()),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
        "macs": count_macs(network, subject.input_shape),
        "macs_before": count_macs(whole, subject.input_shape),
    }


@torch.no_grad()
def accuracy(network: nn.Module, data: MemoryData, split: str) -> dict[str, Any]:
    """Counts, and which images were right (`right_images` reads it), so that any two networks can be paired later."""
    training = network.training
    network.eval()
    with full_precision():
        right = torch.cat([network(images).argmax(1) == labels for images, labels in data.batches(split)]).cpu().numpy()
    network.train(training)
    return {
        "images": len(right),
        "correct": int(right.sum()),
        "percent": 100.0 * float(right.mean()),
        "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
    }


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 as they are; training on a GPU may round their factors (TF32)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def right_images(entry: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(images,) bool: which images of an `accuracy` entry were right."""
    bits = np.frombuffer(base64.b64decode(entry["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=entry["images"]).astype(bool)


def fingerprint(file: Path) -> str:
    """Tells whether two jobs began with the same weights."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _tolerance(job: Job) -> float:
    assert job.tolerance is not None
    return job.tolerance
