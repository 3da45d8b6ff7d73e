"""What structured pruning buys: Swin-T with 20, 40 and 60 % fewer MACs against the dense one, in torch and our engine.

Random weights: they do not change the time. All variants race in turns, each in a process of its own, and the engine's
integers are compared with the reference's in the same run. The engine's profile names the parts that do not shrink.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from swincompress_pl import accel, models, quant
from swincompress_pl.data import Preprocessing
from swincompress_pl.models.factory import preprocessing_for
from swincompress_pl.pruning import count_macs
from swincompress_pl.report import Ratio, describe_environment, program_macs, ratio
from swincompress_pl.report.comparison.compare import Progress, Result, Runner, compare
from swincompress_pl.report.comparison.runtimes import prepare

from .peers import one_shot

FRACTIONS = (0.2, 0.4, 0.6)
# Heads and MLPs leave the width of the residual stream, and so all LayerNorms, gathers and additions, as they are.
KINDS = (("heads", "mlp"), ("heads", "mlp", "embed"))
ROUND_TO = 16
DENSE = "dense"
_IMAGES_CHECKED = 2
_PROFILES = 15


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A pruned network as an artifact; `macs` of one image in the integer program."""

    name: str
    file: Path
    macs: int
    parameters: int
    equal_to_reference: bool


def latency(
    model: str, folder: Path | None, *, threads: Sequence[int], rounds: int, turn_ms: float, tell: Progress
) -> dict[str, Any]:
    """All variants of `model`: latency in torch and the engine, and where the engine's time goes.

    folder: of the artifacts, None for a temporary one. A variant that cannot be made stands there with its error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = folder or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        variants, failed = [], {}
        plans: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
        plans += [(fraction, kinds) for kinds in KINDS for fraction in FRACTIONS]
        for number, (fraction, kinds) in enumerate(plans):
            name = f"{fraction:.0%} fewer, {'+'.join(kinds)}" if kinds else DENSE
            tell(f"pruning and quantizing: {name}", number, len(plans))
            try:
                variants.append(make(model, name, fraction, kinds, directory / f"{number}.safetensors"))
            except Exception as error:  # one impossible variant must not lose the others
                if not kinds:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:400]
        return {
            "model": model,
            "weights": "random",
            "round_to": ROUND_TO,
            "variants": [
                {"name": v.name, "macs": v.macs, "parameters": v.parameters, "file_bytes": v.file.stat().st_size,
                 "answers": {"images": _IMAGES_CHECKED, "equal_to_reference": v.equal_to_reference}}
                for v in variants
            ],
            "failed": failed,
            "races": [_race(variants, count, rounds, turn_ms, tell) for count in threads],
            "profiles": {count: _profiles(variants, count) for count in threads},
            "environment": describe_environment(),
        }  # fmt: skip


def make(model: str, name: str, fraction: float, kinds: Sequence[str], file: Path) -> Variant:
    """Prunes `fraction` of the MACs by magnitude, the same part of every group, quantizes and exports."""
    torch.manual_seed(0)
    network = models.create_model(model).eval()
    size = int(network.pretrained_cfg["input_size"][1])  # type: ignore[index]
    shape = (1, 3, size, size)
    if fraction:
        macs = int((1 - fraction) * count_macs(network, shape))
        network = one_shot(network, False, macs, shape, kinds=kinds, round_to=ROUND_TO)
    _export(network, size, file)
    engine = accel.load(file)
    pixels = np.random.default_rng(0).integers(0, 256, (_IMAGES_CHECKED, *engine.input_shape), dtype=np.uint8)
    equal = np.array_equal(engine.run_integer(pixels), accel.reference(file).run_integer(pixels))
    return Variant(
        name=name,
        file=file,
        macs=program_macs(engine.program),
        parameters=sum(p.numel() for p in network.parameters()),
        equal_to_reference=bool(equal),
    )


def _export(network: nn.Module, size: int, file: Path) -> None:
    pixels = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Preprocessing.from_dict(preprocessing_for(network)).normalize(pixels)
    accel.export(quant.quantize(network, [images], method="max"), file)


def _race(variants: Sequence[Variant], threads: int, rounds: int, turn_ms: float, tell: Progress) -> dict[str, Any]:
    contestants: dict[str, list[Runner]] = {"torch": [], "engine": []}
    for variant in variants:
        program = accel.load(variant.file).program
        ours = Runner(
            name=f"engine, {variant.name}", runtime="engine", threads=threads, batch=1,
            image_shape=program.input.value.shape, file=str(variant.file),
        )  # fmt: skip
        peer = prepare(
            ("torch",), origin=program.origin, image_shape=ours.image_shape, threads=(threads,), batch=1,
            directory=variant.file.parent,
        )[threads][0]  # fmt: skip
        contestants["engine"].append(ours)
        contestants["torch"].append(replace(peer, name=f"torch fp32, {variant.name}"))
    found = compare([*contestants["torch"], *contestants["engine"]], rounds=rounds, turn_ms=turn_ms, on_progress=tell)
    results = {result.name: result for result in found}
    rows = []
    for runtime, entered in contestants.items():
        dense = results[entered[0].name]
        for contestant, variant in zip(entered, variants, strict=True):
            rows.append(_row(runtime, variant, variants[0], results[contestant.name], dense))
    return {"threads": threads, "rows": rows}


def _row(runtime: str, variant: Variant, dense: Variant, result: Result, dense_result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"runtime": runtime, "variant": variant.name, "macs_part": variant.macs / dense.macs}
    if result.latency is None or dense_result.latency is None:
        return row | {"unavailable": result.unavailable or dense_result.unavailable}
    part: Ratio = ratio(result.latency, dense_result.latency)
    return row | {
        "median_ms": result.latency.median_ms,
        "quartiles_ms": list(result.latency.quartiles_ms),
        "time_part": part.median,
        "time_part_quartiles": list(part.quartiles),
        "beyond_macs": part.median - variant.macs / dense.macs,
        "peak_rss_bytes": result.peak_rss_bytes,
    }


def _profiles(variants: Sequence[Variant], threads: int) -> dict[str, dict[str, float]]:
    """{variant: {kind of operation: milliseconds}}; medians over profiles taken in turns."""
    engines = {variant.name: accel.load(variant.file, threads=threads) for variant in variants}
    pixels = np.random.default_rng(0).integers(0, 256, (1, *next(iter(engines.values())).input_shape), dtype=np.uint8)
    taken: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in engines}
    for _ in range(_PROFILES):
        for name, engine in engines.items():
            sums: dict[str, float] = defaultdict(float)
            for row in engine.profile(pixels):
                sums[row.kind] += row.time_ms
            for kind, time_ms in sums.items():
                taken[name][kind].append(time_ms)
    return {name: {kind: float(np.median(times)) for kind, times in kinds.items()} for name, kinds in taken.items()}
