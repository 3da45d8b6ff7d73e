"""From the jobs' files to rows: means over seeds with their range, losses paired image by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swincompress_pl.report import PairedComparison

from .jobs import Job
from .subjects import OF_TRAINING
from .training import right_images

Results = Mapping[str, dict[str, Any]]
# Part of the prunable weights, or of the MACs, to remove within a tolerance on swin_cifar10 with recovery.
BARS = {
    "weight": {5.0: 0.55, 2.0: 0.50, 1.0: 0.40},
    "structured": {5.0: 0.45, 2.0: 0.35, 1.0: 0.25},
}


@dataclass(frozen=True)
class Spread:
    """A figure over seeds, in their order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def show(self, digits: int = 2) -> str:
        """ "1.23 (1.10 .. 1.40)", or one number where there is no range."""
        low, high = min(self.values), max(self.values)
        middle = f"{self.mean:.{digits}f}"
        return middle if len(self.values) == 1 else f"{middle} ({low:.{digits}f} .. {high:.{digits}f})"

    def to_dict(self) -> dict[str, Any]:
        """Mean, range and values."""
        return {"mean": self.mean, "min": min(self.values), "max": max(self.values), "values": list(self.values)}


@dataclass(frozen=True)
class Loss:
    """Test images of one network against another's, seed by seed."""

    paired: tuple[PairedComparison, ...]

    @property
    def points(self) -> Spread:
        """Points lost; below 0 is a gain."""
        return Spread(tuple(-p.change_points + 0.0 for p in self.paired))

    @property
    def flips(self) -> str:
        """ "12 / 9, 8 / 11": right to wrong / wrong to right of each seed."""
        return ", ".join(f"{p.right_to_wrong} / {p.wrong_to_right}" for p in self.paired)

    @property
    def widest_interval(self) -> tuple[float, float]:
        """Points lost at the ends of the seeds' 95 % intervals."""
        ends = [p.interval_points for p in self.paired]
        return -max(high for _, high in ends), -min(low for low, _ in ends)

    def to_dict(self) -> dict[str, Any]:
        """Counts and what follows from them."""
        low, high = self.widest_interval
        return {
            "points": self.points.to_dict(),
            "interval95_points": [low, high],
            "right_to_wrong": [p.right_to_wrong for p in self.paired],
            "wrong_to_right": [p.wrong_to_right for p in self.paired],
            "images": self.paired[0].images,
        }


def paired(before: dict[str, Any], after: dict[str, Any]) -> PairedComparison:
    """Two `accuracy` entries of the same images."""
    was, is_now = right_images(before), right_images(after)
    both = int((was & is_now).sum())
    # which wrong class it was is not recorded, so the same predictions are those that are right in both
    return PairedComparison(
        both_right=both,
        right_to_wrong=int((was & ~is_now).sum()),
        wrong_to_right=int((~was & is_now).sum()),
        both_wrong=int(np.count_nonzero(~was & ~is_now)),
        same_predictions=both,
    )


def control_of(results: Results, model: str, seed: int) -> dict[str, Any] | None:
    """The results of the control of a seed, None where it is not there."""
    return results.get(Job(kind="control", model=model, seed=seed).name)


def better_control(control: dict[str, Any]) -> dict[str, Any]:
    """The better on the test images of the given network and the same fine-tuned unpruned: figures of a network."""
    return dict(max((control["given"], control["after"]), key=lambda entry: entry["test"]["correct"]))


def grouped(results: Results, kind: str, key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Jobs of a kind that differ in their seed only; each list in order of the seeds."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in results.values():
        if entry["job"]["kind"] == kind:
            groups[key(entry["job"])].append(entry)
    return {k: sorted(entries, key=lambda e: e["job"]["seed"]) for k, entries in groups.items()}


def table1(results: Results, model: str) -> list[dict[str, Any]]:
    """A row for each granularity, way of recovery and tolerance: what was removed and what it cost."""

    def key(job: dict[str, Any]) -> tuple[Any, ...]:
        way = "narrow" if job.get("narrow") else "alone"
        if job["recovery"]:
            way = "tolerance" if job["target"] is None else "target"
        return job["model"], job["granularity"], way, -job["tolerance"], job["target"] or 0.0

    rows = []
    for (name, granularity, way, tolerance, target), entries in sorted(grouped(results, "prune", key).items()):
        entries = [e for e in entries if _comparable(results, e)]
        if name == model and -tolerance <= max(BARS["weight"]) and entries:
            rows.append(_row(results, entries, granularity, way, -tolerance, target))
    return rows


def _row(
    results: Results, entries: Sequence[dict[str, Any]], granularity: str, way: str, tolerance: float, target: float
) -> dict[str, Any]:
    losses = Loss(tuple(paired(_float(results, e, way)["test"], e["after"]["test"]) for e in entries))
    removed = Spread(tuple(removed_part(e, granularity) for e in entries))
    row = {
        "granularity": granularity,
        "way": way,
        "tolerance": tolerance,
        "target": target or None,
        "seeds": [e["job"]["seed"] for e in entries],
        "weights_removed": Spread(tuple(e["after"]["prunable"]["removed"] for e in entries)),
        "macs_removed": Spread(tuple(1 - e["after"]["macs"] / e["after"]["macs_before"] for e in entries)),
        "float_accuracy": Spread(tuple(_float(results, e, way)["test"]["percent"] for e in entries)),
        "accuracy": Spread(tuple(e["after"]["test"]["percent"] for e in entries)),
        "lost": losses,
        "holdout_lost": Spread(tuple(e["search"]["baseline_score"] - e["search"]["score"] for e in entries)),
        "rollback_held": all(e["search"]["rollback_held"] for e in entries),
        "rounds": [e["search"]["rounds"] for e in entries],
        "stopped": [e["search"]["stopped"] for e in entries],
        "seconds": Spread(tuple(e["seconds"] for e in entries)),
        "search_seconds": Spread(tuple(e["search"]["seconds"] for e in entries)),
        "part_of_naive": Spread(tuple(_part_of_naive(e) for e in entries)),
    }
    bar = BARS[granularity].get(tolerance)
    if way == "target" and entries[0]["job"]["model"] == "swin_cifar10" and bar is not None:
        within = [r >= bar and lost <= tolerance for r, lost in zip(removed.values, losses.points.values, strict=True)]
        row |= {"bar": bar, "bar_reached": sum(within)}
    return row


def removed_part(entry: dict[str, Any], granularity: str) -> float:
    """What a granularity is judged by: the part of the prunable weights, or of the MACs, that is gone."""
    after = entry["after"]
    return float(after["prunable"]["removed"] if granularity == "weight" else 1 - after["macs"] / after["macs_before"])


def _float(results: Results, entry: dict[str, Any], way: str) -> dict[str, Any]:
    """What a job is measured against: without training in it the given network, else the better control."""
    control = control_of(results, entry["job"]["model"], entry["job"]["seed"])
    assert control is not None
    return dict(control["given"]) if way in ("alone", "narrow") else better_control(control)


def _comparable(results: Results, entry: dict[str, Any]) -> bool:
    """There is a control that began with the same weights and was trained by the same recipe in the same precision."""
    control = control_of(results, entry["job"]["model"], entry["job"]["seed"])
    if control is None or control["weights"] != entry["weights"]:
        return False
    same = all(control["recipe"][field] == entry["recipe"][field] for field in OF_TRAINING)
    return not entry["job"]["recovery"] or (same and control["place"]["precision"] == entry["place"]["precision"])


def comparison(results: Results) -> list[dict[str, Any]]:
    """A row for each method at a sparsity: ours first, then its peers by accuracy; and what failed."""
    rows = []
    references = grouped(results, "peer", lambda job: _without_seed(job["reference"]))
    for reference, peers in sorted(references.items()):
        ours = [e for name, e in results.items() if _without_seed(name) == reference and _comparable(results, e)]
        by_seed = {e["job"]["seed"]: e for e in ours}
        methods: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in peers:
            if entry["job"]["seed"] in by_seed:
                methods[entry["job"]["method"]].append(entry)
        if ours:
            found = [_peer_row(results, reference, "ours", sorted(ours, key=lambda e: e["job"]["seed"]), by_seed)]
            found += [_peer_row(results, reference, method, entries, by_seed) for method, entries in methods.items()]
            rows += [found[0], *sorted(found[1:], key=lambda row: -row["accuracy"].mean if "accuracy" in row else 0.0)]
    return rows


def _peer_row(
    results: Results, reference: str, method: str, entries: list[dict[str, Any]], ours: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"reference": reference, "method": method, "granularity": entries[0]["job"]["granularity"]}
    failed = [e["failed"] for e in entries if "failed" in e]
    entries = [e for e in entries if "failed" not in e and _comparable(results, e)]
    if failed or not entries:
        return row | {"failed": sorted(set(failed)) or ["no control of the same recipe"]}
    return row | {
        "seeds": [e["job"]["seed"] for e in entries],
        "weights_removed": Spread(tuple(e["after"]["prunable"]["removed"] for e in entries)),
        "macs_removed": Spread(tuple(1 - e["after"]["macs"] / e["after"]["macs_before"] for e in entries)),
        "accuracy": Spread(tuple(e["after"]["test"]["percent"] for e in entries)),
        "lost": Loss(
            tuple(
                paired(_float(results, e, "fit" if e["job"]["recovery"] else "alone")["test"], e["after"]["test"])
                for e in entries
            )
        ),
        "behind_ours": Loss(
            tuple(paired(ours[e["job"]["seed"]]["after"]["test"], e["after"]["test"]) for e in entries)
        ),
        "seconds": Spread(tuple(e["seconds"] for e in entries)),
    }


def _without_seed(name: str) -> str:
    return name.rsplit("-s", 1)[0]


def _part_of_naive(entry: dict[str, Any]) -> float:
    cost = entry["search"]["scoring"]
    return float(cost["image_forwards"] / cost["naive_images"])


def part_of_naive(results: Results) -> float | None:
    """Forward passes of our searches on swin_cifar10 as a part of the naive number, the mean over the jobs."""
    parts = [
        _part_of_naive(e)
        for e in results.values()
        if e["job"]["kind"] == "prune" and e["job"]["model"] == "swin_cifar10" and e["job"]["recovery"]
    ]
    return sum(parts) / len(parts) if parts else None


def plain(value: Any) -> Any:
    """Rows in JSON types."""
    if isinstance(value, Spread | Loss):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value
