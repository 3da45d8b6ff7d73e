"""What to cut: groups and patterns as data, plans and masks that can be replayed, and the round-robin search.

    from swincompress_pl.pruning import HoldOut, RoundRobinConfig, prune
    holdout = HoldOut.from_batches(loader)
    result = prune(network, holdout, RoundRobinConfig(tolerance=1.0), input_shape=(1, 3, 224, 224))

`network` needs an adapter (`swincompress_pl.models` brings those of timm's Swin and ViT); nothing here knows a family
or Lightning.
"""

from swincompress_pl.history import history_of
from swincompress_pl.pruning.adaptive.config import RoundRobinConfig
from swincompress_pl.pruning.adaptive.rounds import Follower
from swincompress_pl.pruning.adaptive.search import (
    PruningResult,
    RoundOutcome,
    begin_search,
    finish_search,
    measure_sensitivity,
    prune,
    run_round,
)
from swincompress_pl.pruning.adaptive.state import SearchState, Step, TargetState
from swincompress_pl.pruning.criteria import (
    CRITERIA,
    Criterion,
    Gradients,
    collect_gradients,
    estimates_loss,
    needs_gradients,
    saliency,
    unit_scores,
    weight_scores,
)
from swincompress_pl.pruning.evaluation.holdout import HoldOut, Predict
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero, share_buffers, sum_over_ranks, world_size
from swincompress_pl.pruning.evaluation.scorer import (
    FunctionScorer,
    Scorer,
    ScoringCost,
    Verdict,
    evaluation_mode,
)
from swincompress_pl.pruning.prime.candidates import Candidate
from swincompress_pl.pruning.prime.config import PrimeSVTConfig
from swincompress_pl.pruning.prime.primesvt import primesvt
from swincompress_pl.pruning.prime.result import BlockState, PrimeSVTResult, TargetSet
from swincompress_pl.pruning.prime.search import PrimeProgress
from swincompress_pl.pruning.space import (
    Change,
    Granularity,
    StructuredGranularity,
    Target,
    WeightGranularity,
    granularity_for,
    prunable_weights,
    revert,
)
from swincompress_pl.pruning.structure.apply import (
    AppliedPlan,
    SlicedTensor,
    apply_plan,
    revert_plan,
)
from swincompress_pl.pruning.structure.cost import count_macs, count_parameters, skeleton
from swincompress_pl.pruning.structure.groups import Attribute, Exchange, Group, NormSlice, Slice
from swincompress_pl.pruning.structure.optimizer_state import slice_optimizer, slice_optimizers
from swincompress_pl.pruning.structure.patterns import Pattern, parse_granularity
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.regrow import regrow_latest_plan
from swincompress_pl.pruning.structure.unit_masks import MaskedLayerNorm, mask_plan, mask_units
from swincompress_pl.pruning.structure.weight_masks import (
    count_nonzero,
    enforce_masks,
    keep_masks,
    masked_parameters,
    masked_share,
    masked_shares,
    register_masks,
    remove_masks,
    set_mask,
    temporary_mask,
    undo_latest_masks,
)

__all__ = [
    "CRITERIA",
    "AppliedPlan",
    "Attribute",
    "BlockState",
    "Candidate",
    "Change",
    "Criterion",
    "Exchange",
    "Follower",
    "FunctionScorer",
    "Gradients",
    "Granularity",
    "Group",
    "HoldOut",
    "MaskedLayerNorm",
    "NormSlice",
    "Pattern",
    "Predict",
    "PrimeProgress",
    "PrimeSVTConfig",
    "PrimeSVTResult",
    "PruningPlan",
    "PruningResult",
    "RoundOutcome",
    "RoundRobinConfig",
    "Scorer",
    "ScoringCost",
    "SearchState",
    "Slice",
    "SlicedTensor",
    "Step",
    "StructuredGranularity",
    "Target",
    "TargetSet",
    "TargetState",
    "Verdict",
    "WeightGranularity",
    "apply_plan",
    "begin_search",
    "collect_gradients",
    "count_macs",
    "count_nonzero",
    "count_parameters",
    "enforce_masks",
    "estimates_loss",
    "evaluation_mode",
    "finish_search",
    "from_rank_zero",
    "granularity_for",
    "history_of",
    "keep_masks",
    "mask_plan",
    "mask_units",
    "masked_parameters",
    "masked_share",
    "masked_shares",
    "measure_sensitivity",
    "needs_gradients",
    "parse_granularity",
    "primesvt",
    "prunable_weights",
    "prune",
    "register_masks",
    "regrow_latest_plan",
    "remove_masks",
    "revert",
    "revert_plan",
    "run_round",
    "saliency",
    "set_mask",
    "share_buffers",
    "skeleton",
    "slice_optimizer",
    "slice_optimizers",
    "sum_over_ranks",
    "temporary_mask",
    "undo_latest_masks",
    "unit_scores",
    "weight_scores",
    "world_size",
]
