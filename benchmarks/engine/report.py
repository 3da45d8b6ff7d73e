"""Races as pages and a plot: `python -m benchmarks.engine.report --results DIR` makes the overview of a folder anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from swincompress_pl.report.comparison.bench import ENGINE
from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text

from .plot import draw

Figures = Mapping[str, Any]
_HEADER = ("runtime", "median ms", "quartiles ms", "GMAC/s", "times engine [quartiles]", "load ms", "file", "peak RSS")
_AGREES = "agrees with engine"
_NOTE = (
    "Each runtime in its own process, in turns; medians and quartiles. Load is reading or building the network, "
    "compiling it and the first answer, without imports; of torch, file is the float32 state_dict."
)
_WEIGHTS = (
    "Peers run the float weights that were quantized, on the same images: agreement is the lowest correlation of an "
    "image's centred logits with the engine's, and how many images have the same best class. Networks are not trained."
)
_OTHER_WEIGHTS = (
    "Peers run the same architecture with random float weights: their latency counts, their answers do not."
)


def main() -> int:
    """Writes engine.md and engine.svg of the races in a folder."""
    command = ArgumentParser(prog="python -m benchmarks.engine.report", description=main.__doc__)
    command.add_argument("--results", type=str, required=True, help="directory with engine-*.json")
    for path in write(Path(command.parse_args().results)):
        print(path)
    return 0


def write(folder: Path) -> list[Path]:
    """engine.md and engine.svg over all engine-*.json in `folder`; FileNotFoundError where there is none."""
    races = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("engine-*.json"))]
    if not races:
        raise FileNotFoundError(
            f"{folder}: no engine-*.json there; run `python -m benchmarks.engine --output {folder}`"
        )
    races.sort(key=lambda figures: (figures["model"], figures["batch"]))
    picture = write_text(folder / "engine.svg", draw(races))
    return [write_text(folder / "engine.md", overview(races)), picture]


def page(figures: Figures) -> str:
    """One model and batch, runtime by runtime."""
    answers = figures["answers"]
    verdict = "equal" if answers["equal_to_reference"] else "**DIFFER from**"
    compared = any(result.get("agreement") for race in figures["races"] for result in race["results"])
    parts = [
        f"# {figures['model']}, batch {figures['batch']}",
        f"{count(figures['macs'])} MACs an image, artifact {megabytes(figures['file_bytes'])}, random weights. Integer "
        f"logits of every implementation {verdict} the reference's on {answers['images']} images, in this run. {_NOTE} "
        f"{_WEIGHTS if compared else _OTHER_WEIGHTS}",
    ]
    header = [*_HEADER, *([_AGREES] if compared else [])]
    for race in figures["races"]:
        rows = [_row(result, race, figures)[: len(header)] for result in race["results"]]
        parts += [f"## {race['threads']} thread(s)", table(header, rows)]
    return "\n\n".join([*parts, _environment(figures["environment"])]) + "\n"


def _row(result: Figures, race: Figures, figures: Figures) -> list[str]:
    latency = result["latency"]
    if latency is None:
        return [result["name"], result["unavailable"] or "-", *[""] * (len(_HEADER) - 1)]
    low, high = latency["quartiles_ms"]
    times = race["times_engine"].get(result["name"])
    return [
        result["name"],
        f"{latency['median_ms']:.2f}",
        f"{low:.2f} .. {high:.2f}",
        f"{figures['macs'] * figures['batch'] / latency['median_ms'] / 1e6:.1f}",
        f"{times['median']:.2f}x [{times['quartiles'][0]:.2f}, {times['quartiles'][1]:.2f}]" if times else "1",
        _load(result),
        megabytes(result.get("file_bytes")),
        megabytes(result["peak_rss_bytes"]),
        _agreement(result),
    ]


def _load(result: Figures) -> str:
    return "-" if result.get("load_ms") is None else f"{result['load_ms']:.0f}"


def _agreement(result: Figures) -> str:
    found = result.get("agreement")
    if not found:
        return "-"
    correlation = "-" if found["correlation"] is None else f"{found['correlation']:.4f}"
    return f"{correlation} ({found['same_top1']}/{found['images']})"


def overview(races: Sequence[Figures]) -> str:
    """All races of a folder, a table a quantity and a column a runtime."""
    names = list(dict.fromkeys(result["name"] for _, race in _all(races) for result in race["results"]))
    peers = [name for name in names if name != ENGINE]
    compared = any(result.get("agreement") for _, race in _all(races) for result in race["results"])
    parts = [
        "# The engine against other runtimes",
        f'{_NOTE} Random weights. "-": not measured. A page each: '
        + ", ".join(f"[{_title(each)}](engine-{each['model']}-b{each['batch']}.md)" for each in races)
        + ".",
        "![latency relative to the engine](engine.svg)",
        "## Latency\n\nThe engine's median in ms; of the others, how many times longer they took.",
        _matrix(races, [ENGINE, *peers], _latency),
        "## Load, ms",
        _matrix(races, [ENGINE, *peers], lambda result, _: _load(result)),
        "## File",
        _matrix(races, [ENGINE, *peers], lambda result, _: megabytes(result.get("file_bytes"))),
        "## Peak resident memory",
        _matrix(races, [ENGINE, *peers], lambda result, _: megabytes(result["peak_rss_bytes"])),
    ]
    if compared:
        parts += [f"## Agreement\n\n{_WEIGHTS}", _matrix(races, peers, lambda result, _: _agreement(result))]
    failures = dict.fromkeys(
        f"- {_title(figures)}, {result['name']}: {result['unavailable']}"
        for figures, race in _all(races)
        for result in race["results"]
        if result["unavailable"]
    )
    parts += ["## Failed\n\n" + "\n".join(failures)] if failures else []
    environments = dict.fromkeys(_environment(each["environment"] | {"date": None}) for each in races)
    return "\n\n".join([*parts, "## Measured on", *environments]) + "\n"


def _all(races: Sequence[Figures]) -> list[tuple[Figures, Figures]]:
    return [(figures, race) for figures in races for race in figures["races"]]


def _title(figures: Figures) -> str:
    return f"{figures['model']}, batch {figures['batch']}"


def _matrix(races: Sequence[Figures], names: Sequence[str], cell: Callable[[Figures, Figures], str]) -> str:
    """A row for every race, a column for every runtime; cell: (result, race) -> text."""
    rows = []
    for figures, race in _all(races):
        found = {result["name"]: result for result in race["results"]}
        cells = [cell(found[name], race) if name in found and found[name]["latency"] else "-" for name in names]
        rows.append([figures["model"], str(figures["batch"]), str(race["threads"]), *cells])
    return table(["model", "batch", "threads", *names], rows)


def _latency(result: Figures, race: Figures) -> str:
    times = race["times_engine"].get(result["name"])
    return f"{times['median']:.2f}x" if times else f"{result['latency']['median_ms']:.2f}"


def _environment(environment: Figures) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    date = f"{environment['date']}, " if environment["date"] else ""
    return (
        f"{date}commit {environment['commit']}, {environment['cpu']} ({', '.join(environment['cpu_flags'])}), "
        f"{environment['cores']} cores, {environment['system']}, Python {environment['python']}, {packages}."
    )


if __name__ == "__main__":
    sys.exit(main())
