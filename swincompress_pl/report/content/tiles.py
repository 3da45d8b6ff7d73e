"""The figures of a report that a reader looks for first."""

from __future__ import annotations

from collections.abc import Sequence

from swincompress_pl.pruning.adaptive.state import SearchState
from swincompress_pl.pruning.evaluation.scores import score_label
from swincompress_pl.quant.diagnosis.diagnosis import Diagnosis
from swincompress_pl.report.content.names import readable
from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.content.parts import Tile
from swincompress_pl.report.diagnosis import all_packed_bytes, float_bytes, label, read_diagnosis, result_of
from swincompress_pl.report.record import RunRecord, Stage
from swincompress_pl.report.search import macs_left, parameters_left, read_search, times_fewer_images


def tiles(record: RunRecord) -> list[Tile]:
    """The tiles of the stages, or else of the search, and then those of the quantization."""
    found = _stage_tiles(record.stages) if record.stages else []
    if not record.stages and record.pruning is not None:
        found = _search_tiles(read_search(record.pruning))
    if record.quantization is not None:
        found += _quantization_tiles(read_diagnosis(record.quantization))
    return found


def _stage_tiles(stages: Sequence[Stage]) -> list[Tile]:
    """What both the first and the last stage have, compared."""
    first, last = stages[0], stages[-1]
    found = []
    if last.accuracy is not None:
        low, high = last.accuracy.interval_percent
        detail = f"95 % interval {low:.2f} to {high:.2f}"
        if last is not first and first.accuracy is not None:
            detail = f"{first.name} {first.accuracy.percent:.2f} %; {detail}"
        found.append(Tile(f"top-1, {last.name}", f"{last.accuracy.percent:.2f} %", detail))
    sizes = [None if stage.size is None else stage.size.file_bytes for stage in (first, last)]
    for what, (before, after), show in (
        ("file", sizes, megabytes),
        ("parameters", [first.parameters, last.parameters], count),
        ("MACs per image", [first.macs, last.macs], count),
    ):
        if last is not first and before and after is not None:
            share = f"{100 * after / before:.1f} % of {first.name}'s {show(before)}"
            found.append(Tile(f"{what}, {last.name}", show(after), share))
    return found + _latency_tile(first, last)


def _latency_tile(first: Stage, last: Stage) -> list[Tile]:
    if last is first or not first.latency_ms or not last.latency_ms:
        return []
    fastest = [min(stage.latency_ms.items(), key=lambda entry: entry[1].median_ms) for stage in (first, last)]
    (old, before), (new, after) = fastest
    detail = f"{first.name} in {old}: {before.median_ms:.3g} ms" if before.batch == after.batch else "other batch sizes"
    return [Tile(f"latency in {new}, batch {after.batch}", f"{after.median_ms:.3g} ms", detail)]


def _search_tiles(state: SearchState) -> list[Tile]:
    found = [_removed("parameters", state.baseline_parameters, parameters_left(state))]
    macs = macs_left(state)
    if state.baseline_macs and macs is not None:
        found.append(_removed("MACs", state.baseline_macs, macs))
    if state.score is not None:
        change = f"{state.score - state.baseline_score:+.2f} points, before {state.baseline_score:.2f}"
        found.append(Tile(score_label(state.score_kind), f"{state.score:.2f}", change))
    kept = sum(step.accepted for step in state.steps)
    found.append(Tile("rounds", str(state.rounds), f"{kept} of {len(state.steps)} steps kept"))
    fewer = times_fewer_images(state.scoring)
    if fewer is not None:
        detail = f"{state.scoring['images_scored']:,}; naive {state.scoring['naive_images']:,}"
        found.append(Tile("images scored", f"{fewer:.1f}x fewer", detail))
    return found


def _removed(what: str, before: int, after: int) -> Tile:
    return Tile(f"{what} removed", f"{100 * (1 - after / before):.1f} %", f"{count(before)} -> {count(after)}")


def _quantization_tiles(known: Diagnosis) -> list[Tile]:
    agreement = f"{result_of(known).agreement_percent:.2f} %"
    packed, whole = all_packed_bytes(known), float_bytes(known)
    found = [
        Tile(f"same predictions as float, {known.bits}", agreement, f"of {known.images:,} images"),
        Tile("packed weights", megabytes(packed), f"{100 * packed / whole:.1f} % of float32's {megabytes(whole)}"),
    ]
    if known.costs:
        found.append(Tile("costliest alone", f"KL {known.costs[0].alone.kl:.2g}", readable(label(known.costs[0]))))
    return found
