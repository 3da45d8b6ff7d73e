"""docs/results/engine.md: the integer engine against other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from swincompress_pl.report.comparison.bench import ENGINE
from swincompress_pl.report.content.numbers import megabytes

from ..engine import batches, gemm, report, shares
from ..engine.measure import BEFORE
from . import avx2_peers
from .headline import MODEL
from .races import Figures, by_time, median_ms, on_threads, result, shown, time_cell, times
from .sources import Sources, pick
from .text import command, commit, cpu, details, document, picture, shifted, table
from .theme import Drawing, Theme, behind, canvas, long_bars

_PEER = "openvino int8 (nncf)"
_MODELS = {
    "swin_tiny_patch4_window7_224": "Swin-T",
    "swin_small_patch4_window7_224": "Swin-S",
    "deit_small_patch16_224": "DeiT-Small",
    "deit_tiny_patch16_224": "DeiT-Tiny",
}
_COMMAND = (
    "python -m benchmarks.engine --model swin_tiny_patch4_window7_224 \\\n"
    "  --against torch,torch-bf16,torch-compile,onnxruntime,onnxruntime-qdq,openvino \\\n"
    "  --rounds 9 --turn-ms 200"
)

_AMX_COMMAND = (
    f"python -m benchmarks.engine --model {','.join(_MODELS)} \\\n"
    "  --batch 1,8 --against openvino,onnxruntime,onnxruntime-qdq \\\n"
    "  --before BEFORE --rounds 9 --turn-ms 200 --output benchmarks/results/amx"
)


def page(sources: Sources) -> str:
    """The whole page."""
    figures = sources.race(MODEL, 1)
    return document(
        [
            "# The engine against other runtimes",
            picture("engine", "Swin-T at 224 pixels, batch 1: milliseconds per image by runtime, one and two threads"),
            *_swin_tiny(figures),
            *_quiet(sources),
            *_other_networks(sources),
            *_amx(sources),
            *_single_figures(sources),
            "## All races on Sapphire Rapids",
            *shifted(report.matrices(sources.races)),
            "### Measured on",
            *report.environments(sources.races),
            "### Each race",
            *(_race(each) for each in sources.races),
            *_zen4(sources),
            f"## {shares.TITLE}",
            *shares.sections(sources.shares),
            *_avx2(sources),
            f"## {batches.title(sources.batches)}",
            *batches.sections(sources.batches),
            f"## {gemm.TITLE}",
            *gemm.sections(sources.gemm, "**{}**"),
        ]
    )


def _swin_tiny(figures: Figures) -> list[str]:
    one, two = (on_threads(figures, threads) for threads in (1, 2))
    rows = [
        [
            shown(name),
            *(time_cell(race, name) for race in (one, two)),
            *(f"{result(race, name)['peak_rss_bytes'] / 1e6:.0f} MB" for race in (one, two)),
        ]
        for name in by_time(one)
    ]
    header = ["runtime", "1 thread, ms", "2 threads, ms", "peak memory, 1 thread", "peak memory, 2 threads"]
    return [
        "## Swin-T, one image",
        f"Swin-T at 224 pixels, batch 1, on 2 cores of an {cpu(figures['environment'])}, commit "
        f"{commit(figures['environment'])}. Cells are medians in ms. Brackets hold how many times longer a runtime "
        f"takes than the engine: the median over {report.rounds(figures)} interleaved rounds. The weights are random, "
        "since they do not change the time.",
        table(header, rows),
        command(_COMMAND, "the extra bench and a quiet machine"),
    ]


def _quiet(sources: Sources) -> list[str]:
    """The same network while nothing else loaded the machine."""
    quiet = pick(sources.quiet_races, MODEL, 1)
    ours = " and ".join(f"{median_ms(on_threads(quiet, threads), ENGINE):.1f}" for threads in (1, 2))
    peers = " and ".join(f"{times(on_threads(quiet, threads), _PEER):.2f}x" for threads in (1, 2))
    return [
        f"The machine was noisy during this run. On a quiet one (commit {commit(quiet['environment'])}), the engine "
        f"takes {ours} ms on 1 and 2 threads, and OpenVINO int8 {peers} as long:",
        *(details(f"The quiet run of {report.title(each)}", _body(each)) for each in sources.quiet_races),
    ]


def _networks(races: list[dict[str, Any]], peers: Mapping[str, str]) -> str:
    """The engine's times on the networks, and how many times longer each of `peers` takes ({name: as shown})."""
    rows = [
        [
            name,
            str(batch),
            *(f"{median_ms(on_threads(race, threads), ENGINE):.1f}" for threads in (1, 2)),
            *(f"{times(on_threads(race, threads), peer):.2f}x" for peer in peers for threads in (1, 2)),
        ]
        for batch in (1, 8)
        for model, name in _MODELS.items()
        for race in [pick(races, model, batch)]
    ]
    header = ["network", "batch", "engine, 1 thread, ms", "engine, 2 threads, ms"]
    header += [f"{peer}, {threads}" for peer in peers.values() for threads in ("1 thread", "2 threads")]
    return table(header, rows)


def _other_networks(sources: Sources) -> list[str]:
    return [
        "## Other networks against OpenVINO int8",
        picture("engine-networks", "OpenVINO int8 relative to the engine for four networks, batch 1 and 8"),
        f"{_closest(sources)}The table says how many times longer than the engine OpenVINO int8 (NNCF) takes.",
        _networks(sources.races, {_PEER: "OpenVINO int8"}),
    ]


def _amx(sources: Sources) -> list[str]:
    """Where the processor has AMX, which OpenVINO uses, too."""
    environment = sources.amx_races[0]["environment"]
    commits = sorted({commit(each["environment"]) for each in sources.amx_races})
    return [
        "## With AMX",
        f"The same networks on 2 cores of an {cpu(environment)}, commits {' and '.join(commits)}. OpenVINO uses AMX, "
        "too. The engine before, commit fb941f7, does not. Cells for both say how many times longer than the engine "
        "they take.",
        _networks(sources.amx_races, {_PEER: "OpenVINO int8", BEFORE: "engine before"}),
        command(_AMX_COMMAND, "a CPU with AMX, the extra bench, an engine built in BEFORE and a quiet machine"),
        *(_race(each) for each in sources.amx_races),
    ]


def _closest(sources: Sources) -> str:
    """That the peer is the quickest of all, where that is so."""
    races = [race for figures in sources.races for race in figures["races"]]
    if all(times(race, _PEER) == min(each["median"] for each in race["times_engine"].values()) for race in races):
        return "In every race, OpenVINO int8 is the quickest of the other runtimes. "
    return ""


def _single_figures(sources: Sources) -> list[str]:
    ratios = [row["ratio"] for row in sources.batches["rows"]]
    layers = [row for row in sources.gemm["rows"] if row["threads"] == 1 and row["implementation"] == "avx512_vnni"]
    speeds = [row["gmacs_per_second"] for row in layers]
    shares = [row["gmacs_per_second"] / row["peak_gmacs_per_second"] for row in layers]
    file = megabytes(sources.race(MODEL, 1)["file_bytes"])
    return [
        "## Batches, files, layers and pruned networks",
        f"- An image in a batch of {sources.batches['batch']} takes {min(ratios):.2f} to {max(ratios):.2f} of the time "
        "of an image alone.\n"
        f"- The artifact of Swin-T has {file}.\n"
        f"- One linear layer alone runs at {min(speeds):.0f} to {max(speeds):.0f} GMAC/s on one thread. That is "
        f"{100 * min(shares):.0f} to {100 * max(shares):.0f} % of what its products reach on registers.\n"
        f"- {pruned_times(sources)} See [Pruning](pruning.md).",
    ]


def pruned_times(sources: Sources) -> str:
    """A sentence on the engine's time on pruned Swin-T."""
    data, _ = sources.pruning
    latency = data["latency"]
    parts = [f"{part} %" for part in (20, 40, 60)]
    shares = [
        [next(r for r in race["rows"] if r["runtime"] == "engine" and r["variant"] == f"{part[:2]}% fewer, heads+mlp")]
        for race in latency["races"]
        for part in parts
    ]
    one, two = (
        ", ".join(f"{100 * row['time_part']:.0f}" for (row,) in shares[start : start + len(parts)]) for start in (0, 3)
    )
    environment = latency["environment"]
    return (
        f"Pruned by {', '.join(parts)} of its MACs (`round_to={latency['round_to']}`), Swin-T takes {one} % of its "
        f"time on one thread and {two} % on two ({cpu(environment)}, commit {commit(environment)})."
    )


def _zen4(sources: Sources) -> list[str]:
    environment = sources.zen4_races[0]["environment"]
    return [
        "## On Zen 4",
        f"Commit {commit(environment)} on 2 cores of an {cpu(environment)}:",
        *(_race(each) for each in sources.zen4_races),
    ]


def _avx2(sources: Sources) -> list[str]:
    """The engine against itself, and against others, where the processor's other instructions are not used."""
    return [
        "## With AVX2 alone",
        'The same processor, with `implementation="avx2"`. "Engine before" is commit f7544c0, in the same turns. '
        "[How the engine got its speed](../explanation/engine.md) lists what was tried.",
        *(_race(each) for each in sources.avx2_races),
        "### Other runtimes held to AVX2",
        *avx2_peers.parts(sources.avx2_peer_races),
    ]


def _race(figures: Figures) -> str:
    return details(report.title(figures), _body(figures))


def _body(figures: Figures) -> list[str]:
    return [*report.race_sections(figures, "**{}**"), report.environment(figures["environment"])]


def _draw_runtimes(sources: Sources, theme: Theme) -> Figure:
    figures = sources.race(MODEL, 1)
    figure = canvas(
        5.0, 6.6, theme=theme,
        title="Swin-T, one image: ms by runtime",
        subtitle=(
            f"{cpu(figures['environment'])}, 2 cores.\n224 x 224, batch 1, random weights. Medians of "
            f"{report.rounds(figures)} rounds;\nin brackets, times longer than the engine. Shorter is better."
        ),
    )  # fmt: skip
    for axes, threads in zip(figure.subplots(2, 1), (1, 2), strict=True):
        race = on_threads(figures, threads)
        names = by_time(race)
        colors = [theme.ours if name == ENGINE else theme.others for name in names]
        values = [median_ms(race, name) for name in names]
        long_bars(axes, [shown(n, short=True) for n in names], values, [time_cell(race, n) for n in names], colors,
                  room=0.8)  # fmt: skip
        axes.get_yticklabels()[0].set_fontweight("bold")
        axes.set_title(report.counted(threads, "thread"), fontsize=11)
    return figure


def _draw_networks(sources: Sources, theme: Theme) -> Figure:
    figure = canvas(
        5.0, 4.6, theme=theme,
        title="OpenVINO int8: time relative to the engine",
        subtitle=(
            f"{cpu(sources.races[0]['environment'])}, 2 cores.\nMedians of all rounds. "
            "Right of the line the engine is quicker."
        ),
    )  # fmt: skip
    axes = figure.subplots()
    rows = [
        (f"{name}, batch {batch}", sources.race(model, batch)) for model, name in _MODELS.items() for batch in (1, 8)
    ]
    for threads, color, shift in ((1, theme.others, -0.19), (2, theme.muted, 0.19)):
        values = [times(on_threads(race, threads), _PEER) for _, race in rows]
        places = [place + shift for place in range(len(rows))]
        axes.barh(places, values, height=0.36, color=color, label=report.counted(threads, "thread"))
        for place, value in zip(places, values, strict=True):
            behind(axes, value, place, f"{value:.2f}x", 9)
    axes.axvline(1, color=theme.ink, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 2.9)
    axes.set_xticks([0, 1, 2])
    axes.legend(loc="upper right", fontsize=10)
    return figure


DRAWINGS: dict[str, Drawing] = {"engine": _draw_runtimes, "engine-networks": _draw_networks}
