"""What a search knows between rounds, as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from swincompress_pl.arguments import choice, integer, require
from swincompress_pl.pruning.evaluation.audit import Audit, audit_facts
from swincompress_pl.pruning.evaluation.scores import SCORES, bound_facts, score_label
from swincompress_pl.stored_data import from_plain
from swincompress_pl.summaries import Summarized, removed

STATE_VERSION = 2
_LATER: dict[str, Any] = {"audits": [], "audit_before": [], "score_kind": "accuracy", "first_answers": []}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One tried step: a row of the search's history. `str(step)` describes it in one line.

    Attributes:
        round: Number of the round, from 1.
        target: Name of the group or layer that was narrowed; "network" with a global ranking.
        kind: Kind of the group, "weight", or "global".
        units_before: Width of the target before the step; in per mille of all weights with a global ranking.
        units_after: Width that was tried, even if it was not accepted.
        score: Accuracy in points with the step taken, an estimate unless `exact`.
        accepted: Whether the step stayed.
        parameters: Parameters of the network after the decision, without those that a mask makes zero.
        size_bytes: Four bytes per parameter, and a bit per element of a masked weight, after the decision.
        macs: MACs of a forward pass after the decision; None if no input shape was given.
        images: Number of images that were scored; 0 if a function scores.
        exact: Whether the score is of the whole hold-out.
    """

    round: int
    target: str
    kind: str
    units_before: int
    units_after: int
    score: float
    accepted: bool
    parameters: int
    size_bytes: int
    macs: int | None = None
    images: int = 0
    exact: bool = True

    def __str__(self) -> str:
        verdict = "kept" if self.accepted else "undone"
        return f"{self.target} {self.units_before} -> {self.units_after}: {self.score:.2f} points, {verdict}"


@dataclass(kw_only=True)
class TargetState:
    """Where one target stands.

    Attributes:
        kind: Kind of the group, "weight", or "global".
        initial_units: Width before the search.
        units: Present width.
        step: Size of the next step as a part of `initial_units`.
        locked: Why no step is tried any more; None while the target is active.
    """

    kind: str
    initial_units: int
    units: int
    step: float
    locked: str | None = None


@dataclass(kw_only=True)
class SearchState(Summarized):
    """Where a search stands after some rounds. `str(state)` is its summary, and a notebook shows a table.

    Attributes:
        granularity: Granularity of the search's config.
        baseline_score: Accuracy before the first round, in points on the whole hold-out.
        baseline_parameters: Parameters before the first round.
        baseline_prunable: Number of weights that the targets own together.
        baseline_bytes: Bytes of the weights before the first round, four per parameter.
        baseline_macs: MACs of a forward pass before the first round; None if no input shape was given.
        tolerance: Present tolerance in points; with a `first_tolerance` it grows.
        targets: Maps the name of a target to where it stands.
        initial_units: Maps the name of a group or layer to its width before the search.
        rounds: Number of rounds so far.
        score: Accuracy after the last round, in points on the whole hold-out; None before the first round.
        steps: Every tried step in order.
        sensitivity: Maps a target to points (part removed, accuracy in points) with this target narrowed alone. Empty
            unless the order of a local ranking is "sensitivity".
        scoring: What scoring has cost so far, in numbers of images and decisions.
        elapsed_s: Seconds spent searching, without training between rounds.
        audits: What the audit found after each round; empty without one.
        audit_before: What the unpruned network answered on the images of the audit, one text per process.
        score_kind: What is scored: "accuracy", or without labels "agreement" or "kl" (see `HoldOut`).
        first_answers: What the unpruned network answered, one text per process; empty with labels.
        stopped: Why the search is over; None while it is not.
    """

    granularity: str
    baseline_score: float
    baseline_parameters: int
    baseline_prunable: int
    baseline_bytes: int
    baseline_macs: int | None
    tolerance: float
    targets: dict[str, TargetState] = field(repr=False)
    initial_units: dict[str, int] = field(repr=False)
    rounds: int = 0
    score: float | None = None
    steps: list[Step] = field(default_factory=list, repr=False)
    sensitivity: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)
    scoring: dict[str, float] = field(default_factory=dict, repr=False)
    elapsed_s: float = 0.0
    audits: list[Audit] = field(default_factory=list, repr=False)
    audit_before: list[str] = field(default_factory=list, repr=False)
    score_kind: str = "accuracy"
    first_answers: list[str] = field(default_factory=list, repr=False)
    stopped: str | None = None

    def facts(self) -> list[tuple[str, str]]:
        """Returns what the search removed so far, at which score, and why it ended."""
        kept = sum(step.accepted for step in self.steps)
        last = self.steps[-1] if self.steps else None
        parameters = last.parameters if last else self.baseline_parameters
        macs = last.macs if last else self.baseline_macs
        score = "not scored yet" if self.score is None else f"{self.score:.2f}"
        return [
            (score_label(self.score_kind), f"{score} points, unpruned {self.baseline_score:.2f}"),
            *bound_facts(self.score_kind, self.score),
            *audit_facts(self.audits[-1] if self.audits else None),
            ("parameters", removed(self.baseline_parameters, parameters)),
            *([("MACs", removed(self.baseline_macs, macs))] if self.baseline_macs and macs is not None else []),
            ("steps", f"{kept} of {len(self.steps)} kept, in {self.rounds} rounds"),
            ("its end", self.stopped or "not reached"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the state in JSON types; `from_dict` is the inverse."""
        plain = asdict(self)
        plain["sensitivity"] = {name: [list(point) for point in curve] for name, curve in self.sensitivity.items()}
        # Without an audit, and with labels, the file is as that of earlier versions, and they read it.
        plain = {key: value for key, value in plain.items() if key not in _LATER or value != _LATER[key]}
        return {"version": STATE_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchState:
        """Rebuilds a state.

        Args:
            data: What `to_dict` gave, also after a way through JSON.

        Returns:
            The state.

        Raises:
            ValueError: If the state is of another version or damaged; the message names the entry.
        """
        require("search", data, isinstance(data, Mapping), "a mapping")
        if data.get("version") != STATE_VERSION:
            raise ValueError(
                f"a search state of version {STATE_VERSION} is expected, not {data.get('version')!r}; it was written "
                "by another version of swincompress_pl: begin a new search"
            )
        state: SearchState = from_plain(cls, {key: value for key, value in data.items() if key != "version"}, "search")
        for name in ("baseline_parameters", "baseline_prunable", "baseline_bytes"):
            integer(f"search.{name}", getattr(state, name), least=1)
        choice("search.score_kind", state.score_kind, SCORES)
        for name, curve in state.sensitivity.items():
            is_curve = bool(curve) and all(0 <= part <= 1 for part, _ in curve)
            require(f"search.sensitivity[{name!r}]", curve, is_curve, "pairs of a part, 0 to 1, and a score")
        return state
