"""What a report says about the run: its stages, comparisons, checks, layers, operations and environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swincompress_pl.accel.profile import ABOVE_THE_PEAK
from swincompress_pl.report.content.numbers import count, many, megabytes
from swincompress_pl.report.content.parts import Item, Section, Table
from swincompress_pl.report.record import RunRecord, Stage, runtimes

_OPERATIONS_SHOWN = 15


def stages(record: RunRecord) -> Section | None:
    """The stages and the notes, or only the notes if nothing was measured."""
    if not record.stages:
        notes = tuple(Item(text=note) for note in record.notes)
        return Section(title="Notes", items=notes) if notes else None
    first = record.stages[0]

    def row(title: str, show: Callable[[Stage], str], number: Callable[[Stage], float | None]) -> list[str]:
        return [title, *(show(stage) + _share(number(stage), number(first), stage is first) for stage in record.stages)]

    rows = [
        row("parameters", lambda s: count(s.parameters), lambda s: s.parameters),
        row("MACs per image", lambda s: count(s.macs), lambda s: s.macs),
        *_size_rows(row),
        ["top-1 [95 % interval]", *("-" if s.accuracy is None else str(s.accuracy) for s in record.stages)],
        *_latency_rows(record.stages),
    ]
    measured = [row for row in rows if set(row[1:]) != {"-"}]
    table = Table.of(["", *(stage.name for stage in record.stages)], measured)
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
            "1 MB is 10^6 bytes. The file is what counts; the other two rows show what counting non-zeros would say."
        )
        indices = "; ".join(f"{stage.name}: {stage.size.index}" for stage in record.stages if stage.size is not None)
        lines.append(f"Index of the non-zeros, in numbers of tensors: {indices}.")
    if any(stage.latency_ms for stage in record.stages):
        lines.append("Latencies are medians with their quartiles, measured in turns.")
    if any(stage.accuracy is not None for stage in record.stages):
        lines.append("Intervals of accuracies are 95 % Wilson intervals.")
    return tuple(Item(text=line) for line in [*lines, *record.notes])


def comparisons(record: RunRecord) -> Section | None:
    """The paired comparisons."""
    items = tuple(Item(lead=comparison.name, text=str(comparison.paired)) for comparison in record.comparisons)
    return Section(title="Paired predictions", items=items) if items else None


def checks(record: RunRecord) -> Section | None:
    """What was verified."""
    items = tuple(
        Item(
            lead="passed" if check.passed else "FAILED",
            text=check.name + (f" ({check.detail})" if check.detail else ""),
            mood="good" if check.passed else "bad",
        )
        for check in record.checks
    )
    return Section(title="Checks", items=items) if items else None


def layers(record: RunRecord) -> Section | None:
    """The part of each weight that is removed."""
    if not record.layers:
        return None
    rows = [
        [layer.name, f"{layer.weights_before:,}", f"{layer.nonzeros_after:,}", f"{100 * layer.sparsity:.1f} %"]
        for layer in record.layers
    ]
    table = Table.of(["weight", "values before", "non-zeros after", "gone"], rows, long=True, names=True)
    return Section(title="Sparsity per layer", table=table, plots=("sparsity",))


def operations(record: RunRecord) -> Section | None:
    """Where the time goes."""
    operations = record.operations
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
            "-" if op.peak_share is None else f"{100 * op.peak_share:.0f} %",
        ]
        for op in slowest
    ]
    above = any((op.peak_share or 0) > 1 for op in slowest)
    return Section(
        title="Latency per layer",
        text=f"{len(operations)} operations, {total:.3g} ms together; the slowest {len(slowest)}:",
        table=Table.of(["operation", "kind", "ms", "share", "MACs", "GMAC/s", "of the peak"], rows, names=True),
        items=(Item(text=ABOVE_THE_PEAK),) if above else (),
        plots=("latency",),
    )


def environment(record: RunRecord) -> Section | None:
    """What it was measured on."""
    items = tuple(
        Item(text=f"{key.replace('_', ' ')}: {_plain(value)}")
        for key, value in record.environment.items()
        if value not in (None, [], {})
    )
    return Section(title="Environment", items=items) if items else None


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _share(value: float | None, base: float | None, is_base: bool) -> str:
    return "" if is_base or value is None or not base else f" ({100 * value / base:.1f} %)"


def _threads(threads: int | None) -> str:
    return "threads unknown" if threads is None else many(threads, "thread")
