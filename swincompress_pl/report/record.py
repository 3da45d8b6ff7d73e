"""What is known about one compression run, as values that a JSON file holds: stages, steps, layers, operations,
checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from swincompress_pl.pruning.adaptive.state import Step
from swincompress_pl.report.accuracy import Accuracy, PairedComparison
from swincompress_pl.report.diagnosis import read_diagnosis
from swincompress_pl.report.latency import Latency
from swincompress_pl.report.layers import LayerSparsity
from swincompress_pl.report.operations import OperationTime
from swincompress_pl.report.plain import Plain, require_type, write_text
from swincompress_pl.report.search import read_search
from swincompress_pl.report.sizes import Size

RECORD_VERSION = 1
RECORD_FILE = "report.json"
_BYTES_MAX = 2**26
Latencies = Mapping[str, Latency]


class RecordError(ValueError):
    """A run's record cannot be read; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model at one point of the run ("float", "pruned", "fine-tuned", "quantized", "engine"); None is "not
    measured".

    macs: multiply-accumulates of one image. latency_ms: {runtime, e.g. "torch" or "engine": Latency}.
    """

    name: str
    parameters: int | None = None
    macs: int | None = None
    size: Size | None = None
    accuracy: Accuracy | None = None
    latency_ms: Latencies = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "macs": self.macs,
            "size": None if self.size is None else self.size.to_dict(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "latency_ms": {runtime: latency.to_dict() for runtime, latency in self.latency_ms.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        return cls(
            name=data["name"],
            parameters=data["parameters"],
            macs=data["macs"],
            size=None if data["size"] is None else Size.from_dict(data["size"]),
            accuracy=None if data["accuracy"] is None else Accuracy.from_dict(data["accuracy"]),
            latency_ms={runtime: Latency.from_dict(entry) for runtime, entry in data["latency_ms"].items()},
        )


def runtimes(stages: Iterable[Stage]) -> list[str]:
    """The runtimes that any stage was timed on, in order of appearance."""
    return list(dict.fromkeys(runtime for stage in stages for runtime in stage.latency_ms))


@dataclass(frozen=True, kw_only=True)
class PruningStep(Plain):
    """One step that a pruning search tried on one group, and whether it stayed.

    units_after: what was tried, also where it was undone. accuracy_percent: the score on the hold-out that decided, an
    estimate from `images` of it unless `exact`. parameters, macs: of the network after the decision.
    """

    group: str
    units_before: int
    units_after: int
    accepted: bool
    kind: str = ""
    round: int | None = None
    accuracy_percent: float | None = None
    parameters: int | None = None
    macs: int | None = None
    images: int | None = None
    exact: bool | None = None

    @classmethod
    def of(cls, step: Step) -> PruningStep:
        """From a row of a search's history."""
        return cls(
            group=step.target,
            units_before=step.units_before,
            units_after=step.units_after,
            accepted=step.accepted,
            kind=step.kind,
            round=step.round,
            accuracy_percent=step.score,
            parameters=step.parameters,
            macs=step.macs,
            images=step.images,
            exact=step.exact,
        )


@dataclass(frozen=True, kw_only=True)
class Check(Plain):
    """Something that was verified in this run, e.g. that engine and reference gave the same integers."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired comparison under a name, e.g. "engine against float"."""

    name: str
    paired: PairedComparison

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "paired": self.paired.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        return cls(name=data["name"], paired=PairedComparison.from_dict(data["paired"]))


@dataclass(kw_only=True)
class RunRecord:
    """Collects a run while it happens; everything put into it is a frozen value. `write_report` renders it.

    name: the run's title. environment: what `describe_environment` gives. data: what the accuracies were measured on.
    notes: sentences that a reader of the figures must know. pruning: what `add_pruning` was given; with it, the steps
    shown are the search's and `steps` stays empty. quantization: what `add_quantization` was given.
    """

    name: str
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    stages: list[Stage] = field(default_factory=list)
    steps: list[PruningStep] = field(default_factory=list)
    layers: list[LayerSparsity] = field(default_factory=list)
    operations: list[OperationTime] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pruning: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None

    def add_pruning(self, search: Mapping[str, Any], *, tolerance: float | None = None) -> None:
        """Takes a pruning search, the plain data of `SearchState.to_dict()`, and its tolerance in points.

        Raises ValueError for another version of it, for bad data, and where the record already has steps or a search.
        """
        if self.steps or self.pruning is not None:
            raise ValueError(f"the record of {self.name!r} already has pruning steps; one search goes into a record")
        data = dict(search) | ({} if tolerance is None else {"tolerance": float(tolerance)})
        read_search(data)
        self.pruning = data

    def add_quantization(self, diagnosis: Mapping[str, Any]) -> None:
        """Takes the diagnosis of a quantized network, the plain data of `quant.Diagnosis.to_dict()`.

        Raises ValueError for another version of it, for bad data, and where the record already has one.
        """
        if self.quantization is not None:
            raise ValueError(f"the record of {self.name!r} already has a quantized network; one goes into a record")
        read_diagnosis(diagnosis)
        self.quantization = dict(diagnosis)

    def all_steps(self) -> list[PruningStep]:
        """The pruning steps: those of the search where there is one, or else `steps`."""
        if self.pruning is None:
            return list(self.steps)
        return [PruningStep.of(step) for step in read_search(self.pruning).steps]

    def add_stage(
        self,
        name: str,
        *,
        parameters: int | None = None,
        macs: int | None = None,
        size: Size | None = None,
        accuracy: Accuracy | None = None,
        latency_ms: Latencies | None = None,
    ) -> Stage:
        """Appends a stage and returns it. Raises ValueError when the run already has one of that name."""
        if any(stage.name == name for stage in self.stages):
            raise ValueError(
                f"stage {name!r} is already in the record of {self.name!r}; give the second one another name"
            )
        stage = Stage(
            name=name,
            parameters=parameters,
            macs=macs,
            size=size,
            accuracy=accuracy,
            latency_ms=dict(latency_ms or {}),
        )
        self.stages.append(stage)
        return stage

    def add_comparison(self, name: str, paired: PairedComparison) -> None:
        """Appends a paired comparison, e.g. "engine against float"."""
        self.comparisons.append(Comparison(name=name, paired=paired))

    def add_check(self, name: str, passed: bool, detail: str = "") -> None:
        """Appends a check and its outcome."""
        self.checks.append(Check(name=name, passed=bool(passed), detail=detail))

    def to_dict(self) -> dict[str, Any]:
        """The record in JSON types, with its version."""
        lists = {name: [item.to_dict() for item in getattr(self, name)] for name in _LISTS}
        return {
            "record_version": RECORD_VERSION,
            "name": self.name,
            "environment": dict(self.environment),
            "data": self.data,
            **lists,
            "notes": list(self.notes),
            **({} if self.pruning is None else {"pruning": dict(self.pruning)}),
            **({} if self.quantization is None else {"quantization": dict(self.quantization)}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """The inverse of `to_dict`; RecordError for another version, an unknown, missing or ill-typed entry."""
        if not isinstance(data, Mapping) or data.get("record_version") != RECORD_VERSION:
            found = data.get("record_version") if isinstance(data, Mapping) else type(data).__name__
            raise RecordError(
                f"a record of version {RECORD_VERSION} is expected, not {found!r}; render it with its own version"
            )
        unknown = set(data) - {entry.name for entry in fields(cls)} - {"record_version"}
        if unknown:
            raise RecordError(f"unknown entries {', '.join(sorted(map(repr, unknown)))} in the record")
        try:
            lists = {name: _read_all(kind, data[name]) for name, kind in _LISTS.items()}
            record = cls(
                name=data["name"],
                environment=data["environment"],
                data=data["data"],
                notes=list(data["notes"]),
                pruning=_checked(read_search, data.get("pruning")),
                quantization=_checked(read_diagnosis, data.get("quantization")),
                **lists,
            )
            require_type(record, cls, "the record")
            return record
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(f"the record is incomplete or ill-typed: {error!r}") from error

    def save(self, path: str | Path) -> Path:
        """Writes the record as JSON; an interrupted write leaves an old file as it was."""
        return write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Reads a record, or `report.json` of a run directory. Raises FileNotFoundError or RecordError, naming the
        file."""
        file = Path(path)
        file = file / RECORD_FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no record of a run there; `swincompress demo` and `write_report` make one"
            )
        if file.stat().st_size > _BYTES_MAX:
            raise RecordError(f"{file}: {file.stat().st_size} bytes; a record of at most {_BYTES_MAX} is read")
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{file}: {error}") from error


_LISTS: dict[str, Any] = {
    "stages": Stage,
    "steps": PruningStep,
    "layers": LayerSparsity,
    "operations": OperationTime,
    "comparisons": Comparison,
    "checks": Check,
}


def _no_number(text: str) -> float:
    raise RecordError(f"{text} is no JSON number")


def _checked(read: Callable[[Mapping[str, Any]], object], data: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if data is not None:
        read(data)
    return data


def _read_all(kind: Any, entries: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [kind.from_dict(entry) for entry in entries]
