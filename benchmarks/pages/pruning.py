"""docs/results/pruning.md: adaptive iterative pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ..pruning import report
from .engine import pruned_times
from .sources import Sources
from .text import command, document, picture, table
from .theme import Drawing, Theme, canvas

_SWIN, _DEIT = "swin_cifar10", "deit_tiny"
_GRANULARITIES = {"structured": "structured, physically", "weight": "single weights"}
_UNITS = {"structured": "of the MACs", "weight": "of the prunable weights"}
_REMOVED = {"structured": "macs_removed", "weight": "weights_removed"}
_IN_PLOT = {"structured": "channels and heads", "weight": "single weights"}
_COMMAND = "python -m benchmarks.pruning run --out runs/pruning --data DATA \\\n  --jobs 8 --device cuda --budget-s 560"


def page(sources: Sources) -> str:
    """The whole page."""
    data, jobs = sources.pruning
    return document(
        [
            "# Pruning",
            picture("pruning", "Points of top-1 lost against what was removed, small Swin on CIFAR-10"),
            "## Inside `fit`, with `AdaptiveIterativePruning`",
            *_inside_fit(data, jobs),
            "## What falls short",
            *_short(data),
            "## The engine on pruned networks",
            f"{pruned_times(sources)} The tables of latency below have torch's times and other variants.",
            *report.sections(data, jobs),
        ]
    )


def _inside_fit(data: Mapping[str, Any], jobs: Mapping[str, Any]) -> list[str]:
    found = _targets(data)
    rows = [
        [
            _GRANULARITIES[row["granularity"]],
            f"{row['tolerance']:g}",
            f"{100 * row[_REMOVED[row['granularity']]].mean:.0f} % {_UNITS[row['granularity']]}",
            row["lost"].points.show(1),
            str(len(row["seeds"])),
        ]
        for row in found
    ]
    job = next(entry for entry in jobs.values() if entry["job"]["model"] == _SWIN and entry["job"]["recovery"])
    unpruned = found[0]["float_accuracy"].mean
    return [
        f"The small Swin on CIFAR-10 (JPEG copy), {job['recipe']['epochs']} epochs on an {job['place']['device']} "
        f"({_commit(data, job['place']['device'])}), {job['after']['test']['images']:,} test images. Besides its "
        "tolerance, a target ends each search: it stands in the full table. Points lost count against the same "
        f"network, fine-tuned unpruned by the same recipe ({unpruned:.1f} %).",
        table(["granularity", "tolerance, points", "removed", "points lost (range over seeds)", "seeds"], rows),
        command(_COMMAND, "a GPU and a download"),
    ]


def headline(sources: Sources) -> list[str]:
    """Subject, headline and condition for the overview."""
    data, jobs = sources.pruning
    middle = {row["granularity"]: row for row in _targets(data) if row["tolerance"] == 2}
    parts = [
        f"{100 * row[_REMOVED[name]].mean:.0f} % {_UNITS[name]} ({row['lost'].points.mean:.1f} points lost)"
        for name, row in middle.items()
    ]
    job = next(entry for entry in jobs.values() if entry["job"]["model"] == _SWIN and entry["job"]["recovery"])
    return [
        "[Pruning](pruning.md)",
        f"Pruning inside `fit` removes {' or '.join(parts)}.",
        f"Small Swin, CIFAR-10 (JPEG copy), {job['recipe']['epochs']} epochs on an {job['place']['device']}, a "
        f"tolerance of 2 points and a target, {job['after']['test']['images']:,} test images, three seeds",
    ]


def _targets(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the small Swin whose search a target ended, the widest tolerance first."""
    rows = [row for row in data["table1"][_SWIN] if row["way"] == "target"]
    if {row["granularity"] for row in rows} != set(_REMOVED):
        raise ValueError(f"pruning.json has no rows of {_SWIN} with targets for {', '.join(_REMOVED)}; run those jobs")
    return sorted(rows, key=lambda row: (row["granularity"], -row["tolerance"]))


def _commit(data: Mapping[str, Any], device: str) -> str:
    line: str = next(line for line in data["environments"] if device in line)
    return next(part for part in line.split(", ") if part.startswith("commit"))


def _short(data: Mapping[str, Any]) -> list[str]:
    """What a reader should know before relying on it."""
    return [text for text in (_little_data(data), _behind(data), _removes_nothing(data)) if text]


def _little_data(data: Mapping[str, Any]) -> str:
    row = next(
        row
        for row in data["table1"][_DEIT]
        if (row["granularity"], row["way"], row["tolerance"]) == ("structured", "tolerance", 1.0)
    )
    return (
        "With little data, pruning costs more. DeiT-Tiny is fine-tuned on 600 images, and 400 others decide. A search "
        f"with a tolerance of {row['tolerance']:g} point removes {100 * row['weights_removed'].mean:.0f} % of its "
        f"weights and loses {row['lost'].points.show(1)} points on {row['lost'].to_dict()['images']} images of `val`."
    )


def _behind(data: Mapping[str, Any]) -> str:
    """Methods that were better than ours at the same sparsity."""
    parts = []
    for row in data["comparison"]:
        if "behind_ours" not in row or row["method"] == "ours" or row["behind_ours"].points.mean >= -0.5:
            continue
        ours = next(r for r in data["comparison"] if r["reference"] == row["reference"] and r["method"] == "ours")
        removed = ours[_REMOVED[row["granularity"]]].mean
        parts.append(
            f"- {report.METHODS[row['method']]}: {row['accuracy'].mean:.2f} %, ours {ours['accuracy'].mean:.2f} %, at "
            f"{100 * removed:.0f} % {_UNITS[row['granularity']]} ({len(row['seeds'])} seed, ours {len(ours['seeds'])})"
        )
    if not parts:
        return ""
    text = (
        "At the same sparsity and with the same fine-tuning, these methods are more than half a point better than ours:"
    )
    return f"{text}\n\n" + "\n".join(parts)


def _removes_nothing(data: Mapping[str, Any]) -> str:
    zero = all(row["macs_removed"].mean == 0 for row in data["table1"][_SWIN] if row["granularity"] == "weight")
    return (
        "Single weights become zeros. They remove no MAC; what they save is size after entropy coding "
        "([Quantization](quantization.md))."
        if zero
        else ""
    )


def _draw(sources: Sources, theme: Theme) -> Figure:
    """A line per granularity: mean over seeds, bars for the range."""
    data, _ = sources.pruning
    figure = canvas(
        5.0, 4.0, theme=theme, title="Points lost against what is removed",
        subtitle=(
            "Small Swin on CIFAR-10, pruned inside fit, 10,000 test images,\nagainst the same network fine-tuned "
            "unpruned. Bars: range over seeds."
        ),
    )  # fmt: skip
    axes = figure.subplots()
    for granularity, color in (("structured", theme.ours), ("weight", theme.second)):
        rows = [row for row in _targets(data) if row["granularity"] == granularity]
        removed = [100 * row[_REMOVED[granularity]].mean for row in rows]
        lost = [row["lost"].points for row in rows]
        below, above = [each.mean - min(each.values) for each in lost], [max(each.values) - each.mean for each in lost]
        axes.errorbar(
            removed, [each.mean for each in lost], yerr=[below, above], fmt="o-", color=color, linewidth=1.6,
            markersize=6, label=f"{_IN_PLOT[granularity]}, % {_UNITS[granularity]}",
        )  # fmt: skip
        for x, each, row in zip(removed, lost, rows, strict=True):
            axes.annotate(f"tolerance {row['tolerance']:g}", (x, each.mean), (7, -4), textcoords="offset points",
                          fontsize=9, va="top", color=theme.muted)  # fmt: skip
    axes.set_xlim(20, 70)
    axes.set_ylim(0, 3)
    axes.set_xlabel("removed, %")
    axes.set_ylabel("points lost", color=theme.muted)
    axes.grid()
    axes.legend(loc="upper left", fontsize=9.5)
    return figure


DRAWINGS: dict[str, Drawing] = {"pruning": _draw}
