"""The results as a page and as data: tables of figures, with what a reader needs to judge them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from . import tables
from .jobs import read_results
from .subjects import MODELS
from .tables import Loss, Results, Spread

_FILES = {
    "latency": "latency.json",
    "memory structured": "memory-structured.json",
    "memory weight": "memory-weight.json",
}
_WAYS = {
    "target": "recovery, tolerance and target",
    "tolerance": "recovery, tolerance alone",
    "alone": "no recovery",
    "narrow": "no recovery, tolerance from an eighth",
}
METHODS = {
    "ours": "ours",
    "oneshot_global": "one shot, all layers ranked together",
    "oneshot_uniform": "one shot, the same part of each layer",
    "lightning_once": "Lightning's ModelPruning, once",
    "lightning_iterative": "Lightning's ModelPruning, a part after each epoch of our rounds",
    "torch_pruning": "Torch-Pruning, all but the classifier",
    "torch_pruning_mlp": "Torch-Pruning, MLPs only",
    "torch_pruning_mlp_global": "Torch-Pruning, MLPs only, ranked together",
}


def write(folder: Path, to: Path) -> Path:
    """`to`/pruning.json of everything that `folder` holds, and of what it has of other runs."""
    file, results = to / "pruning.json", read_results(folder)
    others = {
        name: json.loads((folder / each).read_text(encoding="utf-8"))
        for name, each in _FILES.items()
        if (folder / each).is_file()
    }
    if not results and not others:
        raise FileNotFoundError(f"{folder}: no results there; `run`, `latency` and `memory` write some")
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    jobs = {name: {k: v for k, v in entry.items() if k != "environment"} for name, entry in results.items()}
    for entry in jobs.values():
        if "search" in entry:
            entry["search"] = {k: v for k, v in entry["search"].items() if k != "decisions"}
        entry.pop("lists", None)
    jobs = kept.get("jobs", {}) | jobs
    data = {
        **{name: kept[name] for name in _FILES if name in kept},
        "table1": {model: tables.table1(jobs, model) for model in MODELS},
        "comparison": tables.comparison(jobs),
        "scoring": _of_kind(results, "scoring") or kept.get("scoring", []),
        "overhead": _of_kind(results, "overhead") or kept.get("overhead", []),
        **others,
        "environments": list(dict.fromkeys([*kept.get("environments", []), *_environments(results)])),
    }
    return write_text(file, json.dumps(tables.plain({**data, "jobs": jobs}), allow_nan=False) + "\n")


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, jobs) of a pruning.json: its rows are computed from the jobs again, as spreads and losses."""
    data = json.loads(file.read_text(encoding="utf-8"))
    jobs = data.pop("jobs")
    rows = {"table1": {model: tables.table1(jobs, model) for model in MODELS}, "comparison": tables.comparison(jobs)}
    return data | rows, jobs


def sections(data: Mapping[str, Any], results: Results) -> list[str]:
    """How it was measured, each network, the other methods, the costs, latency, memory, and where it ran."""
    parts = ["## How it was measured", _INTRODUCTION]
    for model, rows in data["table1"].items():
        if rows:
            parts += [f"## {model}: tolerance, compression, accuracy lost", _setting(results, model), _table1(rows)]
    if data["comparison"]:
        title = "## Against other methods at the same sparsity"
        parts += [title, f"{_COMPARISON} {_peer_versions(results)}", _compared(data["comparison"])]
    if data["scoring"]:
        parts += ["## The same decisions from fewer images", _SCORING, _scoring(data["scoring"])]
    if data["overhead"]:
        parts += ["## The callback's own time", _OVERHEAD, _overhead(data["overhead"])]
    if "latency" in data:
        parts += _latency(data["latency"])
    memories = [data[name] for name in _FILES if name.startswith("memory") and name in data]
    if memories:
        parts += ["## A round at full size", _MEMORY, _memory(memories)]
        parts.append(f"Measured on: {_place(memories[0]['environment'])}.")
    return [*parts, "## Where it ran", "\n".join(f"- {line}" for line in data["environments"])]


_INTRODUCTION = (
    "Accuracy is top-1 on the test images, which are looked at once, after everything is decided. Decisions fall on a "
    "hold-out of the training images. A range in brackets is over seeds.\n\n"
    "Points lost count against the float control. With recovery, that is the better of the given weights and the same "
    "weights fine-tuned unpruned with the same epochs, seed and recipe. Without recovery, it is the given weights. "
    "Losses are paired image by image: right -> wrong / wrong -> right for each seed. The 95 % interval is the widest "
    "of the seeds' intervals. Weights removed are those of the linear layers in the blocks and of the patch merging, "
    "without patch embedding and classifier.\n\n"
    "The given Swin and DeiT had seen all training images, so a hold-out of those flatters them. With recovery, the "
    "baseline is measured after some epochs without the hold-out. Without recovery this cannot be avoided. Without "
    "recovery nothing is random but the choice of the hold-out."
)
_COMPARISON = (
    "Each method gets the weights, seed and training of ours, and the sparsity that ours reached (part of the prunable "
    "weights, or of the MACs). Rows `narrow` are without recovery and begin with an eighth of the tolerance; there, no "
    "method trains. All rows are on swin_cifar10. Rows `swin_cifar10_short` train 5 epochs instead of 24 and reach "
    "larger sparsities. In rows `ranked`, ours ranks all targets together by Fisher information per MAC or weight "
    "saved; elsewhere it takes the targets in turn by magnitude. In rows `compensated`, it cuts at once what "
    'compensation makes up for (`compensation="ridge"`, `criterion="second_order"`), and recovers as the others do. '
    "Lightning's structured functions write zeros and remove no MAC, so they have no row. Points behind ours below 0 "
    "mean that the other method is better."
)
_SCORING = (
    "The same search runs twice: once with every image scored for every decision, once with sampling, a sequential "
    "test and cached activations. Forwards are whole passes of an image; a pass that starts deeper counts as its part."
)
_OVERHEAD = (
    "A round runs before each of some epochs of a few timed batches; an epoch is extrapolated from the time of a "
    "batch. Own time is that of the callback's hooks and the upkeep of masks, without the scoring and without reading "
    "the hold-out once."
)
_MEMORY = (
    "Swin-T with random weights and synthetic images: one round before an epoch of a few training steps, in a process "
    "of its own. The time for ImageNet is an estimate from the images per second of this run. Naive means every image "
    "for every decision. The last column applies the part of the forwards that the searches on swin_cifar10 needed."
)


def _setting(results: Results, model: str) -> str:
    entry = next(e for e in results.values() if e["job"]["model"] == model and "after" in e)
    recipe, images = entry["recipe"], entry["after"]["test"]["images"]
    distilled = f", distillation {recipe['distillation']:g}" if recipe["distillation"] else ""
    return (
        f"{entry['test_data']}: {images:,} images; hold-out {recipe['holdout']:,}. {recipe['epochs']} epochs, AdamW, "
        f"lr {recipe['lr']:g} with a cosine, batch {recipe['batch_size']}{distilled}; rounds before epochs "
        f"{recipe['start_epoch']} to at most {recipe['start_epoch'] + recipe['max_rounds'] - 1}; steps of "
        f"{recipe['step']:.0%} halved down to {recipe['min_step']:.2%}, criterion {recipe['criterion']}, kinds "
        f"{'+'.join(recipe['kinds'])} (structured)."
    )


def _peer_versions(results: Results) -> str:
    found = {f"{name} {number}" for e in results.values() for name, number in e.get("versions", {}).items()}
    return f"Versions: {', '.join(sorted(found))}." if found else ""


def _table1(rows: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "granularity, way", "tolerance", "seeds", "weights removed %", "MACs removed %", "float %", "pruned %",
        "points lost", "95 %", "right -> wrong / wrong -> right", "hold-out lost by the search", "never beyond", "bar",
    ]  # fmt: skip
    return table(header, [_table1_row(row) for row in rows])


def _table1_row(row: Mapping[str, Any]) -> list[str]:
    low, high = row["lost"].widest_interval
    bar = f"{row['bar']:.0%}: {row['bar_reached']} of {len(row['seeds'])} seeds" if "bar" in row else ""
    return [
        f"{row['granularity']}, {_WAYS[row['way']]}" + (f" {row['target']:.0%}" if row["target"] else ""),
        f"{row['tolerance']:g}",
        str(len(row["seeds"])),
        _percent(row["weights_removed"]),
        _percent(row["macs_removed"]),
        row["float_accuracy"].show(),
        row["accuracy"].show(),
        row["lost"].points.show(),
        f"{low:.2f} .. {high:.2f}",
        row["lost"].flips,
        row["holdout_lost"].show(),
        "yes" if row["rollback_held"] else "NO",
        bar,
    ]


def _compared(rows: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "method", "sparsity of", "seeds", "weights removed %", "MACs removed %", "accuracy %", "points lost",
        "points behind ours", "right -> wrong / wrong -> right against ours",
    ]  # fmt: skip
    body = []
    for row in rows:
        where = row["reference"].removeprefix("prune-").removeprefix("swin_cifar10-")
        start = [METHODS.get(row["method"], row["method"]), where]
        if "failed" in row:
            why = "; ".join(row["failed"]).replace("\n", " ")[:240]
            body.append([*start, "", f"failed: {why}", "", "", "", "", ""])
            continue
        behind: Loss = row["behind_ours"]
        ours = row["method"] == "ours"
        body.append(
            [
                *start,
                str(len(row["seeds"])),
                _percent(row["weights_removed"]),
                _percent(row["macs_removed"]),
                row["accuracy"].show(),
                row["lost"].points.show(),
                "" if ours else behind.points.show(),
                "" if ours else behind.flips,
            ]
        )
    return table(header, body)


def _scoring(entries: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "search", "decisions", "equal", "equal until", "naive images", "images scored", "forwards",
        "times fewer images", "times fewer forwards",
    ]  # fmt: skip
    body = [
        [
            f"{e['job']['granularity']}, " + ("a round after fine-tuning" if e["job"]["recovery"] else "no recovery"),
            f"{e['decisions']}",
            "yes" if e["equal"] else f"no ({e['decisions_naive']} naive)",
            f"{e['equal_until']}",
            f"{e['naive_images']:,}",
            f"{e['scoring']['images_scored']:,}",
            f"{e['scoring']['image_forwards']:,.0f}",
            f"{e['fewer_images']:.1f}",
            f"{e['fewer_forwards']:.1f}",
        ]
        for e in entries
    ]
    return table(header, body)


def _overhead(entries: Sequence[Mapping[str, Any]]) -> str:
    header = ["granularity", "device", "threads", "targets", "epoch s", "own s per round", "own, mean %", "own, most %"]
    body = [
        [
            e["job"]["granularity"],
            e["place"]["device"],
            str(e["threads"]),
            str(e["targets"]),
            Spread(tuple(row["training_s"] for row in e["epochs"])).show(1),
            Spread(tuple(row["own_s"] for row in e["epochs"])).show(3),
            f"{100 * e['share_mean']:.2f}",
            f"{100 * e['share_max']:.2f}",
        ]
        for e in entries
    ]
    return table(header, body)


def _latency(data: Mapping[str, Any]) -> list[str]:
    equal = all(v["answers"]["equal_to_reference"] for v in data["variants"])
    parts = [
        f"## Latency of {data['model']}, structurally pruned (round_to={data['round_to']})",
        "Batch 1, random weights. Every runtime and variant runs in its own process, and they take turns. Integer "
        f"logits of the engine {'equal' if equal else '**DIFFER from**'} the reference's for every variant, in the "
        "same run.",
    ]
    parts += [f"- {name}: {error}" for name, error in data["failed"].items()]
    parts.append(f"Measured on: {_place(data['environment'])}.")
    for one in data["races"]:
        header = ["variant", "MACs of dense", "ms", "quartiles", "time of dense", "time beyond MACs"]
        rows = [_latency_row(row) for row in one["rows"]]
        parts += [f"### {one['threads']} thread(s)", table(header, rows)]
    for threads, profiles in data["profiles"].items():
        title = f"### Where the engine's time goes, {threads} thread(s)\n\nIn ms, with the part of the dense time."
        parts += [title, _kinds(profiles), _does_not_shrink(profiles)]
    return parts


def _latency_row(row: Mapping[str, Any]) -> list[str]:
    name = f"{row['runtime']}, {row['variant']}"
    if "unavailable" in row:
        return [name, f"{row['macs_part']:.2f}", str(row["unavailable"]), "", "", ""]
    low, high = row["quartiles_ms"]
    return [
        name,
        f"{row['macs_part']:.2f}",
        f"{row['median_ms']:.2f}",
        f"{low:.2f} .. {high:.2f}",
        f"{row['time_part']:.2f}",
        f"{row['beyond_macs']:+.2f}",
    ]


def _kinds(profiles: Mapping[str, Mapping[str, float]]) -> str:
    names = list(profiles)
    dense = profiles[names[0]]
    kinds = sorted({kind for times in profiles.values() for kind in times}, key=lambda kind: -dense.get(kind, 0.0))
    rows = [[kind, *(_part(profiles[name].get(kind, 0.0), dense.get(kind, 0.0)) for name in names)] for kind in kinds]
    total = sum(dense.values())
    rows.append(["all", *(_part(sum(profiles[name].values()), total) for name in names)])
    return table(["kind", *names], rows)


def _does_not_shrink(profiles: Mapping[str, Mapping[str, float]]) -> str:
    names = list(profiles)
    return "\n".join(
        f"- {name}: hardly shrinks: "
        + (", ".join(k for k, ms in profiles[names[0]].items() if profiles[name].get(k, 0.0) > 0.9 * ms) or "nothing")
        for name in names[1:]
    )


def _part(time_ms: float, dense_ms: float) -> str:
    return f"{time_ms:.2f}" + (f" ({time_ms / dense_ms:.2f})" if dense_ms else "")


def _memory(entries: Sequence[Mapping[str, Any]]) -> str:
    header = ["granularity", "model", "targets", "peak RSS", "images/s", "ImageNet, naive h", "as on swin_cifar10"]
    body = []
    for e in entries:
        estimate = e["imagenet"]
        hours = estimate["hours_a_round"]
        body.append(
            [
                e["granularity"], e["model"], str(e["targets"]), megabytes(e["peak_rss_bytes"]),
                f"{e['images_per_s']:.1f}",
                f"{estimate['naive_hours_a_round']:.1f} ({count(estimate['holdout'])} images)",
                "" if hours is None else f"{hours:.1f} h ({estimate['part_of_naive']:.0%} of the forwards)",
            ]
        )  # fmt: skip
    return table(header, body)


def _percent(spread: Spread) -> str:
    return Spread(tuple(100 * value for value in spread.values)).show(1)


def _place(environment: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    return (
        f"{environment['date'][:10]}, commit {environment['commit']}, {environment['cpu']}, "
        f"{environment['cores']} cores, Python {environment['python']}, {packages}"
    )


def _of_kind(results: Results, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in results.values() if entry["job"]["kind"] == kind]


def _environments(results: Results) -> list[str]:
    """Each different place once, with how many jobs ran there."""
    found: dict[str, int] = {}
    for entry in results.values():
        place = entry["place"]
        line = f"{place['device']} ({place['precision']}); {_place(entry['environment'])}"
        found[line] = found.get(line, 0) + 1
    return [f"{number} jobs: {line}" for line, number in found.items()]
