"""A string that identifies everything that a verdict of PrimeSVT depends on; an evaluation cache is about one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.pruning.evaluation.scorer import Evaluator, tensor_bytes
from swincompress_pl.pruning.prime.config import PrimeSVTConfig
from swincompress_pl.pruning.space import Target
from swincompress_pl.registry import size_of

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def check_named(evaluator: Evaluator) -> None:
    """Raises ValueError if nothing identifies what scores the networks."""
    if evaluator.fingerprint is None:
        raise ValueError(
            "evaluation_cache= keeps verdicts for later searches, and nothing tells this `evaluate` (or this predict "
            "of a HoldOut) from another; give it a name that changes whenever it scores in another way: "
            "evaluate.fingerprint = 'top-1 on my hold-out, version 1'"
        )


def fingerprint(
    network: nn.Module,
    config: PrimeSVTConfig,
    *,
    targets: Mapping[str, Target],
    scores: Mapping[str, Tensor],
    ranks: Iterable[list[object]],
    floor: float,
) -> str:
    """Identifies the network, what the widths of its targets mean, what scores it, and the floor.

    `scores` say which units go first, whatever the criterion and its gradients were. `ranks` has each process's scorer
    and calibration images.
    """
    digest = hashlib.sha256()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    for ranking in scores.values():
        digest.update(tensor_bytes(ranking))
    about = {
        "network": [type(network).__qualname__, _ADDRESS.sub("", repr(network)), repr(size_of(network))],
        "units": {name: target.units for name, target in targets.items()},
        "granularity": config.granularity,
        "ranks": list(ranks),
        "floor": [config.tolerance, floor],
        "statistics": config.batchnorm,
    }
    if config.compensation != "none":  # files without it stay readable
        about["compensation"] = config.compensation
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()


def images_digest(batches: Iterable[Any] | None) -> str | None:
    """Identifies the images of batches, in any order; None without batches."""
    if batches is None:
        return None
    found = []
    for batch in batches:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        found += [hashlib.sha256(f"{image.dtype}".encode() + tensor_bytes(image)).hexdigest() for image in images]
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


def fingerprint_of_0_1(
    network: nn.Module,
    config: PrimeSVTConfig,
    *,
    targets: Mapping[str, Target],
    scores: Mapping[str, Tensor],
    evaluator: Evaluator,
) -> str | None:
    """The fingerprint of version 0.1; None if it does not tell one search from another."""
    if config.batchnorm != "keep" or config.compensation != "none" or evaluator.earlier_fingerprint is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    for ranking in scores.values():
        digest.update(ranking.cpu().numpy().tobytes())
    mode = {"structured": "group", "filter": "paper"}[config.granularity]
    units = {name: target.units for name, target in targets.items()}
    about = [[mode, "keep", config.tolerance], units, evaluator.earlier_fingerprint, evaluator.images]
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()
