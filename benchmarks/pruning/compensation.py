"""Pruning without training: with and without compensation, DeiT-Tiny and the small Swin; time and memory of Swin-T.

Of DeiT-Tiny's 1,000 training images, 500 calibrate without their labels and 500 decide; the seed says which. Of
CIFAR-10's, 2,000 calibrate and 5,000 decide. The test images are looked at once, at the end. Swin-T has random
weights and DeiT-Tiny's images.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, count_macs, prune
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.space import StructuredSpace, prunable_weights
from swincompress_pl.report import describe_environment
from swincompress_pl.report.plain import write_text

from ..runner import result_file
from .batches import MemoryData
from .images import locked
from .subjects import Place, Subject, device_name, subject
from .training import full_precision

SEEDS = (0, 1, 2)
_HOLDOUT = {"deit_tiny": 500, "swin_cifar10": 5000, "swin_tiny": 500}
_CALIBRATION = {"deit_tiny": 500, "swin_cifar10": 2000, "swin_tiny": 500}
_BATCH = {"deit_tiny": 50, "swin_cifar10": 250, "swin_tiny": 50}
_SWIN_T = "swin_tiny_patch4_window7_224"
_KINDS = ("mlp", "head_dim")
_TOLERANCE = 100.0  # in rows with a target, which decides there
_CURVES = {
    "deit_tiny": (0.06, 0.12, 0.14, 0.25, 0.35),
    "swin_cifar10": (0.25, 0.35, 0.45, 0.55, 0.65),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network, pruned once.

    Attributes:
        model: "deit_tiny", "swin_cifar10", or "swin_tiny" for time and memory.
        seed: Decides which images calibrate and decide.
        method: What makes up for what goes.
        criterion: What decides which units go first.
        target: Part of the MACs ("structured") or of the prunable weights that goes; None for the tolerance alone.
        granularity: As of AdaptivePruningConfig.
        tolerance: In points; None with a target.
        audit: Part of the hold-out that audits.
    """

    model: str
    seed: int
    method: str
    criterion: str
    target: float | None = None
    granularity: str = "structured"
    tolerance: float | None = None
    audit: float = 0.0

    @property
    def name(self) -> str:
        """Unique, and the name of the results' file."""
        aim = f"t{self.tolerance:g}" if self.target is None else f"{100 * self.target:g}"
        return f"{self.model}-{self.granularity.replace(':', 'of')}-{aim}-{self.method}-{self.criterion}-s{self.seed}"


def all_jobs() -> list[Job]:
    """Every job, the ones that matter most first."""
    ours: dict[str, Any] = {"method": "ridge", "criterion": "second_order"}
    jobs = [
        Job(model=model, seed=seed, target=target, **ours)
        for seed in SEEDS
        for model, targets in (("deit_tiny", (0.12, 0.14, 0.25)), ("swin_cifar10", (0.45, 0.55, 0.65)))
        for target in targets
    ]
    jobs += [
        Job(model="deit_tiny", seed=seed, tolerance=tolerance, audit=0.5, **ours)
        for tolerance in (1.0, 2.0, 5.0)
        for seed in SEEDS
    ]
    jobs += [
        Job(model=model, seed=seed, granularity=granularity, target=target, **ours)
        for seed in SEEDS
        for model, granularity, target in (
            ("deit_tiny", "weight", 0.5), ("deit_tiny", "2:4", 0.5), ("swin_cifar10", "weight", 0.6),
        )
    ]  # fmt: skip
    jobs.append(Job(model="swin_tiny", seed=0, target=0.14, **ours))
    for model, targets in _CURVES.items():
        for method, criterion in (("ridge", "second_order"), ("bias", "second_order"), ("none", "second_order"),
                                  ("none", "magnitude")):  # fmt: skip
            jobs += [Job(model=model, seed=0, target=t, method=method, criterion=criterion) for t in targets]
    return list({job.name: job for job in jobs}.values())


def do(job: Job, folder: Path, place: Place) -> Path:
    """Runs `job` and writes its results into `folder`."""
    return write_text(result_file(folder, job.name), json.dumps(run(job, place), indent=1, allow_nan=False) + "\n")


def run(job: Job, place: Place) -> dict[str, Any]:
    """Prunes as a user would, and looks at the test images."""
    what = _subject(job, place)
    data, network = what.data(), what.classifier().net.to(place.device).eval()
    unpruned = answers(network, data, _BATCH[job.model])
    calibration = _calibration(what, data)
    holdout = HoldOut.from_batches(data.batches("holdout", batch_size=_BATCH[job.model]), batch_size=_BATCH[job.model])
    macs = count_macs(network, what.input_shape)
    started = time.perf_counter()
    result = prune(network, holdout, _config(job, network), input_shape=what.input_shape, calibration=calibration)
    seconds = time.perf_counter() - started
    names = prunable_weights(network)
    before = sum(what.classifier().net.get_parameter(name).numel() for name in names)
    left = sum(int(network.get_parameter(name).count_nonzero()) for name in names)
    return {
        "job": asdict(job),
        "macs_removed": 1 - count_macs(network, what.input_shape) / macs,
        "weights_removed": 1 - left / before,
        "test": compared(unpruned, answers(network, data, _BATCH[job.model]), data.parts["test"][1].cpu()),
        "holdout": {
            "baseline_points": result.baseline_score,
            "points": result.score,
            "stopped": result.stopped,
            "rounds": result.state.rounds,
            "steps": len(result.steps),
            "audits": [asdict(audit) for audit in getattr(result.state, "audits", [])],
        },
        "calibration_images": _CALIBRATION[job.model],
        "holdout_images": _HOLDOUT[job.model],
        "seconds": seconds,
        "moments_seconds": _moments_seconds(what, job, calibration),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "place": {"device": device_name(place.device), "threads": torch.get_num_threads()},
        "environment": describe_environment(threads=torch.get_num_threads()),
    }


def _subject(job: Job, place: Place) -> Subject:
    if job.model != "swin_tiny":
        return subject(job.model, job.seed, place, {"holdout": _HOLDOUT[job.model]})
    images = subject("deit_tiny", job.seed, place, {"holdout": _HOLDOUT[job.model]})
    return replace(images, name=job.model, model=_SWIN_T, weights=_random_weights(place))


def _random_weights(place: Place) -> Path:
    """The file of Swin-T as it is made, which is written on first use."""
    file = place.cache / "swin_tiny-random.safetensors"
    with locked(file):
        if not file.is_file():
            torch.manual_seed(0)
            temporary = file.with_suffix(".tmp")
            save_file({k: v.contiguous() for k, v in create_model(_SWIN_T).state_dict().items()}, temporary)
            os.replace(temporary, file)
    return file


def _config(job: Job, network: nn.Module) -> AdaptivePruningConfig:
    options: dict[str, Any] = {
        "tolerance": job.tolerance or _TOLERANCE,
        "granularity": job.granularity,
        "criterion": job.criterion,
        "compensation": job.method,
        "max_sparsity": 0.97,
        "step": 0.2 if job.target is None else 0.9,
    }
    if job.audit:
        options["audit"] = job.audit
    if job.granularity == "structured":
        options |= {"kinds": _KINDS, "ranking": "global", "target": job.target}
    elif job.target is not None and ":" in job.granularity:
        options |= {"step": 0.5, "max_sparsity": 0.5, "max_rounds": 1}
    elif job.target is not None:
        prunable = sum(network.get_parameter(name).numel() for name in prunable_weights(network))
        part = prunable / sum(p.numel() for p in network.parameters())
        options |= {"ranking": "global", "target": job.target * part, "target_of": "parameters"}
    return AdaptivePruningConfig(**options)


def _calibration(what: Subject, data: MemoryData) -> list[Tensor]:
    """Images without labels, none of which decides."""
    chosen = torch.randperm(data.images("train"), generator=torch.Generator().manual_seed(what.seed))
    chosen = chosen[: _CALIBRATION[what.name]].sort().values
    return [data.plain("train", positions)[0] for positions in chosen.split(_BATCH[what.name])]


def _moments_seconds(what: Subject, job: Job, calibration: Sequence[Tensor]) -> float:
    """The time of the one pass over the images, sums included."""
    network = what.classifier().net.to(what.place.device).eval()
    groups = names = None
    if job.granularity == "structured":
        groups = StructuredSpace(AdaptivePruningConfig(kinds=_KINDS)).groups(network)
    else:
        names = [name.removesuffix(".weight") for name in prunable_weights(network)]
    started = time.perf_counter()
    Compensator(calibration).begin_round(network, groups, names or ())
    return time.perf_counter() - started


@torch.no_grad()
def answers(network: nn.Module, data: MemoryData, batch_size: int) -> Tensor:
    """The log-probabilities (images, classes) of the test images."""
    with full_precision():
        return torch.cat(
            [network(images).log_softmax(1).cpu() for images, _ in data.batches("test", batch_size=batch_size)]
        )


def compared(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Any]:
    """Paired counts, the 95 % interval of the points lost, agreement and divergence."""
    right, still = before.argmax(1) == labels, after.argmax(1) == labels
    lost, won, count = int((right & ~still).sum()), int((~right & still).sum()), len(labels)
    points = 100 * (lost - won) / count
    deviation = 100 * np.sqrt(max(lost + won - (lost - won) ** 2 / count, 0.0)) / count
    return {
        "images": count,
        "float_points": 100 * float(right.double().mean()),
        "points": 100 * float(still.double().mean()),
        "points_lost": points,
        "lost_to_wrong": lost,
        "won_to_right": won,
        "interval_points": [points - 1.96 * deviation, points + 1.96 * deviation],
        "agreement_points": 100 * float((before.argmax(1) == after.argmax(1)).double().mean()),
        "divergence_nats": float((before.exp() * (before - after)).sum(1).mean()),
    }
