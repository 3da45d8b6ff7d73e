"""Quantization measured: accuracy of the integers, sizes, time and memory, on trained networks.

    python -m benchmarks.quantization list --out runs/quantization
    python -m benchmarks.quantization run --out runs/quantization --data DATA [--filter 'swin_cifar10-whole-W8A8-*']
        [--device cuda --jobs 12 --budget-s 500]
    python -m benchmarks.quantization pack --out runs/quantization --file results.jsonl   (and unpack)
    python -m benchmarks.quantization cost --model swin_tiny_patch4_window7_224
    python -m benchmarks.quantization sizes --out runs/sizes --data DATA --reader build/cpp/read_artifacts
    python -m benchmarks.quantization features --out runs/features --data DATA
    python -m benchmarks.quantization report --out runs/quantization

DATA: as in benchmarks/pruning/images.py. A job is one file of results; `run` skips what is there. Every job has a
process and a log of its own: one that fails stops no other.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import runner
from benchmarks.pages import write_pages
from benchmarks.pruning.__main__ import overrides
from benchmarks.pruning.subjects import CACHE_HELP, DATA_HELP, Place
from benchmarks.runner import chosen, result_file
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize
from swincompress_pl.report import describe_environment
from swincompress_pl.report.latency import measure
from swincompress_pl.report.plain import write_text

from . import features, sizes
from .jobs import all_jobs
from .report import write
from .work import CALIBRATION_IMAGES

_VALIDATED_IMAGES = 32
_VALIDATION_TURNS = 7
RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    """Runs one command; 1 where a job failed."""
    given = _arguments()
    return int(_COMMANDS[given.command](given) or 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "run", "report", "pack", "unpack"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder of the results")
        if name == "run":
            _add_run_options(command)
        if name in ("list", "run"):
            command.add_argument("--filter", nargs="*", default=[], help="patterns of names (fnmatch)")
        if name in ("pack", "unpack"):
            command.add_argument("--file", type=Path, required=True, help="the packed file")
    cost = commands.add_parser("cost", help="time and memory of quantizing with random weights and images")
    cost.add_argument("--model", required=True)
    cost.add_argument("--out", type=Path, help="folder of the results; default: it is printed only")
    command = commands.add_parser("sizes", help="sizes of files and how long they load, of all forms")
    command.add_argument("--out", type=Path, required=True, help="folder of the artifacts; those that are there stay")
    command.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    command.add_argument("--cache", type=Path, help=f"{CACHE_HELP}; default: OUT/cache")
    command.add_argument(
        "--reader", type=Path, required=True, help="read_artifacts, of a build with -DSWINCOMPRESS_TESTS=ON"
    )
    command = commands.add_parser("features", help="DeiT-Tiny as a feature extractor, and from a JPEG to its class")
    command.add_argument("--out", type=Path, required=True, help="folder of the images and the artifacts")
    command.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    return parser.parse_args()


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    command.add_argument("--cache", type=Path, help=f"{CACHE_HELP}; default: OUT/cache")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all but the C++ engine")
    command.add_argument("--precision", default="32-true", help="of the Trainer where a job fine-tunes")
    command.add_argument("--jobs", type=int, default=1, help="processes at a time")
    command.add_argument("--threads", type=int, default=1, help="CPU threads of a job")
    command.add_argument("--budget-s", type=float, default=1e9, help="seconds after which what runs is stopped")
    command.add_argument("--set", nargs="*", default=[], help="fields of the recipe of fine-tuning, e.g. epochs=1")
    command.add_argument("--commit", help="recorded where the source tree cannot tell")
    command.add_argument("--pack", type=Path, help="after the run, all results into this one file")


def _list(given: argparse.Namespace) -> None:
    for job in chosen(all_jobs(), given.filter):
        print(f"{'done' if result_file(given.out, job.name).is_file() else '    '}  {job.name}")


def _run(given: argparse.Namespace) -> int:
    settings = {
        "place": Place(
            data=given.data, cache=given.cache or given.out / "cache", device=given.device, precision=given.precision
        ),
        "overrides": overrides(given.set),
        "commit": given.commit,
    }
    outcome = runner.run(
        chosen(all_jobs(), given.filter), given.out, settings, work="benchmarks.quantization.work", parallel=given.jobs,
        budget_s=given.budget_s, threads=given.threads,
    )  # fmt: skip
    print(outcome)
    if given.pack is not None:
        print(runner.pack(given.out, given.pack), "results in", given.pack)
    return 1 if outcome.failed else 0


def _report(given: argparse.Namespace) -> None:
    print(write(given.out, RESULTS), *write_pages(["quantization"]), sep="\n")


def _pack(given: argparse.Namespace) -> None:
    print(runner.pack(given.out, given.file), "results in", given.file)


def _unpack(given: argparse.Namespace) -> None:
    print(runner.unpack(given.file, given.out), "results new in", given.out)


def _sizes(given: argparse.Namespace) -> None:
    place = Place(data=given.data, cache=given.cache or given.out / "cache", device="cpu", precision="32-true")
    print(sizes.write(given.out, place, given.reader.resolve(), RESULTS), *write_pages(["quantization"]), sep="\n")


def _features(given: argparse.Namespace) -> None:
    print(features.write(given.data, given.out, RESULTS), *write_pages(["quantization"]), sep="\n")


def _print_cost(given: argparse.Namespace) -> None:
    found = json.dumps(_cost(given.model))
    print(found)
    if given.out is not None:
        write_text(given.out / f"cost-{given.model}.json", found + "\n")


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
    passes = {"float": partial(network, images), "integers": partial(quantized, images)}
    found = measure(passes, rounds=_VALIDATION_TURNS, warm_up=1, batch=len(images))
    return {name: [round(ms / 1000, 3) for ms in latency.samples_ms] for name, latency in found.items()}


_COMMANDS = {
    "list": _list, "run": _run, "report": _report, "pack": _pack, "unpack": _unpack, "cost": _print_cost,
    "sizes": _sizes, "features": _features,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
