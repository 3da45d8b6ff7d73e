"""What a search knows between rounds, as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from swincompress_pl.arguments import integer, require
from swincompress_pl.stored_data import from_plain

STATE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """One tried step: a row of the search's history.

    score: accuracy in points with the step taken, an estimate unless `exact`; images: how many were scored for it.
    parameters (those that are not zero by a mask), macs, size_bytes: of the network after the decision (macs: None
    where no input shape was given). units_after is what was tried, also where it was not accepted.
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
    """Where one target stands: original and present width, the next step as a part of the original, why locked."""

    kind: str
    initial_units: int
    units: int
    step: float
    locked: str | None = None


@dataclass(kw_only=True)
class SearchState:
    """Where a search stands after some rounds; `stopped` says why it is over, None while it is not.

    baseline_*: of the network before the first round; baseline_prunable: the weights that the targets own.
    tolerance: in points, of the present rounds (`first_tolerance` makes it grow).
    score: of the network after the last round, over the whole hold-out. initial_units: of every group or layer.
    sensitivity: {target: [(part removed, score in points), ...]}, each alone, where it was measured.
    scoring: what scoring cost so far (`ScoringCost`). elapsed_s: time spent searching.
    """

    granularity: str
    baseline_score: float
    baseline_parameters: int
    baseline_prunable: int
    baseline_bytes: int
    baseline_macs: int | None
    tolerance: float
    targets: dict[str, TargetState]
    initial_units: dict[str, int]
    rounds: int = 0
    score: float | None = None
    steps: list[Step] = field(default_factory=list)
    sensitivity: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    scoring: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The state in JSON types."""
        plain = asdict(self)
        plain["sensitivity"] = {name: [list(point) for point in curve] for name, curve in self.sensitivity.items()}
        return {"version": STATE_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchState:
        """The state that `to_dict` wrote; ValueError for another version, or naming what is not as it was written."""
        require("search", data, isinstance(data, Mapping), "a mapping")
        if data.get("version") != STATE_VERSION:
            raise ValueError(
                f"a search state of version {STATE_VERSION} is expected, not {data.get('version')!r}; it was written "
                "by another version of swincompress_pl: begin a new search"
            )
        state: SearchState = from_plain(cls, {key: value for key, value in data.items() if key != "version"}, "search")
        for name in ("baseline_parameters", "baseline_prunable", "baseline_bytes"):
            integer(f"search.{name}", getattr(state, name), least=1)
        for name, curve in state.sensitivity.items():
            is_curve = bool(curve) and all(0 <= part <= 1 for part, _ in curve)
            require(f"search.sensitivity[{name!r}]", curve, is_curve, "pairs of a part, 0 to 1, and a score")
        return state
