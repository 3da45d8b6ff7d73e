"""docs/results/interop.md: networks as ONNX in other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from swincompress_pl.report.comparison.bench import ENGINE

from .sources import Sources, result_of
from .text import command, cpu, document, picture, short_cpu, table
from .theme import Drawing, Theme, canvas, long_bars

_NAMES = {"swin_cifar10": "Swin, CIFAR-10", "deit_tiny": "DeiT-Tiny, ImageNet-mini"}
_EXACT = (
    "onnxruntime, 1 thread", "onnxruntime, 2 threads", "onnxruntime, GatherElements", "onnx's evaluator", "openvino",
)  # fmt: skip


def page(sources: Sources) -> str:
    """The whole page."""
    results = sources.interop
    of = {
        kind: [entry for entry in results.values() if entry["kind"] == kind]
        for kind in ("forms", "answers", "without-vnni", "speed")
    }
    parts = [
        "# Other runtimes",
        picture("interop", "DeiT-Tiny as ONNX in onnxruntime and OpenVINO, time relative to the engine"),
        "Networks as ONNX ([Other runtimes](../how-to/other_runtimes.md) says what the forms are), in onnxruntime and "
        "OpenVINO with their default settings, OpenVINO in fp32.",
        "## Which forms a network has",
        *_forms(of["forms"]),
    ]
    if of["answers"]:
        parts += ["## Trained networks on real images", *_answers(of["answers"])]
    if of["without-vnni"]:
        parts += ["## Without VNNI", *_without_vnni(of["without-vnni"])]
    if of["speed"]:
        parts += ["## Speed", *_speed(of["speed"])]
    parts += [
        "## How to repeat it",
        command(
            "python -m benchmarks.interop run --data DATA --cache CACHE --out runs/interop\n"
            "python -m benchmarks.interop report --out runs/interop",
            "images, and for speed a quiet machine",
        ),
        "\n".join(f"- {line}" for line in sorted({_where(entry) for entry in results.values()})),
    ]
    return document(parts)


def _where(entry: Mapping[str, Any]) -> str:
    environment = entry["environment"]
    packages = {**environment["packages"], "onnx": environment["onnx"]}
    versions = ", ".join(f"{name} {packages[name]}" for name in ("onnx", "onnxruntime", "openvino", "torch"))
    return f"{entry['kind']}: commit {entry['commit']}, {cpu(environment)}, {environment['cores']} cores, {versions}"


def _yes(found: bool | None) -> str:
    return "not run" if found is None else "yes" if found else "no"


def _forms(entries: list[Mapping[str, Any]]) -> list[str]:
    rows = []
    for entry in entries:
        qdq = entry["qdq"]
        near = ["refused", ""] if "refused" in qdq else [f"{qdq[name]:.4f}" for name in ("onnxruntime", "openvino")]
        rows.append(
            [
                entry["network"],
                "x".join(map(str, entry["input"])),
                str(entry["operators"]),
                *(_yes(entry["exact"].get(name)) for name in _EXACT),
                *near,
            ]
        )
    header = ["network", "input", "operators", *(f"exact: {name}" for name in _EXACT), "qdq: onnxruntime", "openvino"]
    exact = sum(all(entry["exact"][name] for name in _EXACT[:3]) for entry in entries)
    return [
        f"Integers are compared with the specification's on 4 images of noise; in onnxruntime {exact} of "
        f"{len(entries)} networks are exact. The evaluator of onnx was run on one image, and not at 224 pixels, where "
        "it takes minutes. Every file passes onnx's full check and strict shape inference. Of the conventional form "
        "(qdq), the lowest correlation of an image's logits with the engine's is given; networks that are not trained "
        "have answers that say little more. Spikes in time steps have no such form, and counts of spikes have one.",
        table(header, rows),
        "OpenVINO computes the exact form's float64 in float32. Swin and ViT need more bits, so their answers are "
        "wrong there; the numbers of these spiking networks fit.",
    ]


def _answers(entries: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            _NAMES[entry["network"]],
            label,
            f"{percent:.2f}",
            f"{percent - entry['percent']['float']:+.2f}",
            f"{entry['agreement'][label]:.2%}",
        ]
        for entry in entries
        for label, percent in entry["percent"].items()
    ]
    exact = "; ".join(
        f"{_NAMES[entry['network']]}: {entry['exact_wrong']} of {entry['exact_images']:,} images differ"
        for entry in entries
    )
    sizes = "; ".join(
        f"{_NAMES[entry['network']]}: " + ", ".join(f"{form} {size / 1e6:.2f} MB" for form, size in
        entry["file_bytes"].items()) for entry in entries
    )  # fmt: skip
    images = ", ".join(f"{entry['images']:,} test images of {_NAMES[entry['network']]}" for entry in entries)
    return [
        f"The exact form in onnxruntime, all integer logits compared with the engine's: {exact}.",
        f"Accuracy on {images}. The networks are quantized without training, by the searched scales.",
        table(["network", "form", "top-1, %", "against float, points", "same class as the engine"], rows),
        f"Files: {sizes}.",
    ]


def _without_vnni(entries: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        [_NAMES[entry["network"]], name, f"{percent:.2f}", f"{entry['agreement'][name]:.2%}"]
        for entry in entries
        for name, percent in entry["percent"].items()
    ]
    exact = "; ".join(f"{entry['exact_wrong']} of {entry['images']:,} images differ" for entry in entries)
    return [
        "onnxruntime on a CPU with AVX2 and without VNNI, which qemu's user mode emulates. Products of uint8 by int8 "
        f"saturate there. Integers of the exact form against the engine's: {exact}.",
        table(["network", "form", "top-1, %", "same class as the engine"], rows),
    ]


def _speed(entries: list[Mapping[str, Any]]) -> list[str]:
    rows, kinds = [], []
    for entry in entries:
        for result in entry["results"]:
            times = entry["times_engine"].get(result["name"])
            latency = result["latency"]
            low, high = latency["quartiles_ms"]
            ratio = (
                "1"
                if times is None
                else f"{times['median']:.2f} [{times['quartiles'][0]:.2f}, {times['quartiles'][1]:.2f}]"
            )
            rows.append(
                [
                    _NAMES[entry["network"]],
                    result["name"],
                    f"{latency['median_ms']:.2f} [{low:.2f}, {high:.2f}]",
                    ratio,
                    f"{result['load_ms']:.0f}",
                    f"{result['peak_rss_bytes'] / 1e6:.0f}",
                ]
            )
        ours, theirs = entry["by_kind"]["engine"], entry["by_kind"]["onnxruntime"]
        for kind, ms in sorted(theirs.items(), key=lambda item: -item[1]):
            kinds.append([_NAMES[entry["network"]], kind, f"{ours.get(kind, 0.0):.3f}", f"{ms:.3f}"])
    return [
        "Batch 1, 1 thread, each runtime in a process of its own, in turns; medians and quartiles.",
        table(["network", "form", "ms", "times engine", "load ms", "peak RSS, MB"], rows),
        "Where the time of the exact form (with `GatherElements`) goes, beside the engine's. A kind of the engine that "
        "runs with the layer before it has no time of its own.",
        table(["network", "operation", "engine, ms", "onnxruntime, ms"], kinds),
    ]


def _draw(sources: Sources, theme: Theme) -> Figure:
    entry = result_of(sources.interop, "speed-deit_tiny")
    times = {ENGINE: 1.0} | {name: value["median"] for name, value in entry["times_engine"].items()}
    names = sorted(times, key=times.__getitem__)
    figure = canvas(
        6.0, 3.3, theme=theme, title="DeiT-Tiny as ONNX: time relative to the engine",
        subtitle=f"{short_cpu(entry['environment'])}, 1 thread, batch 1, medians.\nThe exact form gives the engine's "
        "integers; qdq is near them.",
    )  # fmt: skip
    colors = [theme.ours if name == ENGINE else theme.muted if "exact" in name else theme.others for name in names]
    labels = [f"{times[name]:.1f}x" for name in names]
    long_bars(figure.subplots(), names, [times[name] for name in names], labels, colors, room=0.12)
    return figure


DRAWINGS: dict[str, Drawing] = {"interop": _draw}
