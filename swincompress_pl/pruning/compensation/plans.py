"""Cuts a network as a plan says, and makes up for what goes: compensation without a search."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from swincompress_pl.arguments import choice
from swincompress_pl.evaluation_mode import outside_inference_mode, replace_inference_tensors
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.compensation.compensator import METHODS, Compensator, Method
from swincompress_pl.pruning.compensation.readers import Predict
from swincompress_pl.pruning.evaluation.images import check_finite
from swincompress_pl.pruning.structure.apply import AppliedPlan, apply_plan
from swincompress_pl.pruning.structure.groups import validate_units
from swincompress_pl.pruning.structure.plan import PruningPlan, find_group
from swincompress_pl.registry import adapter_for


@outside_inference_mode()
def compensate(
    network: nn.Module,
    plan: PruningPlan,
    calibration: Iterable[Any],
    *,
    method: Method = "ridge",
    predict: Predict | None = None,
) -> AppliedPlan:
    """Removes the units that a plan does not keep, and solves the layers that read them again.

    It is `apply_plan` for a network that is not trained afterwards. A search compensates by itself (`compensation=`).
    On any exception the network is left as it was.

    Args:
        network: The network, standard or spiking; its family needs an adapter.
        plan: The units that stay.
        calibration: Batches of unlabelled training images (N, ...), or (images, ...), a few hundred images.
        method: "none", "bias" (what went on average is added), or "ridge" (weights and biases are solved again).
        predict: (network, images) -> anything, which runs the network; None calls it with the images.

    Returns:
        What was cut, for `slice_optimizer`.

    Raises:
        ValueError: If the method is unknown, there are no images, they give NaN or infinite values, or the plan does
            not fit the network; see `apply_plan`.
        TypeError: If a batch has no tensor of images.
        UnsupportedNetworkError: If the network has no adapter.
    """
    choice("method", method, METHODS)
    if method == "none":
        return apply_plan(network, plan)
    compensator = Compensator(images_of(calibration), method=method, predict=predict)
    # The plan's units are those of the heads as they are.
    groups = {g.name: replace(g, free_basis=False, heads=1) for g in adapter_for(network).groups(network)}
    gone = {}
    for name, kept in plan.kept.items():
        stay = set(validate_units(find_group(groups, name), kept, "the kept units"))
        gone[name] = [unit for unit in range(groups[name].units) if unit not in stay]
    replace_inference_tensors(network)
    with all_or_nothing(written=[network]):
        compensator.begin_round(network, [groups[name] for name in gone])
        lost: dict[str, frozenset[int]] = {}
        for name, units in gone.items():
            for reader, columns in compensator.lost_columns(groups[name], units).items():
                lost[reader] = lost.get(reader, frozenset()) | columns
        compensator.settle(network, lost)
        return apply_plan(network, plan)


def images_of(calibration: Iterable[Any]) -> list[Tensor]:
    """The images of batches (images, ...) or tensors; a TypeError for anything else, a ValueError for NaN."""
    images = [batch[0] if isinstance(batch, list | tuple) and batch else batch for batch in calibration]
    wrong = next((image for image in images if not isinstance(image, Tensor)), None)
    if wrong is not None:
        raise TypeError(f"calibration has a batch of type {type(wrong).__name__}; tensors of images are expected")
    for number, batch in enumerate(images):
        check_finite(f"batch {number} of calibration", batch)
    return images
