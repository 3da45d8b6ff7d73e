"""What a search may remove: units of structured groups, or single weights.

A search space lists its targets, chooses what goes (the lowest scores), masks it for a trial, and makes it permanent.
There are two: `StructuredSpace` slices units away, and `WeightSpace` keeps weights, n:m, blocks or filters at zero by
masks. `GlobalSpace` treats the whole network as a single target of either, so that one step takes the lowest scores of
all layers together.
"""

from swincompress_pl.pruning.space.build import (
    check_on_trial,
    compensator_for,
    local_space,
    needs_calibration,
    search_space,
)
from swincompress_pl.pruning.space.config import (
    Removal,
    SearchSpace,
    SpaceConfig,
    Target,
    check_criterion,
    checked_tolerance,
)
from swincompress_pl.pruning.space.ranking import GlobalSpace
from swincompress_pl.pruning.space.structured import StructuredSpace
from swincompress_pl.pruning.space.weights import WeightSpace, prunable_weights

__all__ = [
    "GlobalSpace",
    "Removal",
    "SearchSpace",
    "SpaceConfig",
    "StructuredSpace",
    "Target",
    "WeightSpace",
    "check_criterion",
    "check_on_trial",
    "checked_tolerance",
    "compensator_for",
    "local_space",
    "needs_calibration",
    "prunable_weights",
    "search_space",
]
