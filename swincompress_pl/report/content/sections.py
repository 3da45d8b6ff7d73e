"""The sections of a report, in reading order."""

from __future__ import annotations

from swincompress_pl.report.content import run, search
from swincompress_pl.report.content.parts import Section
from swincompress_pl.report.content.quantization import quantization_sections
from swincompress_pl.report.content.training import training
from swincompress_pl.report.record import RunRecord


def sections(record: RunRecord, *, steps_shown: int | None = None) -> list[Section]:
    """The sections for which the record has data, in reading order.

    `steps_shown` limits the pruning steps to the last ones; None shows all.
    """
    found = [
        run.stages(record),
        run.comparisons(record),
        run.checks(record),
        training(record),
        search.search(record),
        search.audits(record),
        search.targets(record),
        search.steps(record, steps_shown),
        run.layers(record),
        *([] if record.quantization is None else quantization_sections(record.quantization)),
        run.operations(record),
        run.environment(record),
    ]
    return [section for section in found if section is not None]
