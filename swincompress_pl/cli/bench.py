"""`swincompress bench`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swincompress_pl.accel.profile import ABOVE_THE_PEAK
from swincompress_pl.cli.common import existing_file, integers, is_checkpoint, parser, print_json
from swincompress_pl.printable import printable
from swincompress_pl.progress import progress_bar
from swincompress_pl.report.comparison.bench import Bench, bench_artifact, bench_onnx
from swincompress_pl.report.comparison.compare import Result
from swincompress_pl.report.comparison.kernels import KernelBench, bench_linear
from swincompress_pl.report.comparison.runtimes import LATENCY_ONLY, RUNTIMES, parse_runtimes
from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.environment import available_cores
from swincompress_pl.report.operations import OperationTime
from swincompress_pl.text_table import text_table

KERNELS = ("linear",)
_MISMATCH = 1
# Options without a meaning for the other kind of measurement; they are None or False unless they were given.
_OF_ARTIFACTS = ("batch", "against", "operations", "artifact")
_OF_KERNELS = ("shape",)
_SHAPE = "3136,384,96"
_ROUNDS, _KERNEL_ROUNDS = 10, 20


def main(name: str, arguments: Sequence[str]) -> int:
    """Measures an artifact or a kernel; returns 0, or 1 if the engine's answers differ from the reference's."""
    given = _arguments(name, arguments)
    if (given.file is None) == (given.kernel is None):
        raise ValueError("give either an artifact or --kernel, e.g. `swincompress bench model.safetensors`")
    of_the_other = _OF_ARTIFACTS if given.kernel is not None else _OF_KERNELS
    unread = [f"--{option}" for option in of_the_other if getattr(given, option) not in (None, False)]
    if unread:
        what = "an artifact, and --kernel measures none" if given.kernel is not None else "--kernel"
        raise ValueError(f"{', '.join(unread)}: only for {what}; leave it out")
    for option in ("threads", "batch", "rounds"):
        if getattr(given, option) is not None and getattr(given, option) < 1:
            raise ValueError(f"--{option} is {getattr(given, option)}; give 1 or more")
    return _bench_kernel(given) if given.kernel is not None else _bench_artifact(given)


def _arguments(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    command = parser(
        name,
        "Measures an artifact on the integer engine, alone or against other runtimes on the same architecture, or one "
        "kernel. Each runtime has a process of its own, and they take turns. The engine's answers are compared with "
        "the reference's in the same run.",
        "swincompress bench model.safetensors --threads 2",
        "swincompress bench model.safetensors --against torch,onnxruntime,openvino --json",
        "swincompress bench model.onnx --against engine",
        "swincompress bench --kernel linear --shape 3136,384,96",
    )
    command.add_argument(
        "file", nargs="?", type=str, default=None, help="artifact or ONNX file of `swincompress export`"
    )
    command.add_argument("--threads", type=int, default=None, help="threads; default: all cores, 1 with --kernel")
    command.add_argument("--batch", type=int, default=None, help="images per call; default: 1")
    command.add_argument(
        "--artifact", type=str, default=None, help="of an ONNX file --against engine; default: its name in .safetensors"
    )
    command.add_argument("--against", type=str, default=None, help=f"comma-separated: {', '.join(RUNTIMES)}")
    command.add_argument("--implementation", type=str, default=None, help="force one of the engine's implementations")
    command.add_argument(
        "--rounds",
        type=int,
        default=None,
        help=f"samples of each runtime; default: {_ROUNDS}, {_KERNEL_ROUNDS} with --kernel",
    )
    command.add_argument("--operations", action="store_true", help="also show the time of every operation")
    command.add_argument("--kernel", type=str, default=None, help=f"measure a kernel instead: {', '.join(KERNELS)}")
    command.add_argument(
        "--shape", type=str, default=None, help=f"M,N,K of the kernel: rows, outputs, inputs; default: {_SHAPE}"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return command.parse_args(list(arguments))


def _bench_onnx(file: Path, given: argparse.Namespace) -> int:
    unread = [f"--{option}" for option in ("implementation", "operations") if getattr(given, option)]
    if unread:
        raise ValueError(f"{', '.join(unread)}: only for an artifact, and {file} is an ONNX file; leave it out")
    if given.against not in (None, "engine"):
        raise ValueError(f"--against is {given.against!r}; an ONNX file is compared with `engine`")
    artifact = None
    if given.against is not None:
        artifact = Path(given.artifact) if given.artifact else file.with_suffix(".safetensors")
        if not artifact.is_file():
            raise FileNotFoundError(f"{artifact}: there is no such file; name the artifact of {file} by --artifact")
    elif given.artifact is not None:
        raise ValueError(f"--artifact {given.artifact} goes with --against engine; add it")
    with progress_bar() as on_progress:
        outcome = bench_onnx(
            file, artifact=artifact, threads=given.threads or available_cores(), batch=given.batch or 1,
            rounds=given.rounds or _ROUNDS, on_progress=on_progress,
        )  # fmt: skip
    if given.json:
        print_json(outcome.to_dict())
    else:
        _show(outcome, file)
    return 0 if outcome.answers_equal else _MISMATCH


def _bench_artifact(given: argparse.Namespace) -> int:
    file = existing_file(given.file)
    if file.suffix == ".onnx":
        return _bench_onnx(file, given)
    if given.artifact is not None:
        raise ValueError(f"--artifact {given.artifact}: only for an ONNX file; leave it out")
    if is_checkpoint(file):
        raise ValueError(
            f"{file} is a checkpoint; write it as an artifact first: `swincompress export {file} -o model.safetensors`"
        )
    others = parse_runtimes(given.against or "")
    with tempfile.TemporaryDirectory() as directory, progress_bar() as on_progress:
        outcome = bench_artifact(
            file,
            threads=given.threads or available_cores(),
            batch=given.batch or 1,
            against=others,
            implementation=given.implementation,
            rounds=given.rounds or _ROUNDS,
            operations=given.operations,
            directory=Path(directory),
            on_progress=on_progress,
        )
    if given.json:
        print_json(outcome.to_dict())
    else:
        _show(outcome, file)
    return 0 if outcome.answers_equal else _MISMATCH


def _show(outcome: Bench, file: Path) -> None:
    print(f"{file.name}: {count(outcome.macs)} MACs per image, {megabytes(outcome.file_bytes)}, batch {outcome.batch}")
    print(
        f"{outcome.environment['cpu']}, threads {outcome.environment['threads']}, "
        f"implementation {outcome.implementation}"
    )
    header = ["runtime", "median ms", "quartiles ms", "GMAC/s", "times engine", "load ms", "file", "peak RSS"]
    print(text_table(header, (_cells(result, outcome) for result in outcome.results)))
    for result in outcome.results:
        if result.unavailable:
            print(printable(f"{result.name}: {result.unavailable}"))
    verdict = "identical to the reference" if outcome.answers_equal else "DIFFERENT from the reference"
    if outcome.images_checked:
        print(f"integer logits of {outcome.images_checked} random images: {verdict}")
    if len(outcome.results) > 1 and file.suffix != ".onnx":
        print(LATENCY_ONLY)
    if outcome.operations:
        _show_operations(outcome.operations)


def _cells(result: Result, outcome: Bench) -> list[str]:
    if result.latency is None:
        return [result.name, "-", *[""] * 6]
    low, high = result.latency.quartiles_ms
    times = outcome.ratios.get(result.name)
    return [
        result.name,
        f"{result.latency.median_ms:.3f}",
        f"{low:.3f} .. {high:.3f}",
        f"{outcome.macs * outcome.batch / result.latency.median_ms / 1e6:.1f}",
        "" if times is None else f"{times.median:.2f}",
        f"{result.load_ms:.0f}",
        megabytes(result.file_bytes),
        megabytes(result.peak_rss_bytes),
    ]


def _show_operations(operations: Sequence[OperationTime]) -> None:
    rows = []
    for operation in operations:
        speed = f"{operation.macs / operation.time_ms / 1e6:.1f}" if operation.macs and operation.time_ms else ""
        peak = "" if operation.peak_share is None else f"{operation.peak_share:.0%}"
        name = printable(operation.name)
        rows.append([name, operation.kind, f"{operation.time_ms:.4f}", f"{operation.macs:,}", speed, peak])
    print("operations:")
    print(text_table(["operation", "kind", "ms", "MACs", "GMAC/s", "of the peak"], rows, text=2))
    if any((operation.peak_share or 0) > 1 for operation in operations):
        print(ABOVE_THE_PEAK)


def _bench_kernel(given: argparse.Namespace) -> int:
    if given.kernel not in KERNELS:
        raise ValueError(f"unknown kernel {given.kernel!r}; kernels are {', '.join(KERNELS)}")
    rows, outputs, inputs = integers(given.shape or _SHAPE, "--shape", count=3)
    outcomes = bench_linear(
        rows=rows, outputs=outputs, inputs=inputs, threads=given.threads or 1, implementation=given.implementation,
        rounds=given.rounds or _KERNEL_ROUNDS,
    )  # fmt: skip
    if given.json:
        print_json([outcome.to_dict() for outcome in outcomes])
    else:
        print(f"linear, M={rows} N={outputs} K={inputs}, {given.threads or 1} thread(s):")
        header = ["implementation", "median ms", "quartiles ms", "GMAC/s", "of the peak", "equals the reference"]
        print(text_table(header, map(_kernel_cells, outcomes)))
    return 0 if all(outcome.answers_equal for outcome in outcomes) else _MISMATCH


def _kernel_cells(outcome: KernelBench) -> list[str]:
    low, high = outcome.latency.quartiles_ms
    return [
        outcome.implementation,
        f"{outcome.latency.median_ms:.4f}",
        f"{low:.4f} .. {high:.4f}",
        f"{outcome.gmacs_per_second:.1f}",
        f"{outcome.peak_share:.0%}",
        "yes" if outcome.answers_equal else "NO",
    ]
