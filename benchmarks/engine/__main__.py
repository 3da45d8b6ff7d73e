"""`python -m benchmarks.engine`: see benchmarks/README.md."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from swincompress_pl.cli.common import integers, progress
from swincompress_pl.norm import Program
from swincompress_pl.report import describe_environment, program_macs
from swincompress_pl.report.bench import ENGINE, ratios_to
from swincompress_pl.report.markdown import count, megabytes, table
from swincompress_pl.report.peers import LATENCY_ONLY, parse_peers, prepare
from swincompress_pl.report.race import Contestant, Progress, Result, run
from swincompress_pl.report.record import write_text

_RESULTS = Path(__file__).resolve().parent.parent / "results"
_CALIBRATION_IMAGES = 4


def main() -> int:
    """Runs the benchmark and writes its results; returns 1 when the engine's integers differ from the reference's."""
    given = _arguments()
    threads = integers(given.threads, "--threads")
    with tempfile.TemporaryDirectory() as directory, progress() as tell:
        file = Path(directory) / "model.safetensors"
        tell(f"quantizing {given.model}", 0, 1)
        program = export_random(given.model, file)
        tell("checking engine against reference", 0, 1)
        equal = answers_equal(file, program, given.images_checked)
        races = race_all(given, program, file, threads, Path(directory), tell)
        figures = {
            "model": given.model,
            "weights": "random",
            "macs": program_macs(program),
            "file_bytes": file.stat().st_size,
            "batch": given.batch,
            "answers": {"images": given.images_checked, "equal_to_reference": equal},
            "races": races,
            "environment": describe_environment(),
        }
    name = f"engine-{given.model}-b{given.batch}"
    output = Path(given.output)
    write_text(output / f"{name}.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    text = markdown(figures)
    print(text)
    print(write_text(output / f"{name}.md", text))
    return 0 if equal else 1


def _arguments() -> Namespace:
    command = ArgumentParser(prog="python -m benchmarks.engine", description=main.__doc__)
    command.add_argument("--model", type=str, default="swin_tiny_patch4_window7_224", help="a name for create_model")
    command.add_argument("--threads", type=str, default="1,2", help="numbers of threads, one race each")
    command.add_argument("--batch", type=int, default=1, help="images a call")
    command.add_argument("--against", type=str, default="torch,onnxruntime,openvino", help="peers")
    command.add_argument("--rounds", type=int, default=15, help="samples of each runtime")
    command.add_argument("--turn-ms", type=float, default=300.0, help="time of one runtime's turn in a round")
    command.add_argument("--images-checked", type=int, default=2, help="images whose integers are compared")
    command.add_argument("--output", type=str, default=str(_RESULTS), help="directory of the results")
    return command.parse_args()


def export_random(model: str, file: Path) -> Program:
    """An artifact of `model` with random weights, calibrated on random images: right for latency, useless otherwise."""
    import torch

    from swincompress_pl import accel, models, quant

    torch.manual_seed(0)
    network = models.create_model(model).eval()
    height, width = network.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))  # type: ignore[index]
    images = (torch.rand(_CALIBRATION_IMAGES, 3, height, width) - mean) / std
    quantized = quant.quantize(network, [images], method="max")
    accel.export(quantized, file)
    return accel.reference(file).program


def answers_equal(file: Path, program: Program, images: int) -> bool:
    """Whether every implementation that this CPU has gives the reference's integers on random images."""
    from swincompress_pl import accel

    pixels = np.random.default_rng(0).integers(0, 256, (images, *program.input.value.shape), dtype=np.uint8)
    expected = accel.reference(file).run_integer(pixels)
    engines = (accel.load(file, implementation=name) for name in accel.implementations())
    return all(bool(np.array_equal(engine.run_integer(pixels), expected)) for engine in engines)


def race_all(
    given: Namespace, program: Program, file: Path, threads: Sequence[int], directory: Path, tell: Progress
) -> list[dict[str, Any]]:
    """One race for every number of threads."""
    shape = program.input.value.shape
    peers = prepare(
        parse_peers(given.against), origin=program.origin, image_shape=shape, threads=threads, batch=given.batch,
        directory=directory, on_progress=lambda what: tell(what, 0, 1),
    )  # fmt: skip
    races = []
    for number in threads:
        ours = Contestant(
            name=ENGINE, runtime="engine", threads=number, batch=given.batch, image_shape=shape, file=str(file)
        )
        results = run([ours, *peers[number]], rounds=given.rounds, turn_ms=given.turn_ms, on_progress=tell)
        ratios = ratios_to(results[0], results[1:])
        races.append(
            {
                "threads": number,
                "results": [result.to_dict() for result in results],
                "times_engine": {name: value.to_dict() for name, value in ratios.items()},
                "table": [_row(result, program, given.batch, ratios) for result in results],
            }
        )
    return races


def _row(result: Result, program: Program, batch: int, ratios: Mapping[str, Any]) -> list[str]:
    if result.latency is None:
        return [result.name, result.unavailable or "-", "", "", "", ""]
    low, high = result.latency.quartiles_ms
    return [
        result.name,
        f"{result.latency.median_ms:.2f}",
        f"{low:.2f} .. {high:.2f}",
        f"{program_macs(program) * batch / result.latency.median_ms / 1e6:.1f}",
        str(ratios[result.name]) if result.name in ratios else "1",
        megabytes(result.peak_rss_bytes),
    ]


def markdown(figures: Mapping[str, Any]) -> str:
    """The results as a page."""
    environment, answers = figures["environment"], figures["answers"]
    verdict = "equal" if answers["equal_to_reference"] else "**DIFFER from**"
    parts = [
        f"# {figures['model']}, batch {figures['batch']}",
        f"{count(figures['macs'])} MACs an image, artifact {megabytes(figures['file_bytes'])}, random weights. Integer "
        f"logits of every implementation {verdict} the reference's on {answers['images']} images, in this run. Each "
        f"runtime in its own process, in turns; medians and quartiles. {LATENCY_ONLY.capitalize()}.",
    ]
    header = ["runtime", "median ms", "quartiles ms", "GMAC/s", "times engine [quartiles]", "peak RSS"]
    for race in figures["races"]:
        parts += [f"## {race['threads']} thread(s)", table(header, race["table"])]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    parts.append(
        f"{environment['date']}, commit {environment['commit']}, {environment['cpu']} "
        f"({', '.join(environment['cpu_flags'])}), {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']}, {packages}."
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
