"""The options of quantization-aware training, checked when the callback is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swincompress_pl.quant import SearchOptions
from swincompress_pl.quant.network import METHODS


def check_epochs(start_epoch: int, freeze_epoch: int | None, learn_scales: bool | None) -> None:
    """ValueError for epochs before the fit, or a freeze that comes too early."""
    if start_epoch < 0:
        raise ValueError(f"start_epoch={start_epoch}: it has to be 0 or more")
    if freeze_epoch is None:
        return
    if learn_scales is False:
        raise ValueError(f"freeze_epoch={freeze_epoch} goes with learned scales; leave it out or learn_scales=True")
    if freeze_epoch <= start_epoch:
        raise ValueError(
            f"freeze_epoch={freeze_epoch} is not after start_epoch={start_epoch}: no scale would be learned; choose a "
            "later one, or learn_scales=False"
        )


def check_quantization(
    calibration_images: int,
    method: str,
    search: SearchOptions | Mapping[str, Any] | None,
    percentile: float | None,
    learn_scales: bool | None,
) -> None:
    """ValueError for what `quant.quantize` would refuse later, in the middle of a fit."""
    if calibration_images < 1:
        raise ValueError(f"calibration_images={calibration_images}: it has to be 1 or more")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not available; there is {', '.join(map(repr, METHODS))}")
    if method == "affine" and learn_scales:
        raise ValueError("learn_scales=True: method 'affine' has zero-points, which are not learned; use 'searched'")
    if search is not None and method != "searched":
        raise ValueError(f"search options go with method 'searched', not {method!r}")
    known = {*SearchOptions.__dataclass_fields__, *getattr(SearchOptions.__init__, "old_arguments", {})}
    unknown = sorted(set(search) - known) if isinstance(search, Mapping) else []
    if unknown:
        raise ValueError(
            f"search has no option {', '.join(unknown)}; there are {', '.join(SearchOptions.__dataclass_fields__)}"
        )
    if percentile is not None and (method == "affine" or not 50 < percentile <= 100):
        raise ValueError(
            f"percentile={percentile}: it has to be above 50 and at most 100, with method 'searched' or 'max'"
        )


def check_training(scale_lr_factor: float, distillation: float, temperature: float) -> None:
    """ValueError for factors out of range."""
    if not 0 < scale_lr_factor < float("inf"):
        raise ValueError(
            f"scale_lr_factor={scale_lr_factor}: it has to be above 0; learn_scales=False keeps the scales"
        )
    if not 0 <= distillation <= 1:
        raise ValueError(f"distillation={distillation}: it has to be 0 (none) to 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: it has to be a number above 0")
