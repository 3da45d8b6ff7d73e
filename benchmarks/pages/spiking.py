"""docs/results/spiking.md: spiking networks in integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from swincompress_pl.report.comparison.bench import ENGINE

from ..primesvt.subjects import BINARY
from ..spiking import report
from ..spiking.speed import PRUNED
from . import counting
from .races import median_ms, on_threads, result, times
from .sources import Sources, result_of
from .text import command, cpu, document, picture, places, table
from .theme import Drawing, Theme, behind, canvas

TITLES = {
    "spikformer": "Spikformer",
    "sdt": "Spike-driven Transformer",
    "qkformer": "QKFormer",
    "maxformer": "Max-Former",
    "meta_spikeformer": "Meta-SpikeFormer",
}
_NETWORKS = (
    "spikformer_cifar10", "spikformer_ti", "spikformer_s", "sdt_8_384", "qkformer_10_384", "maxformer_10_384",
    "maxformer_cifar", "meta_spikeformer_8_256",
)  # fmt: skip
_PEERS = ("torch fp32", "onnxruntime fp32")
_STEPS = 4


def page(sources: Sources) -> str:
    """The whole page."""
    results = sources.spiking
    return document(
        [
            "# Spiking networks in integers",
            picture("spiking", "torch and onnxruntime relative to the engine on eight spiking networks, one thread"),
            "## Speed at full size",
            *_speed(results),
            "## Accuracy of small trained networks",
            networks(sources),
            *_accuracy(results),
            *counting.section(sources),
            *report.sections(results),
        ]
    )


def percent(state: Mapping[str, Any]) -> float:
    """Top-1 on the test images."""
    return float(state["test"]["percent"])


def int8_percent(results: Mapping[str, Any], network: str, bits: str = "W8A8", *, tuned: bool = False) -> float:
    """Of a small trained network in integers."""
    return percent(result_of(results, f"{network}-{bits}{'-tuned' if tuned else ''}")["integer"])


def _entries(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: result_of(results, f"speed-{name}-{_STEPS}") for name in _NETWORKS}


def races_on_one_thread(sources: Sources) -> list[Mapping[str, Any]]:
    """Of every network at full size."""
    return [on_threads(entry | {"model": name, "batch": 1}, 1) for name, entry in _entries(sources.spiking).items()]


def networks(sources: Sources) -> str:
    """What the small trained networks are, in a sentence or two."""
    costs = [result_of(sources.primesvt, f"{name}-control")["given"]["cost"]["parameters"] for name in BINARY]
    epochs = [subject.baseline_record()["subject"]["baseline"]["epochs"] for subject in BINARY.values()]
    return (
        f"Five small networks on CIFAR-10 (JPEG copy), T = 2, one seed. They have {min(costs) / 1e6:.1f} to "
        f"{max(costs) / 1e6:.1f} M parameters and are trained for {min(epochs)} to {max(epochs)} epochs on an NVIDIA "
        "H200."
    )


def _machine(entries: Mapping[str, dict[str, Any]]) -> str:
    return _one({cpu(entry["environment"]) for entry in entries.values()})


def _commits(entries: Mapping[str, dict[str, Any]]) -> str:
    commits = sorted({entry["commit"] for entry in entries.values()})
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def _speed(results: Mapping[str, Any]) -> list[str]:
    entries = _entries(results)
    rows = []
    for name, entry in entries.items():
        row = [name]
        for threads in (1, 2):
            race = on_threads(entry | {"model": name, "batch": 1}, threads)
            row += [_ms(median_ms(race, ENGINE))]
            row += [f"{_ms(median_ms(race, peer))} ({times(race, peer):.1f}x)" for peer in _PEERS]
        rows.append(row)
    header = [
        "network",
        *(f"{name}, {threads}" for threads in ("1 thread", "2 threads") for name in ("engine", *_PEERS)),
    ]
    first = next(iter(entries.values()))
    rounds = len(result(first["races"][0], ENGINE)["latency"]["samples_ms"])
    return [
        f"T = {_STEPS}, batch 1, fresh weights, statistics set by a training pass, random images, on 2 cores of an "
        f"{_machine(entries)}, "
        f"{_commits(entries)}. Cells are medians in ms. Brackets hold how "
        f"many times longer than the engine a runtime takes: the median of {rounds} interleaved rounds.",
        table(header, rows),
        command(f"python -m benchmarks.spiking speed --out runs/spiking --rounds {rounds}", "a quiet machine"),
        _sizes(entries),
        _pruned(entries),
    ]


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 30 else f"{value:.0f}"


def _sizes(entries: Mapping[str, dict[str, Any]]) -> str:
    shares = [100 * each["dense"]["file_bytes"] / (4 * each["dense"]["parameters"]) for each in entries.values()]
    memory = max(result(race, ENGINE)["peak_rss_bytes"] / 1e6 for entry in entries.values() for race in entry["races"])
    return (
        f"Files have {min(shares):.1f} to {max(shares):.1f} % of the float32 size. An engine's process takes at most "
        f"{memory:.0f} MB."
    )


def _pruned(entries: Mapping[str, dict[str, Any]]) -> str:
    """What pruning saves of the engine's time, and where it saves nothing."""
    left = {
        (name, race["threads"]): race["times_engine"][PRUNED]["median"]
        for name, entry in entries.items()
        for race in entry["races"]
    }
    slower = {key: value for key, value in left.items() if value >= 1}
    quicker = [value for value in left.values() if value < 1]
    removed = [100 * (1 - e["pruned"]["parameters"] / e["dense"]["parameters"]) for e in entries.values()]
    macs = [100 * (1 - e["pruned"]["macs"] / e["dense"]["macs"]) for e in entries.values()]
    exceptions = "".join(
        f" The exception is {name} on {threads} thread{'s' * (threads > 1)}: it takes {value:.2f} times its time, so "
        "pruning makes it slower."
        for (name, threads), value in slower.items()
    )
    return (
        f"Pruned by {min(removed):.0f} to {max(removed):.0f} % of the parameters ({min(macs):.0f} to {max(macs):.0f} % "
        f"of the MACs), the engine takes {100 * min(quicker):.0f} to {100 * max(quicker):.0f} % of its "
        f"time.{exceptions}"
    )


def _accuracy(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            TITLES[name],
            f"{percent(result_of(results, f'{name}-W8A8')['float']):.2f} %",
            f"{int8_percent(results, name):.2f} %",
            f"{percent(result_of(results, f'{name}-float-tuned')['integer']):.2f} %",
            *(f"{int8_percent(results, name, bits, tuned=True):.2f} %" for bits in ("W8A8", "W4A8")),
        ]
        for name in BINARY
    ]
    kinds = ("W8A8", "W8A8-tuned", "W4A8-tuned")
    measured = [result_of(results, f"{name}-{kind}") for name in BINARY for kind in kinds]
    tuned = result_of(results, f"{next(iter(BINARY))}-W8A8-tuned")
    epochs, device = tuned["epochs"], tuned["fitted_on"]
    header = ["network", "float", "W8A8, no training", "float control", "W8A8, fine-tuned", "W4A8, fine-tuned"]
    return [
        "W8A8 has 8-bit weights and activations, W4A8 4-bit weights. Scales are searched on 128 images. Every answer "
        "in integers is the C++ engine's, on 10,000 test images. The fine-tuned columns follow "
        f"{epochs} epochs of quantization-aware training on an {device}; the float control is fine-tuned for as many.",
        table(header, rows),
        f"The integers were measured on {places(measured)}.",
        command(
            "python -m benchmarks.spiking accuracy --out runs/spiking \\\n  --data DATA --cache CACHE\n"
            "python -m benchmarks.spiking accuracy --out runs/spiking \\\n  --data DATA --cache CACHE "
            "--bits float,W8A8,W4A8 --tuned",
            "a download",
        ),
        "What the same networks lose when they are pruned is on the page [PrimeSVT](primesvt.md).",
    ]


def _one(values: set[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"races on different machines: {sorted(values)}; say so on the page")
    return values.pop()


def _draw(sources: Sources, theme: Theme) -> Figure:
    figure = canvas(
        5.0, 5.4, theme=theme, title="Spiking networks: time relative to the engine",
        subtitle=(
            f"{_machine(_entries(sources.spiking))}, 1 thread.\nT = {_STEPS}, batch 1, fresh weights, random "
            "images. Right of the\nline the engine is quicker. Medians of all rounds."
        ),
    )  # fmt: skip
    axes = figure.subplots()
    races = races_on_one_thread(sources)
    for peer, color, shift in ((_PEERS[0], theme.others, -0.19), (_PEERS[1], theme.muted, 0.19)):
        values, places = [times(race, peer) for race in races], [place + shift for place in range(len(races))]
        axes.barh(places, values, height=0.36, color=color, label=peer)
        for place, value in zip(places, values, strict=True):
            behind(axes, value, place, f"{value:.1f}x", 9)
    axes.axvline(1, ymin=0.13, color=theme.ink, linewidth=1)
    axes.set_yticks(range(len(races)), list(_NETWORKS))
    axes.set_ylim(len(races) + 0.6, -0.5)
    axes.set_xlim(0, 9.5)
    axes.legend(loc="lower right", fontsize=10, ncols=2)
    return figure


DRAWINGS: dict[str, Drawing] = {"spiking": _draw}
