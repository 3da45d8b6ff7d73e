"""One round-robin round on Swin-T at full size inside a fit, on synthetic images: memory, and the time for ImageNet.

Run it in a process of its own (the command is one): the peak is that of the whole process, data and Lightning included.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning
import numpy as np

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.pruning import HoldOut
from swincompress_pl.report import describe_environment
from swincompress_pl.report.comparison.worker import peak_rss_bytes

from .batches import MemoryData
from .images import Images, Splits
from .overhead import Stopwatch
from .subjects import Place, trainer

MODEL = "swin_tiny_patch4_window7_224"
BAR_BYTES = 8 * 10**9
IMAGENET_HOLDOUT = 25_000  # 2 % of its training images
_CLASSES = 1000


def memory(
    place: Place, *, granularity: str, batches: int, batch_size: int, holdout: int, part_of_naive: float | None = None
) -> dict[str, Any]:
    """A round before one epoch of `batches` training steps, with `holdout` images to score on.

    part_of_naive: forward passes that a search needs as a part of the naive number, as measured elsewhere; random
    weights and a small hold-out say nothing about it.
    """
    lightning.seed_everything(0, verbose=False)
    module = CompressibleClassifier(MODEL, _CLASSES)
    data = _synthetic(place, batches * batch_size, holdout, batch_size)
    pruning = AdaptiveIterativePruning(tolerance=1.0, granularity=granularity, max_rounds=1)
    scorer = Stopwatch(place.device)
    with ExitStack() as stack:
        stack.enter_context(scorer.on(HoldOut, ["full", "begin_round", "judge", "accept"]))
        trainer(1, [pruning], place).fit(module, datamodule=data)
    state = pruning.search_state
    assert state is not None
    peak = peak_rss_bytes()
    images_per_s = state.scoring["image_forwards"] / scorer.seconds
    return {
        "model": MODEL,
        "weights": "random",
        "granularity": granularity,
        "batch_size": batch_size,
        "holdout": holdout,
        "targets": len(state.targets),
        "steps": len(state.steps),
        "peak_rss_bytes": peak,
        "within_bar": peak is not None and peak < BAR_BYTES,
        "scoring": state.scoring,
        "scoring_seconds": scorer.seconds,
        "images_per_s": images_per_s,
        "imagenet": _estimate(len(state.targets), images_per_s, part_of_naive),
        "environment": describe_environment(),
    }


def _estimate(targets: int, images_per_s: float, part_of_naive: float | None) -> dict[str, Any]:
    """Hours of a round on a hold-out of ImageNet's size, on this machine."""
    naive = IMAGENET_HOLDOUT * (targets + 2)  # a decision a target, and the whole hold-out before and after
    hours = naive / images_per_s / 3600
    return {
        "holdout": IMAGENET_HOLDOUT,
        "naive_images_a_round": naive,
        "naive_hours_a_round": hours,
        "part_of_naive": part_of_naive,
        "hours_a_round": None if part_of_naive is None else hours * part_of_naive,
    }


def _synthetic(place: Place, train: int, holdout: int, batch_size: int) -> MemoryData:
    rng = np.random.default_rng(0)

    def images(count: int) -> Images:
        pixels = rng.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
        return Images(pixels, rng.integers(0, _CLASSES, count))

    return MemoryData(
        Splits(images(train), images(holdout), images(1)),
        device=place.device,
        size_px=224,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augment=lambda pixels, _: pixels,
        batch_size=batch_size,
        seed=0,
    )
