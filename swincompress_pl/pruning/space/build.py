"""Makes the search space that a config asks for, and what it works with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from swincompress_pl.pruning.compensation.compensator import Compensator, Method
from swincompress_pl.pruning.compensation.plans import images_of
from swincompress_pl.pruning.compensation.readers import Predict
from swincompress_pl.pruning.criteria import (
    SECOND_ORDER,
)
from swincompress_pl.pruning.space.config import (
    SpaceConfig,
)
from swincompress_pl.pruning.space.ranking import GlobalSpace
from swincompress_pl.pruning.space.structured import StructuredSpace
from swincompress_pl.pruning.space.weights import WeightSpace
from swincompress_pl.pruning.structure.patterns import parse_granularity
from swincompress_pl.pruning.structure.trial import FirstInputs, check_cuts


def local_space(
    config: SpaceConfig, initial_units: Mapping[str, int] | None = None, compensator: Compensator | None = None
) -> StructuredSpace | WeightSpace:
    """The space of `config` with a target for every group or layer.

    `initial_units` are the widths before the search, if it has begun already. `compensator` makes up for what goes; it
    belongs to the search, because it outlives the space of a round.
    """
    if config.granularity == "structured":
        return StructuredSpace(config, initial_units, compensator)
    pattern = parse_granularity(config.granularity, block_shape=config.block_shape)
    return WeightSpace(config, pattern, compensator)


def search_space(
    config: SpaceConfig,
    initial_units: Mapping[str, int] | None = None,
    input_shape: Sequence[int] | None = None,
    compensator: Compensator | None = None,
) -> StructuredSpace | WeightSpace | GlobalSpace:
    """The space that `config` asks for; see `local_space`.

    `input_shape` is that of one input with its batch axis. A global ranking needs it to know what a unit costs in MACs.
    """
    local = local_space(config, initial_units, compensator)
    return GlobalSpace(local, input_shape) if config.ranking == "global" else local


def needs_calibration(config: SpaceConfig) -> bool:
    """Whether unlabelled images are needed: to compensate what goes, or to rank by it."""
    return config.compensation != "none" or config.criterion == SECOND_ORDER


def compensator_for(
    config: SpaceConfig, calibration: Iterable[Any] | None, *, intercepts: bool = True, predict: Predict | None = None
) -> Compensator | None:
    """The compensator that a config asks for, with images from batches (images, ...) or tensors; None for none.

    A ValueError says so if there are no images for it.
    """
    if not needs_calibration(config):
        return None
    if calibration is None:
        asked = "compensation" if config.compensation != "none" else "criterion"
        raise ValueError(
            f"{asked}={getattr(config, asked)!r} needs calibration=: batches of unlabelled training images, e.g. a "
            "DataLoader over a few hundred"
        )
    method: Method = "ridge" if config.compensation == "none" else config.compensation
    return Compensator(images_of(calibration), method=method, predict=predict, intercepts=intercepts)


def check_on_trial(
    network: nn.Module, config: SpaceConfig, heard: FirstInputs, input_shape: Sequence[int] | None
) -> None:
    """Raises ValueError if units cannot be cut as the groups say (`check_cuts`).

    `heard` has the inputs of the network while it was scored. If scoring did not call it, images are made of
    `input_shape`; without either, nothing is checked. Masks of weights change no shape, and need no trial.
    """
    arguments = heard.or_random(network, input_shape)
    if config.granularity == "structured" and arguments is not None:
        check_cuts(network, StructuredSpace(config).groups(network), arguments)
