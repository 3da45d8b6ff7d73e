"""The results as a page and as data; what is committed stays where its results are no longer at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swincompress_pl.report.comparison.bench import ENGINE
from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from ..pruning.training import right_images
from .speed import PRUNED

Results = Mapping[str, dict[str, Any]]


def write(folder: Path, to: Path, controls: Path | None = None) -> Path:
    """spiking.json in `to`, from the results in `folder` and those that it keeps already.

    controls: results of `benchmarks.primesvt run`, whose controls are fine-tuned just as these rows are.
    """
    kept = to / "spiking.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    new = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    for file in sorted(controls.glob("*-control.json")) if controls else ():
        control = _control(json.loads(file.read_text(encoding="utf-8")))
        new.setdefault(f"{control['network']}-float-tuned", control)
    results = dict(sorted((results | {key: _kept(entry, new) for key, entry in new.items()}).items()))
    if not results:
        raise ValueError(f"{folder} has no results; `python -m benchmarks.spiking exact --out {folder}` makes some")
    return write_text(kept, json.dumps(results, allow_nan=False, indent=1) + "\n")


def _control(found: dict[str, Any]) -> dict[str, Any]:
    """A control of `benchmarks.primesvt` as a row of this benchmark."""
    return {
        "network": found["job"]["subject"],
        "bits": None,
        "tuned": True,
        "seed": found["seed"],
        "commit": found["tuned"]["commit"],
        "weights": found["weights"],
        "float": {"test": found["given"]["test"]},
        "integer": {"test": found["tuned"]["test"]},
        "epochs": found["tuned"]["epochs"],
    }


def _kept(entry: dict[str, Any], results: Results) -> dict[str, Any]:
    """Without answers, but with what was counted of them against the network that the row is compared with."""
    if "integer" not in entry:
        return entry
    control = results.get(f"{entry['network']}-float-tuned") if entry["tuned"] and entry["bits"] else None
    if entry["tuned"] and entry["bits"] and (control is None or control["weights"] != entry["weights"]):
        raise ValueError(
            f"{entry['network']}: no control was fine-tuned from weights {entry['weights']}; run `accuracy --tuned "
            "--bits float`, or pass --controls"
        )
    before = control["integer"]["test"] if control else entry["float"]["test"]
    was, now = right_images(before), right_images(entry["integer"]["test"])
    slim = dict(entry) | {"paired": [int((was & ~now).sum()), int((~was & now).sum())], "against": before["percent"]}
    for state in ("float", "integer"):
        slim[state] = {"test": {key: value for key, value in entry[state]["test"].items() if key != "right"}}
    return slim


def sections(results: Results) -> list[str]:
    """Exactness, accuracy, speed of whole and of pruned networks, and where it ran."""
    parts = [
        "## How it was measured",
        "Exactness is checked on all builders. Accuracy is that of small trained networks: those of the PrimeSVT "
        "benchmark, T = 2, CIFAR-10 (JPEG copy), 10,000 test images. Every accuracy of integers is the C++ engine's.",
    ]
    found = (_exact(results), _accuracy(results), _speed(results), _tuned(results), _pruned(results))
    parts += [text for text in found if text]
    commits = sorted({f"commit {entry['commit']}" for entry in results.values() if "commit" in entry})
    commits += sorted({entry["where"] for entry in results.values() if "where" in entry})
    return [*parts, "## Where it ran", "\n".join(f"- {line}" for line in commits)]


def _exact(results: Results) -> str:
    rows = [
        [
            entry["network"],
            str(entry["steps"]),
            ", ".join(map(str, entry["batches"])),
            str(entry["operations"]),
            f"{entry['neurons']} ({entry['silent_neurons']} silent)",
            f"{entry['spike_rate_percent']:.1f}",
            count(entry["macs"]),
            str(entry["differ"]),
        ]
        for entry in results.values()
        if "differ" in entry
    ]
    header = ["network", "T", "batches", "operations", "neurons", "spike rate, %", "MACs", "values that differ"]
    text = (
        "## Reference, twin and engine\n\nThe weights are fresh, a pass in training mode sets the statistics, and the "
        "widths are W8A8. The output of every operation, spikes included, is compared between the NumPy reference, the "
        "torch twin and the C++ engine. The logits of whole passes are compared as well."
    )
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def _accuracy(results: Results) -> str:
    rows = []
    for entry in results.values():
        if "integer" not in entry:
            continue
        reached = entry["integer"]["test"]["percent"]
        wrong, right = entry["paired"]
        rows.append(
            [
                entry["network"],
                entry["bits"] or "float, fine-tuned",
                f"{entry['epochs']} epochs" if entry["tuned"] else "no",
                "" if entry["tuned"] else entry.get("rounding", "nearest").replace("_", " "),
                f"{entry['float']['test']['percent']:.2f}",
                f"{reached:.2f}",
                f"{entry['against'] - reached:+.2f} ({wrong} / {right})",
                f"{entry['file_bytes'] / 1e3:.0f}" if "file_bytes" in entry else "",
            ]
        )
    header = [
        "network",
        "bits",
        "fine-tuned",
        "rounding",
        "float, %",
        "engine, %",
        "points lost (right to wrong / back)",
        "kB",
    ]
    text = (
        "## Accuracy\n\nScales are searched on 128 images. Rows that are fine-tuned (quantization-aware) are compared "
        "with a float control of as many epochs, the others with the float network."
    )
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def _title(key: str, entry: Mapping[str, Any]) -> str:
    """The network of a race, with the instructions if they were not the engine's choice."""
    chosen = f", {entry['implementation']}" if key.endswith(f"-{entry['implementation']}") else ""
    return f"{entry['network']}, T = {entry['steps']}{chosen}"


def _speed(results: Results) -> str:
    rows, shares = [], []
    for key, entry in results.items():
        for race in entry.get("races", []):
            found = {result["name"]: result for result in race["results"]}
            dense = entry["dense"]
            rows.append(
                [
                    f"{_title(key, entry)}, {race['threads']} thread(s)",
                    count(dense["macs"]),
                    f"{dense['sops'] / dense['macs']:.0%}",
                    _time(found[ENGINE]),
                    *(_against(found, race, name) for name in ("torch fp32", "onnxruntime fp32")),
                    "yes" if dense["equal"] else "**NO**",
                    megabytes(found[ENGINE]["peak_rss_bytes"]),
                    f"{dense['file_bytes'] / (4 * dense['parameters']):.1%}",
                ]
            )
            told = ", ".join(f"{kind} {share:.0%}" for kind, share in race["shares"].items() if share >= 0.005)
            shares.append(f"- {_title(key, entry)}, {race['threads']} thread(s): {told}")
    header = [
        "network", "MACs", "spikes per MAC", "engine, ms", "torch fp32, ms (times engine)",
        "onnxruntime fp32, ms (times engine)", "answer equal", "peak RSS", "file against float32",
    ]  # fmt: skip
    text = (
        "## Speed\n\nBatch 1, fresh weights, random images. Normalizations are biased until spikes cause at least a "
        "fifth as many additions as there are MACs. Every runtime runs in its own process, and they take turns. Times "
        "are medians with quartiles; ratios are taken round by round. Integer logits of every implementation are "
        "compared with the twin's in the same run. The peers have the same shapes, and their time does not depend on "
        "spikes. onnxruntime runs the time steps unrolled.\n\n"
    )
    return text + table(header, rows) + "\n\nThe engine's time by kind of step:\n\n" + "\n".join(shares) if rows else ""


def _tuned(results: Results) -> str:
    rows = []
    for entry in results.values():
        for row in entry.get("tuning", []):
            low, high = row["gain"]["quartiles"]
            rows.append(
                [
                    f"{entry['network']}, {row['threads']} thread(s)",
                    row["implementation"],
                    f"{row['density']:.0%}",
                    f"{row['usual_ms']:.3f}",
                    f"{row['tuned_ms']:.3f}",
                    f"{row['gain']['median']:.2f} [{low:.2f}, {high:.2f}]",
                    f"{min(row['percents'])} to {max(row['percents'])}",
                    f"{row['measured_s']:.2f}; {row['looked_up_s']:.3f}",
                    "yes" if row["equal"] else "**NO**",
                ]
            )
    header = [
        "network", "instructions", "spikes per MAC", "as usual, ms", "tuned, ms", "times as fast",
        "spikes are listed up to, %", "tuned in, s; again", "answer equal",
    ]  # fmt: skip
    text = (
        "## Speed after tuning\n\nThe trained networks on test images, one at a time, before and after `Engine.tune`. "
        "It measures, layer by layer, from which density of spikes on products are faster than lists of spikes. Its "
        "times are kept in a file, where the next engine looks them up. Both engines take turns in one process."
    )
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def _time(result: Mapping[str, Any]) -> str:
    """Median and quartiles in ms, or why there are none."""
    if result["latency"] is None:
        return str(result["unavailable"])
    low, high = np.percentile(result["latency"]["samples_ms"], (25, 75))
    return f"{np.median(result['latency']['samples_ms']):.1f} [{low:.1f}, {high:.1f}]"


def _against(found: Mapping[str, Any], race: Mapping[str, Any], name: str) -> str:
    if name not in race["times_engine"]:
        return _time(found[name])
    return f"{_time(found[name])} ({race['times_engine'][name]['median']:.2f})"


def _pruned(results: Results) -> str:
    rows = []
    for key, entry in results.items():
        for race in entry.get("races", []):
            dense, pruned = entry["dense"], entry["pruned"]
            rows.append(
                [
                    f"{_title(key, entry)}, {race['threads']} thread(s)",
                    f"{1 - pruned['parameters'] / dense['parameters']:.2%}",
                    f"{pruned['macs'] / dense['macs']:.2f}",
                    f"{pruned['sops'] / dense['sops']:.2f}",
                    f"{race['times_engine'][PRUNED]['median']:.2f}",
                    "yes" if pruned["equal"] else "**NO**",
                ]
            )
    header = ["network", "parameters removed", "MACs left", "spikes' additions left", "time left", "answer equal"]
    text = (
        "## Speed of pruned networks\n\nAn equal part of every group is removed, with widths in multiples of eight. "
        "They ran in the race above. Their spikes differ, too, since the weights are fresh. A time above 1.00 is a "
        "pruned network that takes longer than the whole one."
    )
    return f"{text}\n\n{table(header, rows)}" if rows else ""
