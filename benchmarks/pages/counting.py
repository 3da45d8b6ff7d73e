"""The part of docs/results/spiking.md about E-SpikeFormer, which is trained with integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swincompress_pl.report.comparison.bench import ENGINE

from ..spiking.speed import PRUNED
from .races import median_ms, on_threads, times
from .sources import Sources, result_of
from .text import command, cpu, table

_LARGE, _SMALL = "e_spikeformer_small", "e_spikeformer"
_PEERS = ("torch fp32", "onnxruntime fp32")
_IMPLEMENTATIONS = {
    "AMX": f"speed-{_LARGE}-1",
    "AVX-512 VNNI": f"speed-{_LARGE}-1-avx512_vnni",
    "AVX2, all held to it": f"speed-{_LARGE}-1-avx2",
}


def section(sources: Sources) -> list[str]:
    """Speed, accuracy, pruning and training of E-SpikeFormer."""
    results = sources.spiking
    return [
        "## E-SpikeFormer, trained with integers",
        "Neurons give counts of 0 to 4 spikes in one time step. The network of 5.1 M parameters at 224 pixels has "
        "fresh weights; onnxruntime and torch run it in one pass, too.",
        _speed(results),
        command(
            "python -m benchmarks.spiking speed --models e_spikeformer_small --out runs/spiking\n"
            "python -m benchmarks.spiking speed --models e_spikeformer_small --implementation avx512_vnni "
            "--out runs/spiking\n"
            "python -m benchmarks.spiking speed --models e_spikeformer_small --implementation avx2 --out runs/spiking",
            "a quiet machine",
        ),
        *_accuracy(sources),
        _pruned(sources.primesvt),
        _steps(results),
    ]


def _speed(results: Mapping[str, Any]) -> str:
    rows = []
    for title, key in _IMPLEMENTATIONS.items():
        entry = result_of(results, key)
        for threads in (1, 2):
            race = on_threads(entry | {"model": _LARGE, "batch": 1}, threads)
            cells = [f"{median_ms(race, peer):.0f} ({times(race, peer):.1f}x)" for peer in _PEERS]
            ours = [f"{median_ms(race, name):.1f}" for name in (ENGINE, PRUNED)]
            rows.append([title, str(threads), *ours, *cells])
    first = result_of(results, next(iter(_IMPLEMENTATIONS.values())))
    where, gone = cpu(first["environment"]), 1 - first["pruned"]["parameters"] / first["dense"]["parameters"]
    return (
        f"{table(['instructions', 'threads', *(f'{name}, ms' for name in (ENGINE, PRUNED, *_PEERS))], rows)}\n\n"
        f"On {where}; brackets hold how many times longer than the engine a runtime takes. The pruned network lacks "
        f"{100 * gone:.0f} % of the parameters."
    )


def _accuracy(sources: Sources) -> list[str]:
    results = sources.spiking
    given = result_of(results, f"{_SMALL}-W8A8")
    control = result_of(sources.primesvt, f"{_SMALL}-control")["tuned"]
    row = [
        _percent(given["float"]),
        *(_percent(result_of(results, f"{_SMALL}-{bits}")["integer"]) for bits in ("W8A8", "W4A8")),
    ]
    row += [_percent(control), _percent(result_of(results, f"{_SMALL}-W4A8-tuned")["integer"])]
    return [
        "A small one for CIFAR-10 (JPEG copy) has 0.6 M parameters. It was trained for 9 epochs on 2 CPU cores in "
        "bfloat16; the first three of them followed the schedule of a run of 12. Cells are top-1 on 10,000 test "
        f"images, in integers by the engine. Fine-tuning is {control['epochs']} epochs.",
        table(["float", "W8A8, no training", "W4A8, no training", "float control", "W4A8, fine-tuned"], [row]),
    ]


def _pruned(results: Mapping[str, Any]) -> str:
    entry = result_of(results, f"{_SMALL}-compensated-3.0")
    lost = entry["given"]["test"]["percent"] - entry["single_shot"]["test"]["percent"]
    search = entry["search"]
    held = search["baseline_score"] - search["applied"]["score"]
    integers = entry["single_shot"]["test"]["percent"] - entry["integer"]["test"]["percent"]
    saved = 100 * search["applied"]["saving"]
    return (
        f"PrimeSVT with compensation, single shot, without training, removes {saved:.1f} % of the parameters. It loses "
        f"{held:.2f} points on the images that decide, and {lost:.2f} on the 10,000 test images; the integers of what "
        f"is left {'lose' if integers > 0 else 'gain'} {abs(integers):.2f}."
    )


def _steps(results: Mapping[str, Any]) -> str:
    rows = []
    for key in sorted(results):
        if key.startswith("steps-"):
            entry = results[key]
            low, high = entry["times_float"]["quartiles"]
            cells = [f"{entry['step_ms'][kind]['median_ms']:.0f}" for kind in ("float", "quantized")]
            rows.append([entry["network"], *cells, f"{entry['times_float']['median']:.2f} [{low:.2f}, {high:.2f}]"])
    return (
        "A step of quantization-aware training beside a step of float training, batch 128, on the CPU, in turns:\n\n"
        + table(["network", "float, ms", "quantized, ms", "times float"], rows)
    )


def _percent(state: Mapping[str, Any]) -> str:
    return f"{state['test']['percent']:.2f} %"
