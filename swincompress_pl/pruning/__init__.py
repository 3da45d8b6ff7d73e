"""What to cut: groups as data, plans that can be replayed, physical slicing, and the round-robin search.

    from swincompress_pl.pruning import RoundRobinConfig, prune
    result = prune(network, evaluate, RoundRobinConfig(tolerance=1.0), input_shape=(1, 3, 224, 224))

`network` needs an adapter (`swincompress_pl.models` brings those of timm's Swin and ViT); nothing here knows a family
or Lightning.
"""

from .apply import AppliedPlan, SlicedTensor, apply_plan, history_of, revert_plan
from .config import RoundRobinConfig
from .cost import count_macs, count_parameters, skeleton
from .groups import Attribute, Group, Slice
from .masks import mask_plan, mask_units
from .optimizers import slice_optimizer, slice_optimizers
from .plan import PruningPlan
from .regrow import regrow_latest_plan
from .round_robin import (
    PruningResult,
    RoundOutcome,
    begin_search,
    evaluation_mode,
    prunable_groups,
    prune,
    run_round,
)
from .scores import CRITERIA, Criterion, magnitude, unit_scores
from .state import GroupState, SearchState, Step

__all__ = [
    "CRITERIA",
    "AppliedPlan",
    "Attribute",
    "Criterion",
    "Group",
    "GroupState",
    "PruningPlan",
    "PruningResult",
    "RoundOutcome",
    "RoundRobinConfig",
    "SearchState",
    "Slice",
    "SlicedTensor",
    "Step",
    "apply_plan",
    "begin_search",
    "count_macs",
    "count_parameters",
    "evaluation_mode",
    "history_of",
    "magnitude",
    "mask_plan",
    "mask_units",
    "prunable_groups",
    "prune",
    "regrow_latest_plan",
    "revert_plan",
    "run_round",
    "skeleton",
    "slice_optimizer",
    "slice_optimizers",
    "unit_scores",
]
