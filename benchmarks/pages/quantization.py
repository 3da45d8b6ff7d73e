"""docs/results/quantization.md: accuracy of the integers, and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..quantization import report
from ..quantization.jobs import BITS, FORMS, Job
from .sources import Sources, result_of
from .text import command, commit, cpu, document, picture, short_cpu, table
from .theme import Drawing, Theme, canvas

_DEIT = Job(network="deit_tiny")
_SWIN = Job(network="swin_cifar10")
_PRUNED = Job(network="swin_cifar10", pruned=True)
_TITLES = {_SWIN: "small Swin", _PRUNED: "small Swin, pruned", _DEIT: "DeiT-Tiny"}
_SECOND_ORDER, _FOR_THE_LOSS = "searched, second order", "searched, learned for the loss"
_COMMAND = "python -m benchmarks.quantization run --out runs/quantization --data DATA"
_COMPRESSED = (
    "The second size is that after lossless entropy coding: `swincompress export --compression lzma`. These files are "
    "from before plain files had sparse weights; [Files](#files) has the sizes of today. Python reads all of them, and "
    "so does the C++ library where liblzma and zlib are installed; elsewhere it refuses those that are coded."
)
_SIZES = "python -m benchmarks.quantization sizes --out runs/sizes --data DATA --reader build/cpp/read_artifacts"

_FEATURES = "python -m benchmarks.quantization features --out runs/features --data DATA"


def page(sources: Sources) -> str:
    """The whole page."""
    results = sources.quantization
    return document(
        [
            "# Quantization",
            picture("quantization", "Points of top-1 lost by widths, without training and after fine-tuning"),
            "## 8 bits, without training",
            "Scales are searched on 128 images; nothing is trained. Each row is paired, image by image, with the float "
            "network of the same weights. File sizes are parts of the float32 file of the whole network.",
            _eight_bits(results),
            command(_COMMAND, "a download"),
            _COMPRESSED,
            "Torch twin, NumPy reference and, with 8-bit activations, the C++ engine give identical integer logits. "
            f"{_checked_images(results)} images per network are compared in the same run.",
            "## Files",
            *_files(sources.sizes, results),
            *([] if sources.features is None else ["## Features", *_features(sources.features)]),
            "## 4 and 6 bits, without training",
            *_narrow(results),
            "## After fine-tuning",
            *_tuned(results),
            *report.sections(results),
        ]
    )


def _eight_bits(results: Mapping[str, Any]) -> str:
    rows = []
    for what, network in (
        ("DeiT-Tiny, {} ImageNet-mini images of `val` and {} of `train`", _DEIT),
        ("small Swin, {} CIFAR-10 (JPEG copy) test images", _SWIN),
        ("the same Swin with {zeros} of its weights pruned", _PRUNED),
    ):
        given = result_of(results, network.name)
        entry = _entry(results, network, "searched", "W8A8")
        images = [f"{entry['sets'][name]['images']:,}" for name in entry["sets"]]
        zeros = f"{100 * (1 - given['nonzero'] / given['parameters']):.0f} %"
        rows.append(
            [
                what.format(*images, zeros=zeros),
                f"{report.percent(given, list(entry['sets']))} %",
                f"{report.percent(entry, list(entry['sets']))} % ({_flips(entry)})",
                *_sizes(results, network, entry),
                _place(entry),
            ]
        )
    return table(["network and images", "float", "int8, integers throughout", "file", "LZMA file", "CPU, commit"], rows)


def _files(sizes: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in sizes["rows"]:
        job, forms = Job(**row["job"]), row["forms"]
        whole = result_of(results, Job(network=job.network).name)["file_bytes"]
        cells = [f"{100 * forms[form]['file_bytes'] / whole:.1f} %" for form in FORMS]
        for language in ("python_ms", "cpp_ms"):
            cells.append(" / ".join(f"{forms[form][language]:.1f}" for form in FORMS))
        zeros = 100 * (1 - row["nonzero"] / row["weights"])
        rows.append([_TITLES[Job(network=job.network)], str(job.bits), f"{zeros:.0f} %", *cells])
    header = ["network", "bits", "zeros", "packed", "plain file", "LZMA file", "load, ms: Python", "load, ms: C++"]
    return [
        "Scales are searched, nothing is trained. `packed` is what a plain file was before it had sparse weights: all "
        "weights in as many bits as they need. A plain file has a bitmap and the nonzeros of a weight where that is "
        "smaller, and every reader reads it. In the rows with more than 50 % zeros the smallest weights of each "
        "layer are masked, for their size alone. Sizes are parts of the float32 file of the whole network, and zeros a "
        "part of the integer weights.",
        "Load times are those of the three files in this order. The file is read, proved and made ready, with one "
        f"thread; each is the median of {sizes['rounds']} loads in turns. All give the same logits in Python and C++.",
        table(header, rows),
        f"{cpu(sizes['environment'])}, commit {commit(sizes['environment'])}.",
        command(_SIZES, "a download"),
    ]


def _features(figures: Mapping[str, Any]) -> list[str]:
    cosine, times = figures["cosine"], figures["jpeg_to_class"]
    rows = []
    for form in ("float", "integers"):
        shares = [figures[form][name] for name in ("nearest", "among_5")]
        rows.append([form, *(f"{share['top1_percent']:.2f} % ({share['correct']})" for share in shares)])
    paired = figures["paired"]
    return [
        f"DeiT-Tiny without its classifier, in 8 bits: the integers end at {figures['channels']} features. Those of "
        f"the {figures['images']} ImageNet-mini images of `val` are looked up among those of `train`, which has one "
        f"image for each of {figures['gallery']} classes, by their cosine. Scales are searched on "
        f"{figures['calibration_images']} images of `train`.",
        table(["features", "class of the nearest", "class among the nearest five"], rows),
        f"The cosine between float and integer features is {cosine['mean']:.4f} on average and {cosine['least']:.4f} "
        f"at least. {paired['right_to_wrong']} images change from right to wrong, {paired['wrong_to_right']} back. "
        f"Engine, reference and torch twin give the same integers on {figures['checked_images']} images.",
        "From a JPEG to its class, in a process without torch and with one thread: "
        f"{times['import_ms']:.0f} ms for imports, {times['load_ms']:.0f} ms to load DeiT-Tiny, "
        f"{times['first_ms']:.0f} ms for the first picture and {times['picture_ms']:.1f} ms for each further one. The "
        f"command `swincompress classify` takes {times['command_ms']:.0f} ms for one picture. Medians of "
        f"{times['processes']} processes.",
        f"{cpu(figures['environment'])}, commit {commit(figures['environment'])}.",
        command(_FEATURES, "a download"),
    ]


def _narrow(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for network, bits, way in (
        (_SWIN, "W4A8", _SECOND_ORDER),
        (_PRUNED, "W4A8", _SECOND_ORDER),
        (_DEIT, "W4A8", _FOR_THE_LOSS),
        (_DEIT, "W6A6", "searched, learned"),
    ):
        entry, given = _entry(results, network, way, bits), result_of(results, network.name)
        names = list(entry["sets"])
        rows.append(
            [
                _TITLES[network],
                bits,
                way,
                f"{report.percent(given, names)} %",
                f"{report.percent(entry, names)} %",
                _lost(entry),
                *_sizes(results, network, entry),
                _place(entry),
            ]
        )
    learned = _entry(results, _DEIT, _FOR_THE_LOSS, "W4A8")
    header = [
        "network",
        "bits",
        "method",
        "float",
        "integers",
        "points lost (95 %)",
        "file",
        "LZMA file",
        "machine, commit",
    ]
    return [
        "W4A8 has 4-bit weights and 8-bit activations; W6A6 has 6 bits for both. The images are those of the table "
        "above.",
        table(header, rows),
        f"Learning the rounding of DeiT-Tiny for the loss takes {learned['quantize_seconds'] / 60:.0f} minutes on an "
        f"{learned['place']['device']}. It also looks at images of `train` that are neither calibrated on nor "
        "reported.",
    ]


def _tuned(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for network in (_SWIN, _PRUNED, _DEIT):
        control = result_of(results, _of(network, None, None, tuned=True).name)
        names = list(control["sets"])
        row = [_TITLES[network], str(control["recipe"]["epochs"]), f"{report.percent(control, names)} %"]
        for bits in ("W8A8", "W4A8"):
            entry = _entry(results, network, "searched", bits, tuned=True)
            row.append(f"{report.percent(entry, names)} % ({_lost(entry)})")
        rows.append(row)
    control = result_of(results, _of(_DEIT, None, None, tuned=True).name)
    entry = _entry(results, _DEIT, _SECOND_ORDER, "W4A8", tuned=True)
    return [
        "Quantization-aware fine-tuning with distillation, against a float control that is fine-tuned by the same "
        f"recipe with the same teacher. Trained on an {control['place']['device']}, commit "
        f"{control['environment']['commit']}. Brackets hold the points lost against the control and their 95 % "
        "interval; below 0 is a gain.",
        table(["network", "epochs", "float control", "W8A8", "W4A8"], rows),
        f"DeiT-Tiny has few images: 600 to train on, after {control['recipe']['holdout']} of 1,000 are held out, and "
        f"{control['sets']['test']['images']} of `val` to test on. At W4A8 it stays "
        f"{_points(_entry(results, _DEIT, 'searched', 'W4A8', tuned=True)):.1f} points below its control. When it "
        f"starts from second-order rounding, it stays {_points(entry):.1f} points below.",
    ]


def _of(network: Job, way: str | None, bits: str | None, *, tuned: bool = False) -> Job:
    return Job(network=network.network, pruned=network.pruned, way=way, bits=bits, tuned=tuned)


def _entry(results: Mapping[str, Any], network: Job, way: str, bits: str, *, tuned: bool = False) -> dict[str, Any]:
    return dict(result_of(results, _of(network, way, bits, tuned=tuned).name))


def _sizes(results: Mapping[str, Any], network: Job, entry: Mapping[str, Any]) -> list[str]:
    """Of the plain and of the coded file, against the float32 file of the whole network."""
    whole = result_of(results, Job(network=network.network).name)["file_bytes"]
    return [f"{100 * entry[key] / whole:.1f} %" for key in ("file_bytes", "compressed_file_bytes")]


def _flips(entry: Mapping[str, Any]) -> str:
    pairs = report.paired_counts(entry, list(entry["sets"]))
    return f"{pairs.right_to_wrong} right -> wrong, {pairs.wrong_to_right} wrong -> right"


def _points(entry: Mapping[str, Any]) -> float:
    return -report.paired_counts(entry, list(entry["sets"])).change_points + 0.0


def _lost(entry: Mapping[str, Any]) -> str:
    low, high = report.paired_counts(entry, list(entry["sets"])).interval_points
    return f"{_points(entry):.2f}, {-high:.2f} .. {-low:.2f}"


def _place(entry: Mapping[str, Any]) -> str:
    device = entry.get("place", {}).get("device", "cpu")
    gpu = "" if device == "cpu" else f"{device} and "
    return f"{gpu}{short_cpu(entry['environment'])}, {commit(entry['environment'])}"


def _checked_images(results: Mapping[str, Any]) -> str:
    compared = [entry["equal"] for entry in results.values() if entry.get("equal")]
    if not all(all(equal.values()) for equal in compared):
        raise ValueError("in some rows the integers differ; say so on the page")
    checked = {equal["images"] for equal in compared}
    if len(checked) != 1:
        raise ValueError(f"different numbers of images were compared: {sorted(checked)}; say so on the page")
    return str(checked.pop())


def _draw(sources: Sources, theme: Theme) -> Figure:
    """A panel per network, a row per width: points lost with their interval."""
    figure = canvas(
        5.0, 6.2, theme=theme, title="Points of top-1 lost in integers",
        subtitle=(
            "Against the float network image by image, 95 % interval.\nScales searched on 128 images; fine-tuned rows "
            "against a float\ncontrol after the same epochs."
        ),
    )  # fmt: skip
    panels = figure.subplots(3, 1, gridspec_kw={"hspace": 0.1})
    for axes, network in zip(panels, (_SWIN, _PRUNED, _DEIT), strict=True):
        for tuned, color, shift in ((False, theme.ours, -0.17), (True, theme.second, 0.17)):
            entries = [_entry(sources.quantization, network, "searched", bits, tuned=tuned) for bits in BITS]
            _whiskers(axes, entries, color, shift, "after fine-tuning" if tuned else "without training")
        axes.axvline(0, color=theme.ink, linewidth=1, zorder=0)
        axes.set_yticks(range(len(BITS)), BITS)
        axes.set_ylim(len(BITS) - 0.5, -0.5)
        axes.set_title(_title(sources.quantization, network), fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
    panels[0].legend(loc="upper right", fontsize=9.5)
    panels[0].set_xlim(-0.5, 1.6)
    panels[1].set_xlim(-0.5, 1.6)
    panels[-1].set_xlabel("points lost (mind the wider scale)")
    return figure


def _title(results: Mapping[str, Any], network: Job) -> str:
    images = [f"{found['images']:,}" for found in _entry(results, network, "searched", "W8A8")["sets"].values()]
    tuned = len(_entry(results, network, "searched", "W8A8", tuned=True)["sets"])
    fewer = f" (fine-tuned: {images[0]})" if tuned < len(images) else ""
    return f"{_TITLES[network]}, {' + '.join(images)} images{fewer}"


def _whiskers(axes: Any, entries: Sequence[Mapping[str, Any]], color: str, shift: float, label: str) -> None:
    points = [_points(entry) for entry in entries]
    ends = [report.paired_counts(entry, list(entry["sets"])).interval_points for entry in entries]
    below = [lost + high for lost, (_, high) in zip(points, ends, strict=True)]
    above = [-low - lost for lost, (low, _) in zip(points, ends, strict=True)]
    places = [place + shift for place in range(len(entries))]
    axes.errorbar(points, places, xerr=[below, above], fmt="o", color=color, markersize=5, linewidth=1.6, label=label)


DRAWINGS: dict[str, Drawing] = {"quantization": _draw}
