"""One job: a search, what it leaves on the test images, and the same after fine-tuning."""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swincompress_pl.pruning import (
    AllocatedPolicy,
    HoldOut,
    PrimeSVTConfig,
    PrimeSVTResult,
    PrioritizedPolicy,
    primesvt,
)
from swincompress_pl.pruning.prime.batchnorm import batchnorm_state, restore_batchnorm
from swincompress_pl.report import describe_environment
from swincompress_pl.report.plain import write_text
from swincompress_pl.report.spiking import spiking_cost

from ..pruning.batches import MemoryData
from ..pruning.subjects import Place, trainer
from ..pruning.training import accuracy, full_precision
from ..runner import read_result, result_file
from ..spiking.accuracy import Engine, quantized
from .subjects import BINARY, INPUT_SHAPE, SUBJECTS, Subject

_COUNTED_IMAGES = 64  # for operations, spikes and energy
_BATCHNORM_IMAGES = 512
# Images of the hold-out in a batch, of a search on that device; fewer leave a GPU idle.
_SCORED_AT_ONCE = {"cpu": 64, "cuda": 250}
# Unless a job says otherwise: the paper's policy; widths in steps of four, as the networks are narrow (16 to 96
# channels), eight would be up to half of them.
_COMMON: dict[str, Any] = {"policy": "prioritized", "blocks": "block", "round_to": 4}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A search on a subject. options: of PrimeSVTConfig, over the common ones; None for the control, only fine-tuned.

    tuned: fine-tune what it leaves. naive: every candidate on every image, for the cost of the plain algorithm.
    holdout: images of the hold-out that decide, without a report of all of it; None for all.
    integers: measure the integers of what the search leaves too.
    """

    subject: str
    name: str
    options: dict[str, Any] | None = field(default_factory=dict)
    tuned: bool = False
    naive: bool = False
    holdout: int | None = None
    integers: bool = False

    @property
    def key(self) -> str:
        return f"{self.subject}-{self.name}"


def all_jobs() -> list[Job]:
    """Every row of the tables."""
    jobs = [Job(subject=subject, name="control", options=None, tuned=True) for subject in SUBJECTS]
    for subject in BINARY:
        jobs += [
            Job(subject=subject, name=name, options=options, tuned=name in _TUNED)
            for name, options in _SEARCHES.items()
        ]
    jobs += [
        Job(subject="maxformer", name=f"naive-{mode}", options={"granularity": granularity}, naive=True)
        for mode, granularity in _MODES.items()
    ]
    for subject in SUBJECTS:
        jobs += [
            Job(
                subject=subject,
                name=f"compensated-{drop}",
                options=_COMPENSATED | {"tolerance": drop},
                holdout=5000,
                integers=True,
            )
            for drop in (1.0, 3.0)
        ]
        jobs.append(Job(subject=subject, name="paper-compensated", options=_PAPER_COMPENSATED, integers=True))
    for subject in _ABLATED:
        jobs += [Job(subject=subject, name=name, options=options) for name, options in _ablations().items()]
    return jobs


def _ablations() -> dict[str, dict[str, Any]]:
    """Those of the paper, and what its frozen blocks cost."""
    never, none = {"frozen": "never"}, {"increments": (0.08, 0.04, 0.02, 0.01)}
    found: dict[str, dict[str, Any]] = {}
    for part in PrioritizedPolicy().target_sets:
        found[f"set-{part:.0%}".rstrip("%")] = {"granularity": "filter", "target_sets": [part]}
    for theta in _THETAS:
        found[f"theta-{theta}"] = {"granularity": "filter", "theta": theta}
    found["memory-27"] = {"granularity": "filter", "min_memory_saving": 0.27}
    for theta in _THETAS:
        found[f"theta-{theta}-frozen"] = {"granularity": "filter", "theta": theta} | never
    found["group-frozen"] = never
    return found | {f"{mode}-unfrozen": {"granularity": granularity} | none for mode, granularity in _MODES.items()}


_MODES = {"paper": "filter", "group": "structured"}  # in the names of jobs
_ABLATED = ("maxformer", "qkformer")
_SEARCHES: dict[str, dict[str, Any]] = {
    "paper": {"granularity": "filter"},
    "paper-size": {"granularity": "filter", "order": "size"},
    "paper-strict": {"granularity": "filter", "tolerance": 1.5},
    "paper-2.25": {"granularity": "filter", "tolerance": 2.25},
    "group": {},
    "group-size": {"order": "size"},
    "group-layers": {"blocks": "layer"},
    "group-strict": {"blocks": "layer", "tolerance": 1.5},
    "deep-6.0": {"blocks": "layer", "tolerance": 6.0},
    "deep-12.0": {"blocks": "layer", "tolerance": 12.0},
    "allocated-batchnorm": {"policy": "allocated", "blocks": "layer", "batchnorm": "correct"},
    **{
        f"paper-allocated-{drop}": {"granularity": "filter", "policy": "allocated", "tolerance": drop}
        for drop in (0.75, 1.5, 3.0)
    },
    **{
        f"allocated-{drop}": {"policy": "allocated", "blocks": "layer", "tolerance": drop}
        for drop in (1.5, 3.0, 6.0, 12.0)
    },
}
# Whatever reads what goes is solved again, and statistics are corrected behind that; the rates come from divergences on
# unlabelled images. A part of the hold-out audits.
_COMPENSATED: dict[str, Any] = {
    "policy": "allocated", "curves": "divergence", "blocks": "layer", "compensation": "ridge", "batchnorm": "correct",
    "criterion": "second_order", "min_block_share": 0.1, "max_sparsity": 0.97,
    "rates": [*(round(0.12 * n, 2) for n in range(1, 8)), 0.9, 0.94, 0.97], "curve_images": 128, "audit": 0.5,
}  # fmt: skip
# The paper's zeros, with the weights that are left solved again.
_PAPER_COMPENSATED: dict[str, Any] = {"granularity": "filter", "compensation": "ridge"}
_TUNED = (
    "paper", "paper-strict", "paper-2.25", "group", "group-layers", "group-strict", "deep-6.0", "deep-12.0",
    "paper-allocated-0.75", "paper-allocated-1.5", "allocated-batchnorm",
    "allocated-3.0", "allocated-6.0", "allocated-12.0",
)  # fmt: skip
_THETAS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is done of a job now. seed: of the fine-tuning; others than 0 repeat what 0 has tuned. tune: fine-tune, too,
    if the job says so."""

    job: Job
    seed: int = 0
    tune: bool = True

    @property
    def name(self) -> str:
        """Of the file of results."""
        return self.job.key + (f"-seed{self.seed}" if self.seed else "")


def do(what: Run, folder: Path, place: Place, commit: str) -> Path:
    """Does it, from what is known, and writes all of the job's results into `folder`."""
    job = what.job
    known = read_result(folder, job.key) if result_file(folder, job.key).is_file() else None
    if what.seed and known is not None:
        result = repeat(job, place, commit, folder, known=known, seed=what.seed)
    else:
        result = run(job, place, commit, folder, known=known, tune=what.tune)
    return write_text(result_file(folder, what.name), json.dumps(result))


def run(
    job: Job, place: Place, commit: str, out: Path, *, known: dict[str, Any] | None = None, tune: bool
) -> dict[str, Any]:
    """The job's result, in JSON types.

    known: what was found before of a job that is only to be fine-tuned yet; its search comes from its memo in `out`.
    tune: fine-tune now, if the job says so.
    """
    started, subject = time.perf_counter(), SUBJECTS[job.subject]
    data = subject.data(place, subject.fine_tuning, 0)
    module, network = _trained(subject, place, 0)
    images = next(iter(data.holdout_dataloader()))[0][:_COUNTED_IMAGES]
    made = _made_with(job, place, commit, 0)
    result = known or made | {
        "given": _once(
            out / "memo" / f"{job.subject}-given{'' if job.holdout is None else '-test'}.json",
            {key: made[key] for key in ("weights", "where")},
            lambda: _figures(network, data, images, holdout=job.holdout is None),
        )
    }
    if job.options is not None:
        found = _search(job, network, data, place, out)
        if known is None:
            result["search"] = found.to_dict()
            result["single_shot"] = _figures(network, data, images, holdout=job.holdout is None)
            if job.integers:
                result["integer"] = _integers(network, data)
            elif job.holdout is None and job.options.get("batchnorm", "keep") == "keep":
                result["batchnorm_anew"] = _with_batchnorm_anew(network, data)
        else:
            _refuse_another_network(found, known, result_file(out, job.key))
    if job.tuned and tune:
        result["tuned"] = (
            _fine_tune(subject, module, data, place) | {"commit": commit} | _figures(network, data, images)
        )
    result["seconds"] = round(time.perf_counter() - started) + result.get("seconds", 0)
    return result


def repeat(job: Job, place: Place, commit: str, out: Path, *, known: dict[str, Any], seed: int) -> dict[str, Any]:
    """The fine-tuning of what the job's search left, with another seed: of the order of the images, the crops, the
    mirrored ones. known: the job's result, whose memo is in `out`.
    """
    started, subject = time.perf_counter(), SUBJECTS[job.subject]
    module, network = _trained(subject, place, seed)
    result = _made_with(job, place, commit, seed)
    if job.options is not None:
        found = _search(job, network, subject.data(place, subject.fine_tuning, 0), place, out)
        _refuse_another_network(found, known, result_file(out, job.key))
    data = subject.data(place, subject.fine_tuning, seed)
    tuned = _fine_tune(subject, module, data, place)
    network.to(place.device)  # a Trainer leaves it on the CPU
    result["tuned"] = tuned | {"commit": commit, "test": accuracy(network, data, "test")}
    return result | {"seconds": round(time.perf_counter() - started)}


def _trained(subject: Subject, place: Place, seed: int) -> tuple[Any, nn.Module]:
    """The baseline in its module, and the network alone."""
    module = subject.classifier(subject.fine_tuning, seed, trained=True)
    return module, _laid_out(module.net.to(place.device), place).eval()


def _made_with(job: Job, place: Place, commit: str, seed: int) -> dict[str, Any]:
    return {
        "job": {"subject": job.subject, "name": job.name, "options": job.options, "naive": job.naive},
        "commit": commit,
        "seed": seed,
        "precision": place.precision,
        "where": where(place.device),
        "weights": hashlib.sha256(SUBJECTS[job.subject].weights.read_bytes()).hexdigest()[:16],
    }


def _refuse_another_network(found: PrimeSVTResult, known: dict[str, Any], file: Path) -> None:
    if known["search"]["applied"] != found.to_dict()["applied"]:
        raise ValueError(f"{file.stem} was searched with other code or weights; remove {file}")


def _search(job: Job, network: nn.Module, data: MemoryData, place: Place, out: Path) -> PrimeSVTResult:
    """Prunes the network."""
    options = _COMMON | (job.options or {})
    if options.get("granularity") == "filter":
        options.pop("round_to")
    if job.naive:
        options |= {"benefit_resolution_points": 1e-9, "robustness_resolution_points": 1e-9}
    plain: dict[str, Any] = {"confidence": 1.0, "cache_size_bytes": 0} if job.naive else {}
    if job.holdout is not None:
        plain["max_images"] = job.holdout
    with warnings.catch_warnings(), full_precision():
        warnings.filterwarnings("ignore", message="PrimeSVT: no candidate keeps both")
        return primesvt(
            network,
            HoldOut.from_batches(data.holdout_dataloader(), batch_size=_SCORED_AT_ONCE[place.device], **plain),
            _config(options),
            input_shape=INPUT_SHAPE,
            calibration=_calibration(data),
            evaluation_cache=out / "memo" / f"{job.key}.jsonl",
        )


def _config(options: dict[str, Any]) -> PrimeSVTConfig:
    """The config of a job's options, in which settings of the policy stand beside the others."""
    policy = AllocatedPolicy if options["policy"] == "allocated" else PrioritizedPolicy
    of_policy = {name: options.pop(name) for name in policy.__dataclass_fields__ if name in options}
    if of_policy:
        options["policy"] = policy(**of_policy)
    return PrimeSVTConfig(**options)


def _once(file: Path, of: dict[str, str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, kept in a file with what it is `of`: many jobs begin with one network."""
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["of"] == of:
            return dict(kept["found"])
    found = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"of": of, "found": found}))
    return found


def _laid_out(network: nn.Module, place: Place) -> nn.Module:
    """On a CPU in the layout that its convolutions and poolings are fastest in."""
    return network.to(memory_format=torch.channels_last) if place.device == "cpu" else network


def _calibration(data: MemoryData) -> list[torch.Tensor]:
    return [batch for batch, _ in data.calibration_dataloader(_BATCHNORM_IMAGES)]


def where(device: str) -> str:
    """The machine and the packages, in a line. device: "cpu" or "cuda"."""
    found = describe_environment()
    packages = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "lightning", "spikingjelly"))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{found['cpu']} ({', '.join(found['cpu_flags'])})"
    return f"{name}, {torch.get_num_threads()} threads, {packages}"


def _figures(network: nn.Module, data: MemoryData, images: torch.Tensor, *, holdout: bool = True) -> dict[str, Any]:
    network.to(images.device)  # a Trainer leaves it on the CPU
    figures = {split: accuracy(network, data, split) for split in ("test", *(["holdout"] if holdout else []))}
    figures["cost"] = spiking_cost(network.cpu(), images.cpu()).to_dict()  # what is counted was proven on the CPU
    network.to(images.device)
    return figures


def _with_batchnorm_anew(network: nn.Module, data: MemoryData) -> dict[str, Any]:
    """The accuracy with BatchNorm's statistics of the pruned network; it is left as it was."""
    before = batchnorm_state(network)
    torch.optim.swa_utils.update_bn(_calibration(data), network)
    found = {"test": accuracy(network, data, "test")}
    restore_batchnorm(network, before)
    return found


def _integers(network: nn.Module, data: MemoryData) -> dict[str, Any]:
    """The C++ engine's accuracy with what `network` becomes in integers without training; it is left as it was."""
    found = quantized(copy.deepcopy(network).cpu(), data, "W8A8", rounding="nearest")
    return {"bits": "W8A8", "test": accuracy(Engine(found.cpu(), torch.get_num_threads()), data, "test")}


def _fine_tune(subject: Subject, module: Any, data: MemoryData, place: Place) -> dict[str, Any]:
    started = time.perf_counter()
    _laid_out(module.net, place)  # slices are not
    module.train()  # Lightning trains in the mode that it finds
    fit = trainer(subject.fine_tuning.epochs, [], place)
    fit.fit(module, datamodule=data)
    module.net.eval()
    return {"seconds": round(time.perf_counter() - started), "epochs": subject.fine_tuning.epochs}
