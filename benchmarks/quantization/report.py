"""Tables of the results: accuracy with paired counts, sizes, and what quantizing took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swincompress_pl.report import PairedComparison
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from .jobs import BITS, NETWORKS, WAYS, Job
from .work import classes_of

Results = Mapping[str, dict[str, Any]]


def write(folder: Path, to: Path) -> Path:
    """quantization.json from the results in `folder` and, for jobs that have none there, those that it keeps already;
    ValueError where there are none, or a network without its float one."""
    kept = to / "quantization.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    new = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    results |= {name: _paired(entry, new) for name, entry in new.items()}
    if not results:
        raise ValueError(f"{folder} has no results; `python -m benchmarks.quantization run --out {folder}` makes them")
    return write_text(kept, json.dumps(dict(sorted(results.items())), allow_nan=False, indent=1) + "\n")


def _paired(entry: dict[str, Any], results: Results) -> dict[str, Any]:
    """Counts of the pairs with the float network's answers instead of all answers, which would fill megabytes."""
    if "sets" not in entry:
        return entry
    job = Job(**entry["job"])
    name = Job(network=job.network, pruned=job.pruned, tuned=job.tuned).name
    if name not in results:
        raise ValueError(f"{job.name}: the results of {name}, which it is paired with, are not in the same folder")
    sets = {}
    for key, found in entry["sets"].items():
        before, after = (classes_of(results[given]["sets"][key]) for given in (name, job.name))
        pairs = PairedComparison.of(before, after, classes_of(found, "labels"))
        rest = {field: value for field, value in found.items() if field not in ("classes", "labels")}
        sets[key] = rest | {"paired": asdict(pairs)}
    return entry | {"sets": sets}


def sections(results: Results) -> list[str]:
    """How it was measured, the tables of each network, what quantizing costs, and where it ran."""
    parts = ["## How it was measured", _INTRODUCTION]
    for network in NETWORKS:
        for pruned in (False, True):
            rows = [*_rows(results, network, pruned), *_rows(results, network, pruned, tuned=True)]
            if rows:
                parts += [f"## {network}{', pruned' if pruned else ''}", _about(results, network, pruned), *rows]
    costs = [results[name] for name in sorted(results) if name.startswith("cost-")]
    if costs:
        parts += ["## What it costs", _cost_table(costs)]
    places = sorted({_place(entry) for entry in results.values()})
    parts += ["## Where it ran", "\n".join(f"- {place}" for place in places)]
    return parts


_INTRODUCTION = (
    "Accuracy is top-1 on images that nothing was decided on. Every accuracy is that of the integers, except the rows "
    "`affine`, which are simulated. The C++ engine gives it where it runs the widths (8-bit activations), and the "
    "torch twin elsewhere. Both are checked against the NumPy reference to the bit in the same run (column "
    "`equal`).\n\nCalibration takes 128 training images without augmentation. The images of `train` that are reported "
    "for DeiT-Tiny are others. Rounding learned at length and for the loss also takes the 72 images that are left. The "
    "first layer and the classifier keep 8 bits, and so does the input of GELU. The residual stream has 16 bits.\n\n"
    "Each row is paired with the float network of the same weights: right -> wrong / wrong -> right, the points lost "
    "with their 95 % interval, and the share of predictions that stay the same. After fine-tuning, the float network "
    "is a control: it is fine-tuned by the same recipe with the same teacher (the given float network), and masks are "
    "kept.\n\n"
    "`file %` is the artifact with weights packed, as a part of the float32 file of the whole network; it was written "
    "before plain files had sparse weights. `LZMA file %` is the artifact after lossless entropy coding (`export "
    "--compression lzma`). `s` is the "
    "wall time of quantizing or of the fit; other work ran beside some of them. The command `cost` measures the time "
    "alone."
)


def _rows(results: Results, network: str, pruned: bool, *, tuned: bool = False) -> list[str]:
    """A table for each set of images, against the float network; with `tuned` against the fine-tuned one."""
    base = results.get(Job(network=network, pruned=pruned, tuned=tuned).name)
    whole = results.get(Job(network=network).name)
    if base is None or whole is None:
        return []
    tables = []
    for names in [*((name,) for name in base["sets"]), *([tuple(base["sets"])] if len(base["sets"]) > 1 else [])]:
        rows = [
            _row(entry, whole, names, bits, way)
            for bits in BITS
            for way in WAYS
            if (entry := results.get(Job(network=network, pruned=pruned, way=way, bits=bits, tuned=tuned).name))
            is not None
        ]
        images = sum(base["sets"][name]["images"] for name in names)
        title = f"{images:,} images of `{'` and `'.join(names)}`; float network: {percent(base, names)} %."
        if tuned:
            epochs = base["recipe"]["epochs"]
            title = (
                f"After {epochs} epochs of fine-tuning with distillation: {images:,} images of "
                f"`{'` and `'.join(names)}`; float control after the same epochs: {percent(base, names)} %."
            )
        header = [
            "bits", "method", "top-1 %", "right -> wrong / wrong -> right", "points lost", "95 %", "same %", "equal",
            "file %", "LZMA file %", "s", "peak GB", "commit",
        ]  # fmt: skip
        tables.append(f"{title}\n\n{table(header, rows)}")
    return tables


def paired_counts(entry: Mapping[str, Any], names: Sequence[str]) -> PairedComparison:
    """Against the float network of the same weights, over the image sets `names` together."""
    counts = [entry["sets"][name]["paired"] for name in names]
    return PairedComparison(**{key: sum(count[key] for count in counts) for key in counts[0]})


def _row(entry: dict[str, Any], whole: dict[str, Any], names: Sequence[str], bits: str, way: str) -> list[str]:
    paired = paired_counts(entry, names)
    low, high = paired.interval_points
    equal = {k: v for k, v in entry.get("equal", {}).items() if k != "images"}
    part = [
        f"{100 * entry[key] / whole['file_bytes']:.1f}" if key in entry else ""
        for key in ("file_bytes", "compressed_file_bytes")
    ]
    return [
        bits,
        way,
        percent(entry, names),
        f"{paired.right_to_wrong} / {paired.wrong_to_right}",
        f"{-paired.change_points + 0.0:.2f}",
        f"{-high:.2f} .. {-low:.2f}",
        f"{100 * paired.same_predictions / paired.images:.2f}",
        ("yes" if all(equal.values()) else "NO") if equal else "simulated",
        *part,
        f"{entry['quantize_seconds'] if 'quantize_seconds' in entry else entry['fit_seconds']:.0f}",
        f"{entry['peak_rss_bytes'] / 1e9:.2f}",
        (entry["environment"].get("commit") or "")[:7],
    ]


def _cost_table(costs: Sequence[dict[str, Any]]) -> str:
    """Time and memory of the search, and of a validation pass against the float one."""
    rows = []
    for entry in costs:
        passes = entry["validation"]
        ratios = [after / before for before, after in zip(passes["float"], passes["integers"], strict=True)]
        rows.append(
            [
                entry["model"],
                str(entry["images"]),
                str(entry["environment"]["threads"]),
                f"{entry['seconds']:.0f}",
                f"{entry['peak_rss_bytes'] / 1e9:.2f}",
                f"{statistics.median(passes['float']):.2f}",
                f"{statistics.median(passes['integers']):.2f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",
            ]
        )
    header = [
        "network, random weights", "images", "threads", "calibration and search, s", "peak GB",
        "32 images in floats, s", "in integers, eval(), s", "ratio, median of turns",
    ]  # fmt: skip
    return table(header, rows)


def percent(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """Top-1 over the image sets `names` together."""
    sets = [entry["sets"][name] for name in names]
    return f"{100 * sum(found['correct'] for found in sets) / sum(found['images'] for found in sets):.2f}"


def _about(results: Results, network: str, pruned: bool) -> str:
    entry = results[Job(network=network, pruned=pruned).name]
    removed = 1 - entry["nonzero"] / entry["parameters"]
    zeros = (
        f"; {removed:.1%} of them are zero: single weights, pruned within 2 points of a hold-out, without training"
        if pruned
        else ""
    )
    return f"{entry['parameters']:,} parameters{zeros}. The float file has {entry['file_bytes'] / 1e6:.2f} MB."


def _place(entry: Mapping[str, Any]) -> str:
    found, device = entry["environment"], entry.get("place", {}).get("device")
    return (
        f"{found['cpu']}, {found['threads']} threads{f', {device}' if device else ''}, torch "
        f"{found['packages']['torch']}, commit {found.get('commit')}"
    )
