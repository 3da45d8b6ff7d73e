"""The section of docs/results/engine.md on other runtimes that are held to AVX2."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import avx2_peers, report
from .races import Figures, shown, time_cell
from .text import command, commit, cpu, details, table

_COMMAND = "python -m benchmarks.engine avx2-peers\npython -m benchmarks.pages"
_HOW = (
    "A processor with VNNI is held to AVX2 here. torch reads a limit from its environment. onnxruntime and OpenVINO "
    "run from copies that get other answers when they ask what the processor has."
)


def parts(races: Sequence[Figures]) -> list[str]:
    """The races that `avx2-peers` has measured, and how to measure them."""
    rerun = command(_COMMAND, "the extra bench, gcc, objdump and a quiet machine")
    if not races:
        return [f"{_HOW} There are no results yet.", rerun]
    environment = races[0]["environment"]
    return [
        f"{_HOW} Measured on {environment['cores']} cores of an {cpu(environment)}, commit "
        f"{commit(environment)}. Times are medians, with how many times longer than the engine in brackets, "
        "and quartiles. Agreement is the lowest correlation of an image's logits in the race, and the number of images "
        "with the same best class.",
        *(part for figures in races for race in figures["races"] for part in _race(figures, race)),
        rerun,
        *(details(f"{report.title(each)}, held to AVX2", _body(each)) for each in races),
    ]


def _race(figures: Figures, race: Figures) -> list[str]:
    """The table of one race, and why runtimes are not in it."""
    header = ["runtime", "ms", "quartiles", "agrees with float", "agrees with engine"]
    measured = [result for result in race["results"] if result["latency"]]
    rows = [
        [
            shown(result["name"]),
            time_cell(race, result["name"]),
            "{:.1f} .. {:.1f}".format(*result["latency"]["quartiles_ms"]),
            report.agreement(result, "float_agreement"),
            report.agreement(result),
        ]
        for result in measured
    ]
    failed = [
        f"- {result['name']} did not run: {result['unavailable']}"
        for result in race["results"]
        if result["unavailable"]
    ]
    title = f"**{report.title(figures)}, {report.counted(race['threads'], 'thread')}**"
    return [title, table(header, rows), *(["\n".join(failed)] if failed else [])]


def _body(figures: Figures) -> list[str]:
    return [*avx2_peers.sections(figures, "**{}**"), report.environment(figures["environment"])]
