"""What a report says, whatever its form: sections with sentences, items, a table and the names of plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from swincompress_pl.report.record import OperationTime, PruningStep, RunRecord, Stage
from swincompress_pl.report.search import PruningSearch

_OPERATIONS_SHOWN = 15


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain text; the first column reads from the left, the others are figures. long: a reader need not see it all."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    long: bool = False


@dataclass(frozen=True, kw_only=True)
class Item:
    """A line of a list, led by a word or name where it has one; mood: whether it is news that must be seen."""

    text: str
    lead: str = ""
    mood: Literal["", "good", "bad"] = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report; plots are names of `plots.PLOTS`, shown where they were drawn."""

    title: str
    text: str = ""
    table: Table | None = None
    items: tuple[Item, ...] = ()
    plots: tuple[str, ...] = ()


def sections(record: RunRecord, *, steps_shown: int | None = None) -> list[Section]:
    """The report's sections in reading order, only those for which the record has something.

    steps_shown: at most so many of the last pruning steps, None for all.
    """
    found = [
        _stages(record),
        _comparisons(record),
        _checks(record),
        _search(record),
        _targets(record),
        _steps(record, steps_shown),
        _layers(record),
        *_quantization(record),
        _operations(record.operations),
        _environment(record.environment),
    ]
    return [section for section in found if section is not None]


def megabytes(size_bytes: int | None) -> str:
    """Bytes as MB of 10**6 bytes, kB below one, "-" for None."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def count(value: int | None) -> str:
    """A count with the unit that keeps it short: 28.29 M, 4.491 G; "-" for None."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return str(value)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def runtimes(stages: Iterable[Stage]) -> list[str]:
    """The runtimes that any stage was timed on, in order of appearance."""
    return list(dict.fromkeys(runtime for stage in stages for runtime in stage.latency_ms))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, long: bool = False) -> Table:
    return Table(header=tuple(header), rows=tuple(tuple(row) for row in rows), long=long)


def _stages(record: RunRecord) -> Section | None:
    if not record.stages:
        notes = tuple(Item(text=note) for note in record.notes)
        return Section(title="Notes", items=notes) if notes else None
    first = record.stages[0]

    def row(title: str, show: Callable[[Stage], str], number: Callable[[Stage], float | None]) -> list[str]:
        return [title, *(show(stage) + _share(number(stage), number(first), stage is first) for stage in record.stages)]

    rows = [
        row("parameters", lambda s: count(s.parameters), lambda s: s.parameters),
        row("MACs an image", lambda s: count(s.macs), lambda s: s.macs),
        *_size_rows(row),
        ["top-1 [95 % interval]", *("-" if s.accuracy is None else str(s.accuracy) for s in record.stages)],
        *_latency_rows(record.stages),
    ]
    table = _table(["", *(stage.name for stage in record.stages)], [r for r in rows if set(r[1:]) != {"-"}])
    return Section(
        title="Before and after", table=table, items=_stage_notes(record), plots=("before_after", "accuracy_size")
    )


def _size_rows(row: Callable[..., list[str]]) -> list[list[str]]:
    ways = (
        ("bytes: non-zeros x bits", "nonzero_bytes"),
        ("bytes: with index", "indexed_bytes"),
        ("bytes: file", "file_bytes"),
    )
    return [
        row(
            title,
            lambda s, way=way: megabytes(None if s.size is None else getattr(s.size, way)),
            lambda s, way=way: None if s.size is None else getattr(s.size, way),
        )
        for title, way in ways
    ]


def _latency_rows(stages: Sequence[Stage]) -> list[list[str]]:
    rows = []
    for runtime in runtimes(stages):
        timed = [stage.latency_ms.get(runtime) for stage in stages]
        kinds = dict.fromkeys(f"batch {t.batch}, {_threads(t.threads)}" for t in timed if t is not None)
        rows.append([f"latency in {runtime} ({'; '.join(kinds)})", *("-" if t is None else str(t) for t in timed)])
    return rows


def _stage_notes(record: RunRecord) -> tuple[Item, ...]:
    lines = []
    if record.data:
        lines.append(f"Accuracy is measured on {record.data}.")
    if any(stage.size is not None for stage in record.stages):
        lines.append(
            "MB are 10^6 bytes. The claim is the file; the other two show what counting non-zeros alone would say."
        )
        indices = "; ".join(f"{stage.name}: {stage.size.index}" for stage in record.stages if stage.size is not None)
        lines.append(f"How the non-zeros are found again, in tensors: {indices}.")
    if any(stage.latency_ms for stage in record.stages):
        lines.append("Latencies are medians with their quartiles, measured in turns.")
    if any(stage.accuracy is not None for stage in record.stages):
        lines.append("Intervals of accuracies are 95 % Wilson intervals.")
    return tuple(Item(text=line) for line in [*lines, *record.notes])


def _comparisons(record: RunRecord) -> Section | None:
    items = tuple(Item(lead=comparison.name, text=str(comparison.paired)) for comparison in record.comparisons)
    return Section(title="Paired predictions", items=items) if items else None


def _checks(record: RunRecord) -> Section | None:
    items = tuple(
        Item(
            lead="passed" if check.passed else "FAILED",
            text=check.name + (f" ({check.detail})" if check.detail else ""),
            mood="good" if check.passed else "bad",
        )
        for check in record.checks
    )
    return Section(title="Checks", items=items) if items else None


def _search(record: RunRecord) -> Section | None:
    if record.pruning is None:
        return None
    search = PruningSearch.of(record.pruning)
    kept = sum(step.accepted for step in search.steps)
    allowed = "" if search.tolerance is None else f", {search.tolerance:g} may be lost"
    score = "not scored yet" if search.score is None else f"{search.score:.2f}"
    tried = f"{_many(search.last_round, 'round')}, {_many(len(search.steps), 'step')}"
    lines = [
        ("score on the hold-out", f"{search.baseline_score:.2f} -> {score} points{allowed}"),
        ("parameters", _change(search.baseline_parameters, search.parameters)),
        *_weights(search),
        *([("MACs an image", _change(search.baseline_macs, search.macs))] if search.baseline_macs else []),
        (
            "search",
            f"{search.granularity}, {tried}, {kept} kept",
        ),
        ("its end", search.stopped or "not reached: the search goes on"),
        *_scoring(search),
        *([] if search.elapsed_s is None else [("time in the search", duration(search.elapsed_s))]),
    ]
    items = tuple(Item(lead=lead, text=text) for lead, text in lines)
    plots = ("pruning_sparsity", "pruning_accuracy_size", "pruning_sensitivity")
    return Section(title="Pruning search", items=items, plots=plots)


def _weights(search: PruningSearch) -> list[tuple[str, str]]:
    """Single weights are counted among those that could go; units take biases and norms along, so theirs are not."""
    if search.granularity == "structured" or not search.baseline_prunable:
        return []
    removed = search.baseline_parameters - search.parameters
    share = 100 * removed / search.baseline_prunable
    return [("prunable weights", f"{count(removed)} of {count(search.baseline_prunable)}, {share:.1f} % removed")]


def _scoring(search: PruningSearch) -> list[tuple[str, str]]:
    cost = search.scoring
    if cost is None or not cost.images_scored:
        return []
    fewer = "" if cost.times_fewer_images is None else f", {cost.times_fewer_images:.1f} times fewer"
    less = "" if cost.times_fewer_forwards is None else f", {cost.times_fewer_forwards:.1f} times fewer"
    estimates = sum(not step.exact for step in search.steps)
    return [
        (
            "images scored",
            f"{cost.images_scored:,} for {cost.decisions:,} decisions, naively {cost.naive_images:,}{fewer}",
        ),
        ("whole forward passes that they amount to", f"{cost.image_forwards:,.0f}{less}"),
        (
            "decided on a part of the hold-out",
            f"{estimates} of {len(search.steps)} steps; their scores are estimates",
        ),
    ]


def _targets(record: RunRecord) -> Section | None:
    if record.pruning is None:
        return None
    search = PruningSearch.of(record.pruning)
    rows = [
        [t.name, t.kind, f"{t.initial_units:,}", f"{t.units:,}", f"{100 * t.sparsity:.1f} %", t.locked or "-"]
        for t in search.targets
    ]
    table = _table(["target", "kind", "units before", "units after", "removed", "locked by"], rows, long=True)
    return Section(title="Pruning targets", table=table) if rows else None


def _steps(record: RunRecord, shown: int | None) -> Section | None:
    steps = record.all_steps()
    if not steps:
        return None
    last = list(enumerate(steps, 1))[-shown if shown else 0 :]
    rows = [[step.group, str(number), *_step_cells(step)] for number, step in last]
    header = ["target", "step", "round", "kind", "units", "hold-out top-1", "decision", "images", "parameters after"]
    kept = sum(step.accepted for step in steps)
    rest = f" The last {len(rows)} stand here, all of them in report.json." if len(rows) < len(steps) else ""
    estimates = any(step.exact is False for step in steps)
    return Section(
        title="Pruning steps",
        text=f"{_many(len(steps), 'step')}, {kept} of them kept.{rest}"
        + (" A score after ~ is an estimate on a part of the hold-out." if estimates else ""),
        table=_table([*header, "MACs after"], rows, long=True),
    )


def _step_cells(step: PruningStep) -> list[str]:
    score = "-" if step.accuracy_percent is None else f"{step.accuracy_percent:.2f} %"
    return [
        "-" if step.round is None else str(step.round),
        step.kind or "-",
        f"{step.units_before:,} -> {step.units_after:,}",
        ("~ " if step.exact is False else "") + score,
        "kept" if step.accepted else "undone",
        "-" if step.images is None else f"{step.images:,}",
        count(step.parameters),
        count(step.macs),
    ]


def _layers(record: RunRecord) -> Section | None:
    if not record.layers:
        return None
    rows = [
        [layer.name, f"{layer.weights_before:,}", f"{layer.nonzeros_after:,}", f"{100 * layer.sparsity:.1f} %"]
        for layer in record.layers
    ]
    table = _table(["weight", "values before", "non-zeros after", "gone"], rows, long=True)
    return Section(title="Sparsity a layer", table=table, plots=("sparsity",))


def _quantization(record: RunRecord) -> list[Section]:
    if record.quantization is None:
        return []
    from swincompress_pl.report.quantization import quantization_sections  # it is made of what stands here

    return quantization_sections(record.quantization)


def _operations(operations: Sequence[OperationTime]) -> Section | None:
    if not operations:
        return None
    total = sum(op.time_ms for op in operations)
    slowest = sorted(operations, key=lambda op: -op.time_ms)[:_OPERATIONS_SHOWN]
    rows = [
        [
            op.name,
            op.kind,
            f"{op.time_ms:.3f}",
            f"{100 * op.time_ms / total:.1f} %" if total else "-",
            count(op.macs) if op.macs else "-",
            f"{op.macs / op.time_ms / 1e6:.3g}" if op.macs and op.time_ms else "-",
        ]
        for op in slowest
    ]
    return Section(
        title="Latency a layer",
        text=f"{len(operations)} operations, {total:.3g} ms together; the slowest {len(slowest)}:",
        table=_table(["operation", "kind", "ms", "share", "MACs", "GMAC/s"], rows),
        plots=("latency",),
    )


def _environment(environment: Mapping[str, Any]) -> Section | None:
    items = tuple(
        Item(text=f"{key.replace('_', ' ')}: {_plain(value)}")
        for key, value in environment.items()
        if value not in (None, [], {})
    )
    return Section(title="Environment", items=items) if items else None


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _share(value: float | None, base: float | None, is_base: bool) -> str:
    return "" if is_base or value is None or not base else f" ({100 * value / base:.1f} %)"


def _change(before: int, after: int | None) -> str:
    if after is None:
        return f"{count(before)} before, unknown after"
    return f"{count(before)} -> {count(after)}, {100 * (1 - after / before):.1f} % removed"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _threads(threads: int | None) -> str:
    return "threads unknown" if threads is None else _many(threads, "thread")
