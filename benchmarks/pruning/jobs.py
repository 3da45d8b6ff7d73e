"""What there is to measure, as small values: one job is one process and one file of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swincompress_pl.report.plain import write_text

from ..runner import read_result, result_file

SEEDS = (0, 1, 2)
TOLERANCES = (5.0, 2.0, 1.0)
# A second stopping rule, a little beyond the bars (55, 50, 40 % of the prunable weights; 45, 35, 25 % of the MACs).
TARGETS = {"weight": {5.0: 0.57, 2.0: 0.52, 1.0: 0.42}, "structured": {5.0: 0.47, 2.0: 0.37, 1.0: 0.27}}
# Sparsities of their own for the comparison with peers; the tolerance is wide, so that the target decides.
FIXED = {"weight": 0.50, "structured": 0.35}
FIXED_TOLERANCE = 10.0
# The same where methods come apart, with a short fine-tuning.
SHORT = "swin_cifar10_short"
SHORT_FIXED = {"weight": 0.75, "structured": 0.47}
SHORT_TOLERANCE = 20.0
# What compensation allows is cut at once, and the recovery is as long as the others'.
COMPENSATED = {"swin_cifar10_short": (0.35, 0.47), "deit_tiny": (0.14,)}
COMPENSATED_PEERS = ("oneshot_global", "torch_pruning_mlp")
PEERS = {
    "weight": ("oneshot_global", "oneshot_uniform", "lightning_once", "lightning_iterative"),
    "structured": (
        "oneshot_global",
        "oneshot_uniform",
        "torch_pruning",
        "torch_pruning_mlp",
        "torch_pruning_mlp_global",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """kind: "control" (fine-tuning without pruning), "prune", "peer", "scoring" or "overhead".

    tolerance: in points; narrow: the search begins with an eighth of it. ranked: all targets are ranked together, by
    what the loss feels for what is saved, instead of in turn by magnitude. compensated: what reads the removed units is
    solved again, and one round cuts down to the target. target: part of the prunable weights
    (granularity "weight") or of the MACs ("structured") at which the search ends, None for the tolerance alone.
    recovery: epochs of fine-tuning between and after the rounds.
    method: of a peer; reference: the job whose sparsity it has to reach, which has to be finished first.
    """

    kind: str
    model: str
    seed: int
    granularity: str | None = None
    tolerance: float | None = None
    target: float | None = None
    recovery: bool = False
    narrow: bool = False
    ranked: bool = False
    compensated: bool = False
    method: str | None = None
    reference: str | None = None

    @property
    def name(self) -> str:
        """Unique, and the name of the results' file."""
        parts = [self.kind, self.model, self.granularity, self.method]
        if self.tolerance is not None:
            parts.append(f"t{self.tolerance:g}")
        if self.kind in ("prune", "scoring"):
            parts.append("recovery" if self.recovery else "narrow" if self.narrow else "alone")
        if self.kind == "prune" and self.recovery:
            parts.append("free" if self.target is None else f"target{self.target:g}")
        if self.ranked:
            parts.append("ranked")
        if self.compensated:
            parts.append("compensated")
        if self.reference is not None:
            parts.append("as-" + self.reference.split("-", 3)[3].rsplit("-", 1)[0].replace("-", "_"))
        if self.kind == "peer" and not self.recovery:
            parts.append("alone")
        return "-".join(part for part in parts if part) + f"-s{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)


def all_jobs() -> list[Job]:
    """Every job, the ones that matter most first."""
    swin = "swin_cifar10"
    jobs = [Job(kind="control", model=swin, seed=seed) for seed in SEEDS]
    jobs += _pruned(swin, with_targets=True)
    jobs += [job for granularity in FIXED for job in _at_fixed_sparsity(swin, granularity)]
    jobs += _pruned(swin, with_targets=False)
    jobs += _unrecovered(swin)
    jobs += _narrow(swin)
    for granularity in ("structured", "weight"):
        jobs += [
            Job(kind="scoring", model=swin, seed=0, granularity=granularity, tolerance=2.0, recovery=recovered)
            for recovered in (False, True)
        ]
    for model in ("deit_tiny", "digits_swin"):
        jobs += [Job(kind="control", model=model, seed=seed) for seed in SEEDS]
        jobs += _pruned(model, with_targets=False) + _unrecovered(model)
    jobs += [job for granularity in FIXED for job in _like_tolerance_2(swin, granularity)]
    jobs += _short()
    jobs += _compensated()
    jobs += [Job(kind="overhead", model=swin, seed=0, granularity=g, tolerance=2.0) for g in ("structured", "weight")]
    return jobs


def _pruned(model: str, *, with_targets: bool) -> list[Job]:
    return [
        Job(
            kind="prune",
            model=model,
            seed=seed,
            granularity=granularity,
            tolerance=tolerance,
            target=TARGETS[granularity][tolerance] if with_targets else None,
            recovery=True,
        )
        for granularity in TARGETS
        for tolerance in TOLERANCES
        for seed in SEEDS
    ]


def _unrecovered(model: str) -> list[Job]:
    """Here the seed decides which images are held out (for the digits also the network), and nothing else."""
    return [
        Job(kind="prune", model=model, seed=seed, granularity=granularity, tolerance=tolerance)
        for granularity in TARGETS
        for tolerance in TOLERANCES
        for seed in SEEDS
    ]


def _narrow(model: str) -> Iterator[Job]:
    """Without recovery, beginning with a narrow tolerance; and the peers, without training too, at its sparsity."""
    for granularity in TARGETS:
        for tolerance in reversed(TOLERANCES):
            for seed in SEEDS:
                ours = Job(
                    kind="prune", model=model, seed=seed, granularity=granularity, tolerance=tolerance, narrow=True
                )
                yield ours
                yield from (peer for peer in _peers_of(ours) if not (peer.method or "").startswith("lightning"))


def _at_fixed_sparsity(model: str, granularity: str) -> Iterator[Job]:
    for seed in SEEDS:
        ours = Job(
            kind="prune", model=model, seed=seed, granularity=granularity, tolerance=FIXED_TOLERANCE,
            target=FIXED[granularity], recovery=True,
        )  # fmt: skip
        yield from (ours, *_peers_of(ours))


def _short() -> Iterator[Job]:
    for seed in SEEDS:
        yield Job(kind="control", model=SHORT, seed=seed)
        for granularity, target in SHORT_FIXED.items():
            ours = Job(
                kind="prune", model=SHORT, seed=seed, granularity=granularity, tolerance=SHORT_TOLERANCE,
                target=target, recovery=True, ranked=True,
            )  # fmt: skip
            yield from (ours, *_peers_of(ours))


def _compensated() -> Iterator[Job]:
    for model, targets in COMPENSATED.items():
        for seed in SEEDS:
            for target in targets:
                ours = Job(
                    kind="prune", model=model, seed=seed, granularity="structured", tolerance=SHORT_TOLERANCE,
                    target=target, recovery=True, compensated=True,
                )  # fmt: skip
                yield ours
                if model == SHORT:
                    yield from (peer for peer in _peers_of(ours) if peer.method in COMPENSATED_PEERS)


def _like_tolerance_2(model: str, granularity: str) -> Iterator[Job]:
    for ours in _pruned(model, with_targets=False):
        if ours.granularity == granularity and ours.tolerance == 2.0:
            yield from _peers_of(ours)


def _peers_of(ours: Job) -> Iterator[Job]:
    assert ours.granularity is not None
    for method in PEERS[ours.granularity]:
        yield Job(
            kind="peer", model=ours.model, seed=ours.seed, granularity=ours.granularity, method=method,
            recovery=ours.recovery, reference=ours.name,
        )  # fmt: skip


def write_result(folder: Path, job: Job, figures: dict[str, Any]) -> Path:
    """Complete or not at all."""
    text = json.dumps({"job": job.to_dict(), **figures}, allow_nan=False)
    return write_text(result_file(folder, job.name), text + "\n")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{job name: results} of everything in a folder."""
    return {file.stem: read_result(folder, file.stem) for file in sorted(folder.glob("*-s[0-9]*.json"))}
