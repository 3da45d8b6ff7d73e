"""docs/results/index.md: one headline per subject."""

from __future__ import annotations

from swincompress_pl.report.comparison.bench import ENGINE

from ..engine.report import rounds
from ..quantization.jobs import Job
from ..quantization.report import percent as top1
from .compensation import headline as compensation_headline
from .headline import MODEL
from .primesvt import COMPENSATED
from .pruning import headline as pruning_headline
from .races import median_ms, on_threads, result, times
from .sources import Sources, result_of
from .spiking import TITLES, percent, races_on_one_thread
from .text import cpu, document


def page(sources: Sources) -> str:
    """The whole page."""
    rows = [
        _engine(sources), _quantization(sources), pruning_headline(sources), compensation_headline(sources),
        _primesvt(sources), _spiking(sources),
    ]  # fmt: skip
    return document(
        [
            "# Results",
            "What the package gives, measured with `benchmarks/` in its repository. Every page begins with a plot and "
            "ends with all tables. It names the commands, the machines and the commits.",
            "\n".join(f"- **{subject}.** {text} *{condition}.*" for subject, text, condition in rows),
            "## What is not measured",
            "`configs/swin_tiny_imagenet.yaml` is the recipe for all of ImageNet. It has not been run to its end.",
            "## How the pages are made",
            "`python -m benchmarks.pages` writes them from the JSON in `benchmarks/results`: figures are not typed in. "
            "A test compares the committed pages with what the command writes. `benchmarks/README.md` says how each "
            "benchmark is run, and [Repeat a figure](../how-to/repeat_a_figure.md) how one figure is measured again.",
        ]
    )


def _engine(sources: Sources) -> list[str]:
    figures = sources.race(MODEL, 1)
    race = on_threads(figures, 2)
    memory = result(race, ENGINE)["peak_rss_bytes"] / 1e6
    return [
        "[The engine against other runtimes](engine.md)",
        f"Swin-T takes {median_ms(race, ENGINE):.1f} ms. OpenVINO int8 takes {times(race, 'openvino int8 (nncf)'):.2f} "
        f"times as long, onnxruntime fp32 {times(race, 'onnxruntime fp32'):.1f}, torch fp32 "
        f"{times(race, 'torch fp32'):.1f}. Peak memory is {memory:.0f} MB.",
        f"{cpu(figures['environment'])}, 2 threads, 224 x 224, batch 1, random weights, {rounds(figures)} rounds",
    ]


def _quantization(sources: Sources) -> list[str]:
    job = Job(network="swin_cifar10")
    given = result_of(sources.quantization, job.name)
    entry = result_of(sources.quantization, Job(network="swin_cifar10", way="searched", bits="W8A8").name)
    names = list(entry["sets"])
    size = 100 * entry["file_bytes"] / given["file_bytes"]
    return [
        "[Quantization](quantization.md)",
        f"A small Swin has {top1(entry, names)} % in integers throughout, {top1(given, names)} % in floats. Its file "
        f"has {size:.1f} % of the float32 size.",
        f"W8A8 without training, {entry['sets'][names[0]]['images']:,} CIFAR-10 (JPEG copy) test images",
    ]


def _primesvt(sources: Sources) -> list[str]:
    told = []
    for job in (COMPENSATED, "allocated-3.0"):
        shots = [result_of(sources.primesvt, f"{name}-{job}") for name in TITLES]
        saved = [100 * shot["search"]["applied"]["saving"] for shot in shots]
        lost = [percent(shot["given"]) - percent(shot["single_shot"]) for shot in shots]
        told.append((f"{min(saved):.1f} to {max(saved):.1f} %", f"{min(lost):.1f} to {max(lost):.1f}"))
    (with_it, lost_with_it), (without, lost_without) = told
    return [
        "[PrimeSVT](primesvt.md)",
        f"{with_it} of the parameters are removed in a single shot where what is left is solved again; {lost_with_it} "
        f"points of top-1 are lost. By the defaults it is {without}, and {lost_without} points.",
        "Five small spiking networks, CIFAR-10 (JPEG copy), T = 2, a tolerance of 3 points on the hold-out, 10,000 "
        "test images, no training",
    ]


def _spiking(sources: Sources) -> list[str]:
    races = races_on_one_thread(sources)
    peers = {name: [times(race, f"{name} fp32") for race in races] for name in ("torch", "onnxruntime")}
    return [
        "[Spiking networks in integers](spiking.md)",
        " ".join(f"{name} takes {min(found):.1f} to {max(found):.1f} times as long as the engine."
                 for name, found in peers.items()),
        "Eight spiking networks at full size, T = 4, batch 1, 1 thread, Intel Xeon (Sapphire Rapids, AVX-512 VNNI, no "
        "AMX), fresh weights",
    ]  # fmt: skip
