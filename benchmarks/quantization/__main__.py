"""Quantization measured: accuracy of the integers, sizes, time and memory, on trained networks.

    python -m benchmarks.quantization list --out runs/quantization
    python -m benchmarks.quantization run --out runs/quantization --data DATA [--filter 'swin_cifar10-whole-W8A8-*']
    python -m benchmarks.quantization cost --model swin_tiny_patch4_window7_224
    python -m benchmarks.quantization report --out runs/quantization

DATA: as in benchmarks/pruning/images.py. A job is one file of results; `run` skips what is there.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.pruning.jobs import chosen
from benchmarks.pruning.subjects import Place
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize
from swincompress_pl.report import describe_environment
from swincompress_pl.report.record import write_text

from .jobs import all_jobs
from .report import write
from .work import CALIBRATION_IMAGES, do

_VALIDATED_IMAGES = 32
_VALIDATION_TURNS = 7
RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder of the results")
        if name == "run":
            command.add_argument("--data", type=Path, required=True)
            command.add_argument("--cache", type=Path, help="folder of decoded images; default: OUT/cache")
            command.add_argument("--precision", default="32-true", help="of the Trainer where a job fine-tunes")
        if name != "report":
            command.add_argument("--filter", nargs="*", default=[], help="patterns of names (fnmatch)")
    cost = commands.add_parser("cost", help="time and memory of quantizing with random weights and images")
    cost.add_argument("--model", required=True)
    cost.add_argument("--out", type=Path, help="folder of the results; default: it is printed only")
    given = parser.parse_args()
    if given.command == "cost":
        found = json.dumps(_cost(given.model))
        print(found)
        if given.out is not None:
            write_text(given.out / f"cost-{given.model}.json", found + "\n")
        return
    if given.command == "report":
        print(*write(given.out, RESULTS))
        return
    for job in chosen(all_jobs(), given.filter):
        file = given.out / f"{job.name}.json"
        if given.command == "list":
            print(f"{'done' if file.is_file() else '    '}  {job.name}")
        elif not file.is_file():
            given.out.mkdir(parents=True, exist_ok=True)
            print(job.name, flush=True)
            cache = given.cache or given.out / "cache"
            do(job, given.out, Place(data=given.data, cache=cache, precision=given.precision))


def _cost(model: str) -> dict[str, object]:
    torch.manual_seed(0)
    network = create_model(model).eval()
    images = torch.randn(CALIBRATION_IMAGES, 3, 224, 224).clamp(-1.7, 1.7)
    started = time.perf_counter()
    preprocessing = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    quantized = quantize(network, images.split(16), preprocessing=preprocessing).eval()
    seconds = time.perf_counter() - started
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": model,
        "images": CALIBRATION_IMAGES,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak_rss_bytes,
        "validation": _validation_seconds(network, quantized, images[:_VALIDATED_IMAGES]),
        "environment": describe_environment(threads=torch.get_num_threads()),
    }


@torch.no_grad()
def _validation_seconds(network: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """Seconds that a batch takes in floats and in the integers of eval(), in turns; the first turn is not counted."""
    turns: dict[str, list[float]] = {"float": [], "integers": []}
    for _ in range(_VALIDATION_TURNS + 1):
        for name, run in (("float", network), ("integers", quantized)):
            started = time.perf_counter()
            run(images)
            turns[name].append(round(time.perf_counter() - started, 3))
    return {name: seconds[1:] for name, seconds in turns.items()}


if __name__ == "__main__":
    main()
