"""A record as Markdown: tables of plain figures, each with what a reader needs to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from swincompress_pl.report.record import OperationTime, RunRecord, Stage

_OPERATIONS_SHOWN = 15
_STEPS_SHOWN = 30


def render_markdown(record: RunRecord, images: Sequence[tuple[str, str]] = ()) -> str:
    """The whole report; images: (title, file name beside the report) of the plots."""
    parts = [
        f"# {record.name}",
        *_stages(record),
        *_comparisons(record),
        *_checks(record),
        *(f"![{title}]({file})" for title, file in images),
        *_layers(record),
        *_steps(record),
        *_operations(record.operations),
        *_environment(record.environment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned right."""
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [list(header), *body])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in body)])


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


def runtimes(stages: Iterable[Stage]) -> list[str]:
    """The runtimes that any stage was timed on, in order of appearance."""
    return list(dict.fromkeys(runtime for stage in stages for runtime in stage.latency_ms))


def _stages(record: RunRecord) -> list[str]:
    if not record.stages:
        return []
    first = record.stages[0]

    def row(title: str, show: Callable[[Stage], str], number: Callable[[Stage], float | None]) -> list[str]:
        return [title, *(show(stage) + _share(number(stage), number(first), stage is first) for stage in record.stages)]

    rows = [
        row("parameters", lambda s: count(s.parameters), lambda s: s.parameters),
        row("MACs an image", lambda s: count(s.macs), lambda s: s.macs),
        *_size_rows(row),
        [
            "top-1 [95 % interval]",
            *("-" if s.accuracy is None else _accuracy(s) for s in record.stages),
        ],
        *_latency_rows(record.stages),
    ]
    text = table(["", *(stage.name for stage in record.stages)], [r for r in rows if set(r[1:]) != {"-"}])
    return ["## Before and after", text, *_stage_notes(record)]


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


def _stage_notes(record: RunRecord) -> list[str]:
    lines = []
    if record.data:
        lines.append(f"- Accuracy is measured on {record.data}.")
    if any(stage.size is not None for stage in record.stages):
        lines.append(
            "- MB are 10^6 bytes. The claim is the file; the other two show what counting non-zeros alone would say."
        )
        indices = "; ".join(f"{stage.name}: {stage.size.index}" for stage in record.stages if stage.size is not None)
        lines.append(f"- How the non-zeros are found again, in tensors: {indices}.")
    if any(stage.latency_ms for stage in record.stages):
        lines.append("- Latencies are medians with their quartiles, measured in turns.")
    if any(stage.accuracy is not None for stage in record.stages):
        lines.append("- Intervals of accuracies are 95 % Wilson intervals.")
    return ["\n".join(lines + [f"- {note}" for note in record.notes])]


def _comparisons(record: RunRecord) -> list[str]:
    if not record.comparisons:
        return []
    lines = [f"- **{comparison.name}**: {comparison.paired}" for comparison in record.comparisons]
    return ["## Paired predictions", "\n".join(lines)]


def _checks(record: RunRecord) -> list[str]:
    if not record.checks:
        return []
    lines = [
        f"- {'passed' if check.passed else '**FAILED**'}: {check.name}" + (f" ({check.detail})" if check.detail else "")
        for check in record.checks
    ]
    return ["## Checks", "\n".join(lines)]


def _layers(record: RunRecord) -> list[str]:
    if not record.layers:
        return []
    rows = [
        [layer.name, f"{layer.weights_before:,}", f"{layer.nonzeros_after:,}", f"{100 * layer.sparsity:.1f} %"]
        for layer in record.layers
    ]
    return ["## Sparsity a layer", table(["weight", "values before", "non-zeros after", "gone"], rows)]


def _steps(record: RunRecord) -> list[str]:
    if not record.steps:
        return []
    accepted = sum(step.accepted for step in record.steps)
    rows = [
        [
            step.group,
            "-" if step.round is None else str(step.round),
            f"{step.units_before} -> {step.units_after}",
            "-" if step.accuracy_percent is None else f"{step.accuracy_percent:.2f} %",
            "kept" if step.accepted else "undone",
            count(step.macs),
        ]
        for step in record.steps[-_STEPS_SHOWN:]
    ]
    shown = f"The last {len(rows)} stand here, all of them in report.json." if len(rows) < len(record.steps) else ""
    return [
        "## Pruning steps",
        f"{len(record.steps)} steps, {accepted} of them kept. {shown}".strip(),
        table(["group", "round", "units", "hold-out top-1", "decision", "MACs after"], rows),
    ]


def _operations(operations: Sequence[OperationTime]) -> list[str]:
    if not operations:
        return []
    total = sum(op.time_ms for op in operations)
    slowest = sorted(operations, key=lambda op: -op.time_ms)[:_OPERATIONS_SHOWN]
    return [
        "## Latency a layer",
        f"{len(operations)} operations, {total:.3g} ms together; the slowest {len(slowest)}:",
        table(
            ["operation", "kind", "ms", "share", "MACs", "GMAC/s"],
            [
                [
                    op.name,
                    op.kind,
                    f"{op.time_ms:.3f}",
                    f"{100 * op.time_ms / total:.1f} %" if total else "-",
                    count(op.macs) if op.macs else "-",
                    f"{op.macs / op.time_ms / 1e6:.3g}" if op.macs and op.time_ms else "-",
                ]
                for op in slowest
            ],
        ),
    ]


def _environment(environment: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {key.replace('_', ' ')}: {_plain(value)}"
        for key, value in environment.items()
        if value not in (None, [], {})
    ]
    return ["## Environment", "\n".join(lines)] if lines else []


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _share(value: float | None, base: float | None, is_base: bool) -> str:
    return "" if is_base or value is None or not base else f" ({100 * value / base:.1f} %)"


def _accuracy(stage: Stage) -> str:
    assert stage.accuracy is not None
    low, high = stage.accuracy.interval_percent
    return f"{stage.accuracy.percent:.2f} % [{low:.2f}, {high:.2f}], n = {stage.accuracy.images}"


def _threads(threads: int | None) -> str:
    return "threads unknown" if threads is None else f"{threads} thread{'' if threads == 1 else 's'}"
