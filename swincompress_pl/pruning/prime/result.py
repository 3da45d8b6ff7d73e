"""What PrimeSVT found: plain data for reports, plots and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from swincompress_pl.arguments import choice, integer, number, require
from swincompress_pl.pruning.evaluation.audit import Audit, audit_facts
from swincompress_pl.pruning.evaluation.scores import SCORES, bound_facts, score_label
from swincompress_pl.pruning.prime.config import current_settings
from swincompress_pl.pruning.structure.change import Change, nothing_applied
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.stored_data import from_plain, reading
from swincompress_pl.summaries import Summarized, removed

_STATE_VERSION = 2
_LATER: dict[str, Any] = {"audit": None, "score_kind": "accuracy"}
_READABLE = (1, 2)  # version 1 had other names in `config`


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to prune, and its verdict. `str(candidate)` describes it in one line.

    Attributes:
        phase: "target set", "robustness" or "policy".
        label: What was tried, for people.
        widths: Maps a narrowed target to the number of units that stay.
        saving: Part of all parameters that it removes, 0 to 1.
        score: Accuracy in points on the hold-out, an estimate unless `exact`.
        accepted: Whether it is within the accuracy constraint.
        images: Number of images that were scored; 0 if a function scores.
        exact: Whether the score is of the whole hold-out.
        error_points: Standard error of the score in points; 0 if it is exact.
        remembered: Whether the verdict was known already, so that nothing was run.
        stands_for: Number of candidates of the plain algorithm that it replaces.
        block: The only block that differs from what the candidate was compared with; None if several do.
        rate: The rate of that block. With several blocks, that of the block raised last, or None.
    """

    phase: str
    label: str
    widths: dict[str, int] = field(repr=False)
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
        """Returns the fields in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        verdict = "within" if self.accepted else "beyond"
        return f"{self.label}: {self.saving:.1%} saved at {self.score:.2f} points, {verdict} the constraint"


@dataclass(frozen=True, kw_only=True)
class TargetSet:
    """What Alg. 1 found for one set of layers.

    Attributes:
        part: Part of the layers, the largest ones.
        layers: Number of layers.
        accepted_rates: Rates that met the accuracy constraint.
        benefit: Mean accuracy plus mean saving at these rates, both in points; None if no rate met the constraint.
    """

    part: float
    layers: int
    accepted_rates: tuple[float, ...]
    benefit: float | None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A block that alone is pruned.

    Attributes:
        rate: Part of its units that goes.
        saving: What it saves of all parameters, in points.
        drop: What it loses on the hold-out, in points.
    """

    rate: float
    saving: float
    drop: float


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """One block: its layers, and what the policy made of it.

    Attributes:
        name: Name of the layer, or of the block.
        layers: Names of its targets.
        parameters_part: Part of all parameters that the units of its layers own.
        robustness: saving / (accuracy drop + 0.001), both in points, of the network with this block at twice the
            initial rate. With the policy "allocated", of the network with this block alone at the highest measured rate
            up to `rate`. None if it was not measured.
        band: Band of robustness, 0 for the most robust; 0 if the policy uses no bands.
        rate: Rate at which the policy left it.
        curve: The block alone at rising rates, as far as the accuracy constraint allows; empty with the policy
            "prioritized".
    """

    name: str
    layers: tuple[str, ...]
    parameters_part: float
    robustness: float | None = None
    band: int = 0
    rate: float = 0.0
    curve: tuple[CurvePoint, ...] = ()


@dataclass(kw_only=True)
class PrimeSVTResult(Summarized):
    """What a search found and applied. `str(result)` is its summary, and a notebook shows a table.

    Attributes:
        config: The settings in JSON types.
        met: Whether the applied candidate meets both constraints.
        applied: The candidate that was applied; None if nothing was pruned.
        within_accuracy: The candidate with the largest saving within the accuracy constraint; None if there is none.
        within_memory: The candidate with the best accuracy within the memory constraint; None if there is none. The
            scores of this, `applied` and `within_accuracy` are of the whole hold-out.
        baseline_score: Accuracy of the unpruned network, in points on the hold-out.
        initial_rate: Uniform rate that Alg. 1 chose; 0.0 with the policy "allocated".
        target_sets: What Alg. 1 found for each set of layers; empty with the policy "allocated".
        blocks: The blocks, with the rates at which the policy left them.
        candidates: Every candidate that was tried, in order.
        spike_rates: Maps a neuron layer of the unpruned network to its spikes per time step and neuron on the
            hold-out.
        parameters_before: Parameters of the network before.
        parameters_after: Parameters of the network afterwards, including those that a mask makes zero.
        macs_before: MACs of a forward pass before; None if no input shape was given.
        macs_after: MACs of a forward pass afterwards; None if no input shape was given.
        scoring: What the search cost: the numbers of `ScoringCost`; `candidates` that were tried; different `plans`
            among them; `evaluations` that were run in this process; verdicts that were `remembered`; `batchnorm_passes`
            over the calibration images; `compensation_s`, the seconds that its matrices took; `holdout_images`; and
            `naive_image_forwards`, the passes if every candidate (in `naive_image_forwards_distinct` every plan) took
            the whole hold-out.
        elapsed_s: Duration of the search in seconds.
        audit: What the audit found of the network that the search left; None without one.
        score_kind: What is scored: "accuracy", or without labels "agreement" or "kl" (see `HoldOut`).
        change: What was changed in the network, for optimizers; `to_dict` leaves it out.
    """

    config: dict[str, Any] = field(repr=False)
    met: bool
    applied: Candidate | None
    within_accuracy: Candidate | None
    within_memory: Candidate | None
    baseline_score: float
    initial_rate: float
    target_sets: list[TargetSet] = field(repr=False)
    blocks: list[BlockState] = field(repr=False)
    candidates: list[Candidate] = field(repr=False)
    spike_rates: dict[str, float] = field(repr=False)
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    scoring: dict[str, float] = field(default_factory=dict, repr=False)
    elapsed_s: float = 0.0
    audit: Audit | None = None
    score_kind: str = "accuracy"
    change: Change = field(default_factory=lambda: Change(applied=nothing_applied()), repr=False)

    def facts(self) -> list[tuple[str, str]]:
        """Returns what was removed, at which score, and whether the constraints are met."""
        left = 1 - self.saving  # masks leave the number of parameters as it is
        parameters = round(self.parameters_before * left)
        return [
            (score_label(self.score_kind), f"{self.score:.2f} points, unpruned {self.baseline_score:.2f}"),
            *bound_facts(self.score_kind, self.score),
            *audit_facts(self.audit),
            ("parameters", removed(self.parameters_before, parameters)),
            *([("MACs", removed(self.macs_before, self.macs_after))] if self.macs_before and self.macs_after else []),
            ("candidates tried", f"{len(self.candidates)} in {self.elapsed_s:.3g} s"),
            ("verdict", self.summary()),
        ]

    @property
    def plan(self) -> PruningPlan:
        """The units that stay, of what was sliced; empty with granularity "filter", whose zeros are masks."""
        return self.change.applied.plan

    @property
    def score(self) -> float:
        """The accuracy of the network that the search left, in points on the hold-out."""
        return self.baseline_score if self.applied is None else self.applied.score

    @property
    def saving(self) -> float:
        """The part of all parameters that was removed or masked, 0 to 1."""
        return 0.0 if self.applied is None else self.applied.saving

    def summary(self) -> str:
        """Returns one or two sentences about what was found, and what of it is applied."""
        drop, least = self.config["tolerance"], self.config["min_memory_saving"]
        if self.met:
            return f"{_told(self.applied, self.baseline_score)}; both constraints are met"
        found = [
            f"no candidate keeps both constraints, at most {drop:g} points lost and at least {least:.1%} saved",
            f"within the accuracy: {_told(self.within_accuracy, self.baseline_score)}",
            f"within the memory: {_told(self.within_memory, self.baseline_score)}",
            f"nothing is pruned, as prefer={self.config['prefer']!r} found none"
            if self.applied is None
            else f"applied: within the {self.config['prefer']}",
        ]
        return "; ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields but `change` in JSON types; `from_dict` is the inverse."""
        plain = {key: value for key, value in vars(self).items() if key != "change"}
        for key in ("applied", "within_accuracy", "within_memory"):
            plain[key] = None if plain[key] is None else plain[key].to_dict()
        for key in ("target_sets", "blocks", "candidates"):
            plain[key] = [asdict(entry) for entry in plain[key]]
        plain["audit"] = None if self.audit is None else asdict(self.audit)
        # Without an audit, and with labels, the file is as that of earlier versions, and they read it.
        plain = {key: value for key, value in plain.items() if key not in _LATER or value != _LATER[key]}
        return {"version": _STATE_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrimeSVTResult:
        """Rebuilds a result, with an empty `change`.

        Args:
            data: What `to_dict` gave, also after a way through JSON.

        Returns:
            The result.

        Raises:
            ValueError: If the data are of another version or damaged; the message names the entry.
        """
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
            choice("prefer", fields["config"]["prefer"], ("accuracy", "memory"))
        result: PrimeSVTResult = from_plain(cls, fields, "result")
        integer("result.parameters_before", result.parameters_before, least=1)
        choice("result.score_kind", result.score_kind, SCORES)
        return result


def _told(candidate: Candidate | None, baseline: float) -> str:
    if candidate is None:
        return "none"
    return f"{candidate.saving:.2%} of the parameters saved at {candidate.score:.2f} points, unpruned {baseline:.2f}"
