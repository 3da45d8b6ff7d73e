"""What is known about one compression run, as values of JSON types."""

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
from swincompress_pl.report.training import TrainingEpoch

RECORD_VERSION = 1
RECORD_FILE = "report.json"
_BYTES_MAX = 2**26
Latencies = Mapping[str, Latency]


class RecordError(ValueError):
    """A run's record cannot be read. The message names the file, what is wrong and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model at one point of the run. None stands for "not measured".

    Attributes:
        name: Name of the point, such as "float", "pruned", "fine-tuned", "quantized" or "engine".
        parameters: Number of parameters.
        macs: Multiply-accumulates per image.
        size: Bytes, counted in three ways.
        accuracy: Top-1 accuracy.
        latency_ms: Times by runtime, such as "torch" or "engine".
    """

    name: str
    parameters: int | None = None
    macs: int | None = None
    size: Size | None = None
    accuracy: Accuracy | None = None
    latency_ms: Latencies = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types."""
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
        """Rebuilds what `to_dict` gave.

        Args:
            data: The plain data.

        Returns:
            The stage.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If a value is outside its range.
        """
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
    """One step that a pruning search tried on one group, and whether it was kept. None stands for "unknown".

    Attributes:
        group: Name of the group.
        units_before: Units of the group before the step.
        units_after: Units that the step tried, also if it was undone.
        accepted: Whether the step was kept.
        kind: Kind of the group, such as "heads".
        round: Number of the round, from 1.
        accuracy_percent: The score that decided, on the hold-out, in percent.
        parameters: Parameters of the network after the decision.
        macs: Multiply-accumulates per image of the network after the decision.
        images: Images of the hold-out that the score was measured on.
        exact: Whether the score is of the whole hold-out; otherwise it is an estimate.
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
        """Converts a step of a search's history.

        Args:
            step: The step, from `SearchState.steps`.

        Returns:
            The step as values of a record.
        """
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
    """Something that the run verified, such as that engine and reference gave the same integers.

    Attributes:
        name: What was verified.
        passed: Whether it held.
        detail: What a reader should know about it, such as the number of images.
    """

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired comparison under a name.

    Attributes:
        name: What is compared, such as "engine against float".
        paired: The comparison.
    """

    name: str
    paired: PairedComparison

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types."""
        return {"name": self.name, "paired": self.paired.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Rebuilds what `to_dict` gave.

        Args:
            data: The plain data.

        Returns:
            The comparison.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If the counts contradict each other.
        """
        return cls(name=data["name"], paired=PairedComparison.from_dict(data["paired"]))


@dataclass(kw_only=True)
class RunRecord:
    """Collects what is known about a compression run; `write_report` renders it.

    Attributes:
        name: Title of the run.
        environment: What `describe_environment` gave.
        data: What the accuracies were measured on, in words.
        stages: The model at points of the run, the first one before compression.
        steps: Pruning steps, for a search of your own; `add_pruning` brings the steps of a search itself.
        layers: Sparsity of each weight, as `layer_sparsity` gives it.
        operations: Time of each operation of the engine.
        comparisons: Paired comparisons of two models.
        checks: What the run verified.
        notes: Sentences that a reader of the figures must know.
        training: The epochs of the fit.
        pruning: The search that `add_pruning` was given, as plain data.
        quantization: The diagnosis that `add_quantization` was given, as plain data.
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
    training: list[TrainingEpoch] = field(default_factory=list)
    pruning: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None

    def add_pruning(self, search: Mapping[str, Any], *, tolerance: float | None = None) -> None:
        """Adds a pruning search.

        Args:
            search: Plain data of a search, such as `callback.search_state.to_dict()`.
            tolerance: Largest loss of score that the search allowed, in points; None if it is unknown.

        Raises:
            ValueError: If the data are of another version or incomplete, or the record already has steps or a search.
        """
        if self.steps or self.pruning is not None:
            raise ValueError(f"the record of {self.name!r} already has pruning steps; one search goes into a record")
        data = dict(search) | ({} if tolerance is None else {"tolerance": float(tolerance)})
        read_search(data)
        for answers in ("audit_before", "first_answers"):  # only for a search that goes on
            data.pop(answers, None)
        self.pruning = data

    def add_quantization(self, diagnosis: Mapping[str, Any]) -> None:
        """Adds the diagnosis of a quantized network.

        Args:
            diagnosis: Plain data of a diagnosis, `quant.diagnose(...).to_dict()`.

        Raises:
            ValueError: If the data are of another version or incomplete, or the record already has a diagnosis.
        """
        if self.quantization is not None:
            raise ValueError(f"the record of {self.name!r} already has a quantized network; one goes into a record")
        read_diagnosis(diagnosis)
        self.quantization = dict(diagnosis)

    def all_steps(self) -> list[PruningStep]:
        """Returns the pruning steps: those of the search if there is one, or else `steps`."""
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
        """Appends a stage. None stands for "not measured".

        Args:
            name: Name of the stage, such as "float" or "engine".
            parameters: Number of parameters.
            macs: Multiply-accumulates per image.
            size: What `network_size` or `program_size` gave.
            accuracy: Top-1 accuracy.
            latency_ms: Times by runtime, such as "torch" or "engine".

        Returns:
            The stage.

        Raises:
            ValueError: If the record already has a stage of that name.
        """
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
        """Appends a paired comparison.

        Args:
            name: What is compared, such as "engine against float".
            paired: The comparison.
        """
        self.comparisons.append(Comparison(name=name, paired=paired))

    def add_check(self, name: str, passed: bool, detail: str = "") -> None:
        """Appends a check and its outcome.

        Args:
            name: What was verified.
            passed: Whether it held.
            detail: What a reader should know about it, such as the number of images.
        """
        self.checks.append(Check(name=name, passed=bool(passed), detail=detail))

    def to_dict(self) -> dict[str, Any]:
        """Returns the record in JSON types, with its version."""
        lists = {name: [item.to_dict() for item in getattr(self, name)] for name in _LISTS}
        return {
            "record_version": RECORD_VERSION,
            "name": self.name,
            "environment": dict(self.environment),
            "data": self.data,
            **lists,
            "notes": list(self.notes),
            **({"training": [epoch.to_dict() for epoch in self.training]} if self.training else {}),
            **({} if self.pruning is None else {"pruning": dict(self.pruning)}),
            **({} if self.quantization is None else {"quantization": dict(self.quantization)}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """Rebuilds what `to_dict` gave.

        Args:
            data: The plain data.

        Returns:
            The record.

        Raises:
            RecordError: If the data are of another version, or an entry is unknown, missing or ill-typed.
        """
        if not isinstance(data, Mapping) or data.get("record_version") != RECORD_VERSION:
            found = data.get("record_version") if isinstance(data, Mapping) else type(data).__name__
            raise RecordError(
                f"a record of version {RECORD_VERSION} is expected, not {found!r}; render it with its own version"
            )
        unknown = set(data) - {entry.name for entry in fields(cls)} - {"record_version"}
        if unknown:
            raise RecordError(
                f"unknown entries {', '.join(sorted(map(repr, unknown)))} in the record; render it with its own version"
            )
        try:
            lists = {name: _read_all(kind, data[name]) for name, kind in _LISTS.items()}
            record = cls(
                name=data["name"],
                environment=data["environment"],
                data=data["data"],
                notes=list(data["notes"]),
                training=_read_all(TrainingEpoch, data.get("training", ())),
                pruning=_checked(read_search, data.get("pruning")),
                quantization=_checked(read_diagnosis, data.get("quantization")),
                **lists,
            )
            require_type(record, cls, "the record")
            return record
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(f"the record is incomplete or ill-typed: {error!r}") from error

    def save(self, path: str | Path) -> Path:
        """Writes the record as JSON, whole or not at all.

        Args:
            path: The file; its folder is made if needed.

        Returns:
            The path of the file.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the record holds NaN or infinite numbers.
        """
        return write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Reads a record.

        Args:
            path: The JSON file, or a directory with a report.json.

        Returns:
            The record.

        Raises:
            FileNotFoundError: If the file is missing.
            RecordError: If the file is larger than 64 MiB, or not a record of this version.
        """
        file = Path(path)
        file = file / RECORD_FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no record of a run there; `swincompress fit`, `demo` and `write_report` make one"
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
    raise RecordError(f"{text} is not a JSON number")


def _checked(read: Callable[[Mapping[str, Any]], object], data: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if data is not None:
        read(data)
    return data


def _read_all(kind: Any, entries: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [kind.from_dict(entry) for entry in entries]
