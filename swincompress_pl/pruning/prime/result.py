"""What PrimeSVT found: plain data for reports, plots and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from swincompress_pl.arguments import integer, number, require
from swincompress_pl.pruning.prime.config import current_settings
from swincompress_pl.pruning.structure.change import Change, nothing_applied
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.stored_data import from_plain, reading

_STATE_VERSION = 2
_READABLE = (1, 2)  # version 1 had other names in `config`


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to prune, and how it does.

    phase: "target set", "robustness" or "policy"; label: what was tried, for people. widths: {target: units that stay},
    the narrowed ones. saving: part of all parameters that it removes. score: accuracy in points on the hold-out, an
    estimate with a standard error of `error_points` unless `exact`; images: how many it took. accepted: within the
    accuracy constraint. remembered: the verdict was known already, nothing was run. stands_for: how many candidates of
    the plain algorithm it replaces. block, rate: the one block that differs from what the candidate was compared with,
    None where several do, and its rate.
    """

    phase: str
    label: str
    widths: dict[str, int]
    saving: float
    score: float
    accepted: bool
    images: int
    exact: bool
    error_points: float = 0.0
    remembered: bool = False
    stands_for: int = 1
    block: str | None = None
    rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        verdict = "within" if self.accepted else "beyond"
        return f"{self.label}: {self.saving:.1%} saved at {self.score:.2f} points, {verdict} the constraint"


@dataclass(frozen=True, kw_only=True)
class TargetSet:
    """Alg. 1's account of one set: the `part` largest layers, the rates that met the constraint, and what they are
    worth, the mean accuracy plus the mean saving, both in points; None where no rate did."""

    part: float
    layers: int
    accepted_rates: tuple[float, ...]
    benefit: float | None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A block alone at `rate`: what it saves of all parameters, and what it loses on the hold-out, both in points."""

    rate: float
    saving: float
    drop: float


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """One block: its layers, what they hold of all parameters, and how the policy treated it.

    robustness: saving / (accuracy drop + 0.001), both in points, of the network with this block at twice the initial
    rate; with the policy "allocated" of the network with this block alone, at the highest rate measured up to `rate`;
    None where it was not measured. band: 0 for the most robust. rate: where the policy left it.
    curve: with the policy "allocated" the block alone at rising rates, as far as the accuracy constraint allows.
    """

    name: str
    layers: tuple[str, ...]
    parameters_part: float
    robustness: float | None = None
    band: int = 0
    rate: float = 0.0
    curve: tuple[CurvePoint, ...] = ()


@dataclass(kw_only=True)
class PrimeSVTResult:
    """What a search found and applied.

    met: the applied candidate keeps both constraints. applied: None where nothing was pruned. within_accuracy,
    within_memory: the two alternatives, the largest saving within the accuracy constraint and the best accuracy within
    that of memory; None where there is none, equal to `applied` or not. Their scores are of the whole hold-out.
    baseline_score: in points. spike_rates: of the unpruned network, a neuron, on the hold-out.
    parameters_*: the network's, with those that a mask makes zero. scoring: what it cost (`ScoringCost`), with
    `candidates` (tried), `plans` (different ones), `evaluations` (that were run in this process), `remembered`
    (verdicts that were known), `batchnorm_passes` over the calibration images, `holdout_images`, and
    `naive_image_forwards` (what a whole pass over the hold-out for each candidate, or each plan `_distinct`, takes).
    change: what was done to the network, for optimizers and `revert`; not part of the stored state.
    """

    config: dict[str, Any]
    met: bool
    applied: Candidate | None
    within_accuracy: Candidate | None
    within_memory: Candidate | None
    baseline_score: float
    initial_rate: float
    target_sets: list[TargetSet]
    blocks: list[BlockState]
    candidates: list[Candidate]
    spike_rates: dict[str, float]
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    scoring: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    change: Change = field(default_factory=lambda: Change(applied=nothing_applied()))

    @property
    def plan(self) -> PruningPlan:
        """What was sliced; empty with granularity "filter", whose zeros are masks."""
        return self.change.applied.plan

    @property
    def score(self) -> float:
        """The accuracy of the network as it was left, in points on the hold-out."""
        return self.baseline_score if self.applied is None else self.applied.score

    @property
    def saving(self) -> float:
        """The part of all parameters that is gone, or zero."""
        return 0.0 if self.applied is None else self.applied.saving

    def summary(self) -> str:
        """What was found, in a sentence or two."""
        drop, least = self.config["tolerance"], self.config["min_memory_saving"]
        if self.met:
            return f"{_told(self.applied, self.baseline_score)}; both constraints are met"
        found = [
            f"no candidate keeps both constraints, at most {drop:g} points lost and at least {least:.1%} saved",
            f"within the accuracy: {_told(self.within_accuracy, self.baseline_score)}",
            f"within the memory: {_told(self.within_memory, self.baseline_score)}",
        ]
        return "; ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """All but `change`, in JSON types."""
        plain = {key: value for key, value in vars(self).items() if key != "change"}
        for key in ("applied", "within_accuracy", "within_memory"):
            plain[key] = None if plain[key] is None else plain[key].to_dict()
        for key in ("target_sets", "blocks", "candidates"):
            plain[key] = [asdict(entry) for entry in plain[key]]
        return {"version": _STATE_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrimeSVTResult:
        """What `to_dict` wrote, without a `change`; ValueError for another version, or naming what is not as it was
        written."""
        require("result", data, isinstance(data, Mapping), "a mapping")
        if data.get("version") not in _READABLE:
            raise ValueError(
                f"a PrimeSVT result of version {_STATE_VERSION} is expected, not {data.get('version')!r}; it was "
                "written by another version of swincompress_pl: search again"
            )
        fields = {key: value for key, value in data.items() if key not in ("version", "change")}
        with reading("result.config"):
            fields["config"] = current_settings(fields.get("config", {}))
            for name in ("tolerance", "min_memory_saving"):
                number(name, fields["config"][name], lambda _: True, "a finite number")
        result: PrimeSVTResult = from_plain(cls, fields, "result")
        integer("result.parameters_before", result.parameters_before, least=1)
        return result


def _told(candidate: Candidate | None, baseline: float) -> str:
    if candidate is None:
        return "none"
    return f"{candidate.saving:.2%} of the parameters saved at {candidate.score:.2f} points, unpruned {baseline:.2f}"
