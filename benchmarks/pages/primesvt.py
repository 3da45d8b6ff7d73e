"""docs/results/primesvt.md: single-shot pruning of spiking networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from swincompress_pl.pruning.prime.config import current_settings

from ..primesvt import report
from ..primesvt.subjects import BINARY
from .sources import Sources, result_of
from .spiking import TITLES, int8_percent, networks, percent
from .text import command, details, document, picture, places, table
from .theme import Drawing, Theme, behind, canvas

_DEFAULT, _PAPER, _CORRECTED = "allocated-3.0", "paper", "allocated-batchnorm"
COMPENSATED = "compensated-3.0"
_WITHIN = 1.0  # points below the control after fine-tuning
_CLOSE = 0.4
_PAPERS_SAVING = 0.2668
_PLOTS = {
    "accuracy_memory": "accuracy against memory, every candidate",
    "robustness": "robustness of the blocks and their rates",
    "spike_rates": "spike rates before and after",
}


def page(sources: Sources) -> str:
    """The whole page."""
    results = sources.primesvt
    return document(
        [
            "# PrimeSVT",
            picture("primesvt", "Parameters saved in a single shot on five spiking networks"),
            networks(sources),
            "## In a single shot",
            *_single_shot(sources),
            "## After fine-tuning",
            *_fine_tuned(sources),
            command(
                "python -m benchmarks.primesvt run --out runs/primesvt/results \\\n  --data DATA --cache CACHE\n"
                "python -m benchmarks.spiking accuracy --out runs/spiking \\\n  --data DATA --cache CACHE",
                "a download",
            ),
            *report.sections(results),
            "## Plots of the searches",
            "Those of the job `group` of each network.",
            *(_plots(subject) for subject in BINARY),
        ]
    )


def _single_shot(sources: Sources) -> list[str]:
    results = sources.primesvt
    rows = [
        [
            TITLES[name],
            f"{percent(result_of(sources.spiking, f'{name}-W8A8')['float']):.2f} %",
            _shot(result_of(results, f"{name}-{COMPENSATED}")),
            _shot(result_of(results, f"{name}-{_DEFAULT}")),
            _shot(result_of(results, f"{name}-{_PAPER}")),
            f"{int8_percent(sources.spiking, name):.2f} %",
        ]
        for name in BINARY
    ]
    shots = [result_of(results, f"{name}-{job}") for name in BINARY for job in (COMPENSATED, _DEFAULT, _PAPER)]
    header = [
        "network", "float", "removed, the rest solved again", "removed, defaults", "zeros, the paper's policy",
        "int8, unpruned",
    ]  # fmt: skip
    return [
        "The search may lose at most 3 points on 5,000 held-out images; nothing is trained. Cells hold what is saved, "
        "then top-1 and the points lost on 10,000 test images. `removed` is gone physically. Where the rest is solved "
        "again, `compensation` does it as [below](#how-it-was-measured), and half of the held-out images audit. The "
        "defaults are those of PrimeSVT (`round_to=4`). `zeros` follow the paper's policy "
        '(`granularity="filter", policy="prioritized", blocks="block"`). `int8` has scales that are searched on 128 '
        "images, without training; every answer is the C++ engine's.",
        table(header, rows),
        f"The pruned networks were measured on {places(shots)}; [Spiking networks in integers](spiking.md) says where "
        "the integers were.",
        _corrected(results),
    ]


def _shot(entry: Mapping[str, Any]) -> str:
    reached = percent(entry["single_shot"])
    lost = percent(entry["given"]) - reached
    return f"{100 * entry['search']['applied']['saving']:.1f} %: {reached:.2f} ({lost:.1f} lost)"


def _corrected(results: Mapping[str, Any]) -> str:
    """What the same points buy where batch normalization is corrected while searching."""
    found = {name: results[f"{name}-{_CORRECTED}"] for name in BINARY if f"{name}-{_CORRECTED}" in results}
    missing = [TITLES[name] for name in BINARY if name not in found]
    parts = []
    for name, entry in found.items():
        tuned = f"; {percent(entry['tuned']):.2f} % after fine-tuning" if "tuned" in entry else ""
        saved, reached = 100 * entry["search"]["applied"]["saving"], percent(entry["single_shot"])
        parts.append(f"- {saved:.1f} % of {TITLES[name]} ({reached:.2f} %{tuned})")
    rest = f"\n\nOn {' and '.join(missing)} this has not been measured." if missing else ""
    return 'With `batchnorm="correct"`, the same 3 points buy more:\n\n' + "\n".join(parts) + rest


def _fine_tuned(sources: Sources) -> list[str]:
    results, spiking = sources.primesvt, sources.spiking
    rows = [
        [
            TITLES[name],
            f"{percent(result_of(results, f'{name}-control')['tuned']):.2f} %",
            _largest(results, name, "structured"),
            _largest(results, name, "filter"),
            f"{int8_percent(spiking, name, tuned=True):.2f} %",
            f"{int8_percent(spiking, name, 'W4A8', tuned=True):.2f} %",
        ]
        for name in BINARY
    ]
    epochs = result_of(results, f"{next(iter(BINARY))}-control")["tuned"]["epochs"]
    header = [
        "network", "control", 'removed (`"structured"`)', 'zeros (`"filter"`)', "int8, unpruned", "4-bit weights, "
        "unpruned",
    ]  # fmt: skip
    return [
        f"After {epochs} epochs of fine-tuning, beside a float control of as many. For each granularity, the cell "
        f"holds the largest saving that was measured within {_WITHIN:g} point of the control, and its top-1. Where the "
        "defaults of PrimeSVT were fine-tuned too, brackets hold them. The integers come from quantization-aware "
        "training.",
        table(header, rows),
        _beyond(results),
        _close(results),
    ]


def _tuned(results: Mapping[str, Any], subject: str, granularity: str) -> dict[str, Mapping[str, Any]]:
    """{job: results} of a network that were pruned in a granularity and fine-tuned, with the first seed."""
    found = {}
    for key, entry in results.items():
        if entry.get("job", {}).get("subject") != subject or "tuned" not in entry or not entry.get("search"):
            continue
        search = entry["search"]
        if search["applied"] and current_settings(search["config"])["granularity"] == granularity:
            found[key.removeprefix(f"{subject}-")] = entry
    return found


def _lost(results: Mapping[str, Any], subject: str, entry: Mapping[str, Any]) -> float:
    return percent(result_of(results, f"{subject}-control")["tuned"]) - percent(entry["tuned"])


def _best(results: Mapping[str, Any], subject: str, granularity: str, within: float) -> tuple[str, Mapping[str, Any]]:
    """The job with the largest saving within some points of the control."""
    # Thousands of images make 1 point 0.9999999999999996 or 1.0000000000000004.
    found = {
        name: entry
        for name, entry in _tuned(results, subject, granularity).items()
        if _lost(results, subject, entry) <= within + 1e-9
    }
    if not found:
        raise ValueError(f"{subject}, {granularity}: no fine-tuned job is within {within:g} points of its control")
    return max(found.items(), key=lambda item: float(item[1]["search"]["applied"]["saving"]))


def _largest(results: Mapping[str, Any], subject: str, granularity: str) -> str:
    name, entry = _best(results, subject, granularity, _WITHIN)
    default = _tuned(results, subject, granularity).get(_DEFAULT)
    other = f" ({_saved(default)})" if default is not None and name != _DEFAULT else ""
    return f"{_saved(entry)}{other}"


def _saved(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['search']['applied']['saving']:.1f} %: {percent(entry['tuned']):.2f}"


def _beyond(results: Mapping[str, Any]) -> str:
    """What is just outside the bar."""
    entry = result_of(results, "maxformer-allocated-6.0")
    return (
        f"With {100 * entry['search']['applied']['saving']:.1f} % removed, Max-Former has "
        f"{percent(entry['tuned']):.2f} %, {_lost(results, 'maxformer', entry):.2f} points below its control."
    )


def _close(results: Mapping[str, Any]) -> str:
    """The zeros within a tighter bar, where they are fewer than within the wider one."""
    parts = []
    for subject in BINARY:
        name, entry = _best(results, subject, "filter", _CLOSE)
        if name == _best(results, subject, "filter", _WITHIN)[0]:
            continue
        again, control = results.get(f"{subject}-{name}-seed1"), results.get(f"{subject}-control-seed1")
        seed = (
            f"; with another seed {percent(again['tuned']):.2f} %, its control {percent(control['tuned']):.2f} %"
            if again and control
            else ""
        )
        saved = 100 * entry["search"]["applied"]["saving"]
        parts.append(f"{saved:.1f} % of {TITLES[subject]} ({percent(entry['tuned']):.2f} %{seed})")
    return f'Within {_CLOSE:g} points of the control, `granularity="filter"` zeros {" and ".join(parts)}.'


def _plots(subject: str) -> str:
    pictures = [
        f"![{TITLES[subject]}: {title}](primesvt/{subject}/primesvt-{name}.png)" for name, title in _PLOTS.items()
    ]
    return details(TITLES[subject], pictures)


def _draw(sources: Sources, theme: Theme) -> Figure:
    """Three bars per network: removed with compensation, removed by the defaults, zeros by the paper's policy."""
    figure = canvas(
        5.0, 5.6, theme=theme, title="Parameters saved in a single shot",
        subtitle=(
            "Five small spiking networks on CIFAR-10, T = 2, no training.\nAt most 3 points lost on the hold-out; "
            "labels: points lost on\n10,000 test images. Line: the paper's saving."
        ),
    )  # fmt: skip
    axes = figure.subplots()
    bars = (
        (COMPENSATED, theme.ours, -0.27, "removed, the rest solved again"),
        (_DEFAULT, theme.second, 0.0, "removed, defaults"),
        (_PAPER, theme.others, 0.27, "zeros, the paper's policy"),
    )
    for job, color, shift, label in bars:
        entries = [result_of(sources.primesvt, f"{name}-{job}") for name in BINARY]
        values = [100 * entry["search"]["applied"]["saving"] for entry in entries]
        places = [place + shift for place in range(len(entries))]
        axes.barh(places, values, height=0.25, color=color, label=label)
        for place, value, entry in zip(places, values, entries, strict=True):
            lost = percent(entry["given"]) - percent(entry["single_shot"])
            behind(axes, value, place, f"{value:.1f} %, {lost:.1f} lost", 9)
    axes.axvline(100 * _PAPERS_SAVING, ymin=0.12, color=theme.ink, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(BINARY)), [TITLES[name].replace("Spike-driven ", "Spike-driven\n") for name in BINARY])
    axes.set_ylim(len(BINARY) - 0.5 + 0.9, -0.5)
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 20, 40, 60, 80], ["0", "20 %", "40 %", "60 %", "80 %"])
    axes.legend(loc="lower right", fontsize=9, ncols=2, columnspacing=1)
    return figure


DRAWINGS: dict[str, Drawing] = {"primesvt": _draw}
