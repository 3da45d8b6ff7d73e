"""What a search knows between rounds, as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """One tried step: a row of the search's history.

    score: accuracy in points with the step taken. parameters, macs: of the network after the decision (macs: None where
    no input shape was given). units_after is what was tried, also where it was not accepted.
    """

    round: int
    group: str
    kind: str
    units_before: int
    units_after: int
    score: float
    accepted: bool
    parameters: int
    macs: int | None = None


@dataclass(kw_only=True)
class GroupState:
    """Where one group stands: its original width, its next step as a part of that width, and why it is locked."""

    initial_units: int
    step: float
    locked: str | None = None


@dataclass(kw_only=True)
class SearchState:
    """Where a search stands after some rounds; `stopped` says why it is over, None while it is not."""

    baseline_score: float
    baseline_parameters: int
    baseline_macs: int | None
    groups: dict[str, GroupState]
    rounds: int = 0
    score: float | None = None
    steps: list[Step] = field(default_factory=list)
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The state in JSON types."""
        return {"version": STATE_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchState:
        """The state that `to_dict` wrote; ValueError for another version."""
        if data.get("version") != STATE_VERSION:
            raise ValueError(f"a search state of version {STATE_VERSION} is expected, not {data.get('version')!r}")
        fields = {key: value for key, value in data.items() if key != "version"}
        fields["groups"] = {name: GroupState(**entry) for name, entry in fields["groups"].items()}
        fields["steps"] = [Step(**row) for row in fields["steps"]]
        return cls(**fields)
