"""Races as pages and a plot: `python -m benchmarks.engine.report --results DIR` writes a folder's overview again."""

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
_AGREES, _AGREES_WITH_FLOAT = "agrees with engine", "agrees with float"
_NOTE = "Each runtime runs in its own process, and they take turns. Times are medians and quartiles."
_LOAD = (
    "Load is the time to read or build the network, compile it and give the first answer, without imports. For torch, "
    "the file is the float32 state_dict."
)
_WEIGHTS = (
    "The peers run the float weights that were quantized, on the same images. Agreement is the lowest correlation of "
    "an image's centered logits with the engine's, and the number of images with the same best class. The networks are "
    "not trained."
)
_OTHER_WEIGHTS = (
    "The peers run the same architecture with random float weights: their latency counts, but their answers do not."
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
    return "\n\n".join([f"# {title(figures)}", *race_sections(figures), environment(figures["environment"])]) + "\n"


def race_sections(figures: Figures, heading: str = "## {}") -> list[str]:
    """What was raced, and a table under a heading for each number of threads."""
    answers = figures["answers"]
    verdict = "equal" if answers["equal_to_reference"] else "**DIFFER from**"
    compared = any(result.get("agreement") for race in figures["races"] for result in race["results"])
    loaded = any(result.get("load_ms") for race in figures["races"] for result in race["results"])
    notes = [_NOTE, *([_LOAD] if loaded else []), _WEIGHTS if compared else _OTHER_WEIGHTS]
    parts = [
        f"{count(figures['macs'])} MACs per image, artifact {megabytes(figures['file_bytes'])}, random weights, "
        f"{rounds(figures)} rounds. Integer logits of every implementation {verdict} the reference's on "
        f"{counted(answers['images'], 'image')}, in the same run. {' '.join(notes)}"
    ]
    for race in figures["races"]:
        rows = [_row(result, race, figures) for result in race["results"]]
        parts += [
            heading.format(counted(race["threads"], "thread")),
            _without_unmeasured([*_HEADER, _AGREES, _AGREES_WITH_FLOAT], rows),
        ]
    return parts


def counted(number: int, what: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def rounds(figures: Figures) -> int:
    """Samples of each runtime; 0 where none was measured."""
    results = [result for race in figures["races"] for result in race["results"] if result["latency"]]
    return max((len(result["latency"]["samples_ms"]) for result in results), default=0)


def _without_unmeasured(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns that say "-" throughout."""
    kept = [column for column in range(len(header)) if any(row[column] not in ("", "-") for row in rows)]
    return table([header[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _row(result: Figures, race: Figures, figures: Figures) -> list[str]:
    latency = result["latency"]
    if latency is None:
        return [result["name"], result["unavailable"] or "-", *[""] * len(_HEADER)]
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
        agreement(result),
        agreement(result, "float_agreement"),
    ]


def _load(result: Figures) -> str:
    return "-" if result.get("load_ms") is None else f"{result['load_ms']:.0f}"


def agreement(result: Figures, key: str = "agreement") -> str:
    """ "0.9993 (1/1)": the lowest correlation and the images with the same best class; "-" where it is not known."""
    found = result.get(key)
    if not found:
        return "-"
    correlation = "-" if found["correlation"] is None else f"{found['correlation']:.4f}"
    return f"{correlation} ({found['same_top1']}/{found['images']})"


def overview(races: Sequence[Figures]) -> str:
    """All races of a folder, a table per quantity and a column per runtime."""
    links = ", ".join(f"[{title(each)}](engine-{each['model']}-b{each['batch']}.md)" for each in races)
    parts = [
        "# The engine against other runtimes",
        f"Each race has a page: {links}.",
        "![latency relative to the engine](engine.svg)",
        *matrices(races),
    ]
    return "\n\n".join([*parts, "## Measured on", *environments(races)]) + "\n"


def matrices(races: Sequence[Figures]) -> list[str]:
    """Latency, load, file, memory and agreement of all races, a column per runtime, and what failed."""
    names = list(dict.fromkeys(result["name"] for _, race in _all(races) for result in race["results"]))
    peers = [name for name in names if name != ENGINE]
    compared = any(result.get("agreement") for _, race in _all(races) for result in race["results"])
    parts = [
        f'{_NOTE} {_LOAD} Weights are random. "-" means not measured.',
        "## Latency\n\nFor the engine, the median in ms. For the others, how many times longer they took.",
        _matrix(races, [ENGINE, *peers], _latency),
        "## Load, ms",
        _matrix(races, [ENGINE, *peers], lambda result, _: _load(result)),
        "## File",
        _matrix(races, [ENGINE, *peers], lambda result, _: megabytes(result.get("file_bytes"))),
        "## Peak resident memory",
        _matrix(races, [ENGINE, *peers], lambda result, _: megabytes(result["peak_rss_bytes"])),
    ]
    if compared:
        parts += [f"## Agreement\n\n{_WEIGHTS}", _matrix(races, peers, lambda result, _: agreement(result))]
    failures = dict.fromkeys(
        f"- {title(figures)}, {result['name']}: {result['unavailable']}"
        for figures, race in _all(races)
        for result in race["results"]
        if result["unavailable"]
    )
    parts += ["## Failed\n\n" + "\n".join(failures)] if failures else []
    return parts


def environments(races: Sequence[Figures]) -> list[str]:
    """Each different machine and commit once."""
    return list(dict.fromkeys(environment(each["environment"] | {"date": None}) for each in races))


def _all(races: Sequence[Figures]) -> list[tuple[Figures, Figures]]:
    return [(figures, race) for figures in races for race in figures["races"]]


def title(figures: Figures) -> str:
    """Model and batch."""
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


def environment(found: Figures) -> str:
    """Date, commit, CPU, system and versions."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    date = f"{found['date']}, " if found["date"] else ""
    return (
        f"{date}commit {found['commit']}, {found['cpu']} ({', '.join(found['cpu_flags'])}), "
        f"{found['cores']} cores, {found['system']}, Python {found['python']}, {packages}."
    )


if __name__ == "__main__":
    sys.exit(main())
