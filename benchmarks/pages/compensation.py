"""docs/results/compensation.md: pruning without training, with and without compensation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..pruning import tables
from .sources import Sources
from .text import command, document, picture, short_cpu, table
from .theme import Drawing, Theme, canvas

Row = Mapping[str, Any]
_MODELS = {"deit_tiny": "DeiT-Tiny", "swin_cifar10": "small Swin"}
_TIMED = _MODELS | {"swin_tiny": "Swin-T, random weights"}
_TESTS = {"deit_tiny": "600 images of ImageNet-mini's val", "swin_cifar10": "CIFAR-10 (JPEG copy), 10,000 test images"}
_WAYS = {
    ("ridge", "second_order"): "solved again, cheapest first",
    ("bias", "second_order"): "mean added, cheapest first",
    ("none", "second_order"): "nothing, cheapest first",
    ("none", "magnitude"): "nothing, by magnitude",
}
_COMMAND = "python -m benchmarks.pruning compensation --out runs/compensation --data DATA\n" + (
    "python -m benchmarks.pruning compensation-report --out runs/compensation"
)


def page(sources: Sources) -> str:
    """The whole page."""
    rows = list(sources.compensation.values())
    return document(
        [
            "# Pruning without training",
            picture("compensation", "Points of top-1 lost against MACs removed, with and without compensation"),
            "What reads the removed units is solved again in closed form, from unlabelled images "
            '(`compensation="ridge"`), and what costs least after that goes first (`criterion="second_order"`); see '
            "[Pruning](../explanation/pruning.md#what-makes-up-for-it). No row trains. DeiT-Tiny: 500 training images "
            "calibrate without their labels, 500 others decide, and 600 of `val` are looked at once. Small Swin: 2,000 "
            "calibrate, 5,000 decide, 10,000 test images are looked at once. The seed says which images calibrate.",
            "## A part of the cost goes",
            _aims([row for row in rows if row["job"]["target"] is not None and row["job"]["model"] in _MODELS]),
            "Ranges are over seeds, and the 95 % interval is the widest of the seeds'. Right -> wrong / wrong -> right "
            "are paired with the unpruned network. Divergence is of the answers from the unpruned network's. 2:4 "
            "removes half of all prunable weights.",
            *_searches([row for row in rows if row["job"]["target"] is None]),
            *_recovered(sources.pruning[1]),
            "## Time and memory",
            "Each row was alone in its process, but not on its machine: seconds are upper bounds. The least of "
            "DeiT-Tiny and that of Swin-T were on an idle machine, with two threads.",
            _costs(rows),
            command(_COMMAND, "a download"),
        ]
    )


def _aims(rows: Sequence[Row]) -> str:
    header = [
        "network", "granularity", "aim %", "what makes up for it, what goes first", "seeds", "MACs removed %",
        "weights removed %", "points lost", "95 %", "right -> wrong / wrong -> right", "agreement %",
        "divergence, nats",
    ]  # fmt: skip
    found = []
    for group in _grouped(rows):
        job, tests = group[0]["job"], [row["test"] for row in group]
        found.append(
            [
                _MODELS[job["model"]],
                job["granularity"],
                f"{100 * job['target']:g}",
                _WAYS[job["method"], job["criterion"]],
                str(len(group)),
                _range([100 * row["macs_removed"] for row in group], 1),
                _range([100 * row["weights_removed"] for row in group], 1),
                _range([test["points_lost"] for test in tests], 2),
                _widest(tests),
                _counts(tests),
                _range([test["agreement_points"] for test in tests], 1),
                _range([test["divergence_nats"] for test in tests], 3),
            ]
        )
    return table(header, found)


def _searches(rows: Sequence[Row]) -> list[str]:
    """What a search with an audit found; nothing where none was run."""
    if not rows:
        return []
    header = [
        "network", "tolerance", "seed", "MACs removed %", "lost where it decided", "lost on the audit",
        "at most (95 %)", "lost on the test images", "95 %", "right -> wrong / wrong -> right", "seconds",
    ]  # fmt: skip
    found = []
    for row in sorted(rows, key=lambda row: (row["job"]["tolerance"], row["job"]["seed"])):
        job, test, audits = row["job"], row["test"], row["holdout"]["audits"]
        last = audits[-1] if audits else None
        found.append(
            [
                _MODELS[job["model"]],
                f"{job['tolerance']:g}",
                str(job["seed"]),
                f"{100 * row['macs_removed']:.1f}",
                "" if last is None else f"{last['deciding_lost_points']:.2f}",
                "" if last is None else f"{last['lost_points']:.2f}",
                "" if last is None else f"{last['bound_points']:.2f}",
                f"{test['points_lost']:.2f}",
                _widest([test]),
                _counts([test]),
                f"{row['seconds']:.0f}",
            ]
        )
    return [
        "## A tolerance decides, and an audit",
        "Half of the hold-out, 250 images, decides, and the other half audits each round (`audit=0.5`). The bound is "
        "for all looks at the audit together. So few images make it wide, and a warning says how many would do.",
        table(header, found),
    ]


def _recovered(jobs: Mapping[str, Any]) -> list[str]:
    """What is left after fine-tuning; nothing where none was run."""
    rows = []
    for entry in jobs.values():
        job = entry["job"]
        if not job.get("compensated"):
            continue
        control = tables.control_of(jobs, job["model"], job["seed"])
        if control is None:
            continue
        before, after = tables.better_control(control), entry["after"]
        lost = tables.Loss((tables.paired(before["test"], after["test"]),))
        low, high = lost.widest_interval
        rows.append(
            [
                _MODELS[job["model"].removesuffix("_short")],
                str(job["seed"]),
                str(entry["recipe"]["epochs"]),
                f"{100 * (1 - after['macs'] / after['macs_before']):.1f}",
                f"{before['test']['percent']:.2f}",
                f"{after['test']['percent']:.2f}",
                lost.points.show(),
                f"{low:.2f} .. {high:.2f}",
                lost.flips,
            ]
        )
    header = [
        "network", "seed", "epochs", "MACs removed %", "float %", "pruned %", "points lost", "95 %",
        "right -> wrong / wrong -> right",
    ]  # fmt: skip
    if not rows:
        return []
    return [
        "## After training",
        "All of it is cut before the first epoch. The float network is the better of the given one and the same after "
        "as many epochs without pruning. [Other methods](pruning.md#against-other-methods-at-the-same-sparsity) with "
        "the same training are in the rows `compensated` there.",
        table(header, rows),
    ]


def _costs(rows: Sequence[Row]) -> str:
    header = ["network", "granularity", "seconds", "of these, the pass over the images", "peak memory, GB", "where"]
    found = []
    for model in _TIMED:
        for granularity in dict.fromkeys(row["job"]["granularity"] for row in rows):
            chosen = [
                row for row in rows
                if row["job"]["model"] == model and row["job"]["granularity"] == granularity
                and row["job"]["method"] == "ridge" and row["job"]["target"] is not None
            ]  # fmt: skip
            if chosen:
                places = {f"{short_cpu(r['environment'])}, {r['place']['threads']} threads" for r in chosen}
                found.append(
                    [
                        _TIMED[model],
                        granularity,
                        _range([r["seconds"] for r in chosen], 0),
                        _range([r["moments_seconds"] for r in chosen], 0),
                        _range([r["peak_rss_bytes"] / 1e9 for r in chosen], 1),
                        "; ".join(sorted(places)),
                    ]
                )
    return table(header, found)


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that differ in their seeds only."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        job = row["job"]
        key = (job["model"], job["granularity"], job["target"], list(_WAYS).index((job["method"], job["criterion"])))
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def _range(values: Iterable[float], digits: int) -> str:
    """The mean, and the range of several."""
    listed = list(values)
    mean = f"{sum(listed) / len(listed):.{digits}f}"
    return mean if len(listed) == 1 else f"{mean} ({min(listed):.{digits}f} .. {max(listed):.{digits}f})"


def _widest(tests: Sequence[Row]) -> str:
    lows, highs = zip(*(test["interval_points"] for test in tests), strict=True)
    return f"{min(lows):.2f} .. {max(highs):.2f}"


def _counts(tests: Sequence[Row]) -> str:
    return ", ".join(f"{test['lost_to_wrong']} / {test['won_to_right']}" for test in tests)


def headline(sources: Sources) -> list[str]:
    """The line of the overview."""
    groups = {(g[0]["job"]["model"], g[0]["job"]["target"]): g for g in _grouped(_ours(sources.compensation.values()))}
    told = []
    for model, aim in (("swin_cifar10", 0.55), ("deit_tiny", 0.14)):
        group = groups[model, aim]
        lost = _range([row["test"]["points_lost"] for row in group], 1)
        told.append(f"{100 * aim:.0f} % of the MACs of {_article(model)} go at {lost} points")
    return [
        "[Pruning without training](compensation.md)",
        f"{told[0]}; {told[1]}.",
        f"a few hundred unlabelled images, {_TESTS['swin_cifar10']}; {_TESTS['deit_tiny']}",
    ]


def _article(model: str) -> str:
    return f"the {_MODELS[model]}" if model == "swin_cifar10" else _MODELS[model]


def _ours(rows: Iterable[Row]) -> list[Row]:
    return [
        row for row in rows
        if row["job"]["method"] == "ridge" and row["job"]["target"] is not None
        and row["job"]["granularity"] == "structured"
    ]  # fmt: skip


def _draw(sources: Sources, theme: Theme) -> Figure:
    """Two panels, a line per way, seed 0."""
    figure = canvas(
        8.0, 4.2, theme=theme, title="Points lost against MACs removed, without any training",
        subtitle=f"DeiT-Tiny: {_TESTS['deit_tiny']}.\nSmall Swin: {_TESTS['swin_cifar10']}. One choice of images.",
    )  # fmt: skip
    rows = [row for row in sources.compensation.values() if row["job"]["seed"] == 0]
    colors = {"ridge": theme.ours, "bias": theme.second, "none": theme.others}
    for axes, model in zip(figure.subplots(1, 2), _MODELS, strict=True):
        _panel(axes, [row for row in rows if row["job"]["model"] == model], colors, theme)
        axes.set_title(_MODELS[model], fontsize=11)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], colors: Mapping[str, str], theme: Theme) -> None:
    for (method, criterion), label in _WAYS.items():
        chosen = sorted(
            (row["macs_removed"], row["test"]["points_lost"])
            for row in rows
            if (row["job"]["method"], row["job"]["criterion"]) == (method, criterion)
            and row["job"]["granularity"] == "structured"
            and row["job"]["target"] is not None
        )
        if not chosen:
            continue
        style = "o--" if criterion == "magnitude" else "o-"
        axes.plot([100 * x for x, _ in chosen], [y for _, y in chosen], style, color=colors[method], markersize=4,
                  linewidth=1.6, label=label)  # fmt: skip
    axes.set_ylim(-1, 20)
    axes.set_xlabel("MACs removed, %")
    axes.set_ylabel("points lost", color=theme.muted)
    axes.grid()
    axes.legend(loc="upper left", fontsize=8.5)


DRAWINGS: dict[str, Drawing] = {"compensation": _draw}
