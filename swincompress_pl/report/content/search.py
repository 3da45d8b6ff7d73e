"""What a report says about a pruning search, or about steps without one."""

from __future__ import annotations

from swincompress_pl.pruning.adaptive.state import SearchState
from swincompress_pl.pruning.evaluation.audit import audit_facts
from swincompress_pl.pruning.evaluation.scores import bound_facts, score_label
from swincompress_pl.report.content.numbers import change, count, duration, many
from swincompress_pl.report.content.parts import Item, Section, Table
from swincompress_pl.report.record import PruningStep, RunRecord
from swincompress_pl.report.search import (
    last_round,
    macs_left,
    parameters_left,
    read_search,
    sparsity_of,
    times_fewer_forwards,
    times_fewer_images,
)


def search(record: RunRecord) -> Section | None:
    """What the search gave and what it cost."""
    if record.pruning is None:
        return None
    state = read_search(record.pruning)
    kept = sum(step.accepted for step in state.steps)
    allowed = "" if state.tolerance is None else f", {state.tolerance:g} may be lost"
    score = "not scored yet" if state.score is None else f"{state.score:.2f}"
    tried = f"{many(last_round(state), 'round')}, {many(len(state.steps), 'step')}"
    lines = [
        (score_label(state.score_kind), f"{state.baseline_score:.2f} -> {score} points{allowed}"),
        *bound_facts(state.score_kind, state.score),
        *audit_facts(state.audits[-1] if state.audits else None),
        ("parameters", change(state.baseline_parameters, parameters_left(state))),
        *_weights(state),
        *([("MACs per image", change(state.baseline_macs, macs_left(state)))] if state.baseline_macs else []),
        ("search", f"{state.granularity}, {tried}, {kept} kept"),
        ("its end", state.stopped or "not reached: the search goes on"),
        *_scoring(state),
        ("time in the search", duration(state.elapsed_s)),
    ]
    items = tuple(Item(lead=lead, text=text) for lead, text in lines)
    plots = ("pruning_sparsity", "pruning_accuracy_size", "pruning_sensitivity")
    return Section(title="Pruning search", items=items, plots=plots)


def _weights(state: SearchState) -> list[tuple[str, str]]:
    """The part of the prunable weights that is removed; structured searches also remove biases, so have no such row."""
    if state.granularity == "structured" or not state.baseline_prunable:
        return []
    removed = state.baseline_parameters - parameters_left(state)
    share = 100 * removed / state.baseline_prunable
    return [("prunable weights", f"{count(removed)} of {count(state.baseline_prunable)}, {share:.1f} % removed")]


def _scoring(state: SearchState) -> list[tuple[str, str]]:
    cost = state.scoring
    if not cost.get("images_scored"):
        return []
    fewer, less = (
        "" if times is None else f", {times:.1f} times fewer"
        for times in (times_fewer_images(cost), times_fewer_forwards(cost))
    )
    estimates = sum(not step.exact for step in state.steps)
    return [
        (
            "images scored",
            f"{cost['images_scored']:,} for {cost['decisions']:,} decisions, naively {cost['naive_images']:,}{fewer}",
        ),
        ("whole forward passes that they amount to", f"{cost['image_forwards']:,.0f}{less}"),
        (
            "decided on a part of the hold-out",
            f"{estimates} of {len(state.steps)} steps; their scores are estimates",
        ),
    ]


def audits(record: RunRecord) -> Section | None:
    """What each round lost on the images that decided, and on those that did not."""
    if record.pruning is None:
        return None
    state = read_search(record.pruning)
    rows = [
        [
            str(audit.round),
            f"{audit.images:,}",
            f"{audit.lost_points:.2f}",
            f"{audit.deciding_lost_points:.2f}",
            f"{audit.optimism_points:+.2f}",
            f"{audit.bound_points:.2f} ({100 * audit.confidence:.3g} %)",
            f"{audit.only_before:,} / {audit.only_after:,}",
            str(audit.given_back),
        ]
        for audit in state.audits
    ]
    header = ["round", "images", "lost on the audit", "lost on the deciding part", "optimism", "at most lost"]
    text = (
        "Points lost against the unpruned network, after each round, on images that decided nothing (the audit) and on "
        "those that decided. Their difference is the optimism. All bounds hold together with 95 % confidence."
    )
    table = Table.of([*header, "only unpruned / only pruned right", "steps given back"], rows, long=True)
    return Section(title="Pruning audits", text=text, table=table) if rows else None


def targets(record: RunRecord) -> Section | None:
    """Each target before and after."""
    if record.pruning is None:
        return None
    state = read_search(record.pruning)
    rows = [
        [name, t.kind, f"{t.initial_units:,}", f"{t.units:,}", f"{100 * sparsity_of(t):.1f} %", t.locked or "-"]
        for name, t in state.targets.items()
    ]
    table = Table.of(
        ["target", "kind", "units before", "units after", "removed", "locked by"], rows, long=True, names=True
    )
    return Section(title="Pruning targets", table=table) if rows else None


def steps(record: RunRecord, shown: int | None) -> Section | None:
    """The last `shown` steps with their decisions; None shows all."""
    steps = record.all_steps()
    if not steps:
        return None
    last = list(enumerate(steps, 1))[-shown if shown else 0 :]
    rows = [[step.group, str(number), *_step_cells(step)] for number, step in last]
    header = ["target", "step", "round", "kind", "units", "hold-out top-1", "decision", "images", "parameters after"]
    kept = sum(step.accepted for step in steps)
    rest = f" These are the last {len(rows)}; report.json has all of them." if len(rows) < len(steps) else ""
    estimates = any(step.exact is False for step in steps)
    return Section(
        title="Pruning steps",
        text=f"{many(len(steps), 'step')}, {kept} of them kept.{rest}"
        + (" A score after ~ is an estimate on a part of the hold-out." if estimates else ""),
        table=Table.of([*header, "MACs after"], rows, long=True, names=True),
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
