"""Checks the options of quantization-aware training when the callback is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from swincompress_pl.arguments import flag, integer, number, optional, shown
from swincompress_pl.callbacks.resumed_arguments import ResumedArguments, stored
from swincompress_pl.quant import Bits, QuantizedNetwork, SearchOptions
from swincompress_pl.quant.quantize import checked_method, checked_percentile, checked_search

RESUMED_ARGUMENTS = ResumedArguments(
    settled=(
        "start_epoch", "calibration_images", "method", "bits", "search", "percentile", "learn_scales",
        "model_attribute",
    ),
    free=("scale_lr_factor", "freeze_epoch", "distillation", "temperature"),
    because="its network is quantized already",
)  # fmt: skip


def checked_epochs(start_epoch: int, freeze_epoch: int | None, learn_scales: bool | None) -> tuple[int, int | None]:
    """Returns both epochs. Raises a ValueError for negative epochs, and for a freeze that comes too early."""
    start = integer("start_epoch", start_epoch, least=0)
    freeze = optional(integer, "freeze_epoch", freeze_epoch, wanted="None, or an integer after start_epoch")
    if freeze is None:
        return start, None
    if learn_scales is False:
        raise ValueError(f"freeze_epoch={freeze} goes with learned scales; leave it out, or give learn_scales=True")
    if freeze <= start:
        raise ValueError(
            f"freeze_epoch={freeze} is not after start_epoch={start}: no scale would be learned; choose a "
            "later one, or learn_scales=False"
        )
    return start, freeze


def checked_quantization(
    method: str,
    search: SearchOptions | Mapping[str, Any] | None,
    percentile: float | None,
    learn_scales: bool | None,
) -> tuple[str, SearchOptions | None, float | None, bool]:
    """Returns all four. Raises a ValueError for what `quant.quantize` would refuse later, in the middle of a fit."""
    method = checked_method(method)
    learned = optional(flag, "learn_scales", learn_scales)
    if method == "affine" and learned:
        raise ValueError("learn_scales=True: method 'affine' has zero-points, which are not learned; use 'searched'")
    return (
        method,
        checked_search(method, search),
        checked_percentile(method, percentile),
        method != "affine" if learned is None else learned,
    )


def checked_training(scale_lr_factor: float, distillation: float, temperature: float) -> tuple[float, float, float]:
    """Returns all three. Raises a ValueError for values out of range."""
    positive = "above 0; learn_scales=False keeps the scales"
    return (
        number("scale_lr_factor", scale_lr_factor, lambda factor: factor > 0, positive),
        number("distillation", distillation, lambda weight: 0 <= weight <= 1, "0 (none) to 1"),
        number("temperature", temperature, lambda value: value > 0, "a number above 0"),
    )


def refuse_other_form(
    network: QuantizedNetwork, callback_name: str, method: str, bits: Bits, preprocessing: Mapping[str, Any] | None
) -> None:
    """Raises a ValueError if a callback asks for other bits or another normalization than a quantized network has.

    Another method is only warned of: it once found the scales, and training does not depend on it. Bits that equal the
    default are only warned of too, because they may have been left out.
    """
    has = network.preprocessing
    pairs = [("method", method, network.method, False), ("bits", bits, network.bits, bits != Bits())]
    if preprocessing is not None:
        pairs += [(f"preprocessing[{key!r}]", preprocessing[key], has[key], True) for key in ("mean", "std")]
    for name, asked, there, counts in pairs:
        if stored({name: asked}) == stored({name: there}):
            continue
        told = f"{callback_name}: the network is quantized already, with {name}={shown(there)}"
        if counts:
            raise ValueError(
                f"{told}, and {name}={shown(asked)} is asked for; give {name}={shown(there)}, or fit its float network "
                "(.network) instead"
            )
        rank_zero_warn(f"{told}, which stays; {name}={shown(asked)} changes nothing")
