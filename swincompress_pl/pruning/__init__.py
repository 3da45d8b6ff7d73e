"""Pruning: what can be removed, in which order, and two searches for how much of it.

    from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, prune
    holdout = HoldOut.from_batches(loader)
    result = prune(network, holdout, AdaptivePruningConfig(tolerance=1.0), input_shape=(1, 3, 224, 224))

`network` needs an adapter. `swincompress_pl.models` has those of timm's Swin and ViT and of spiking transformers.
Nothing here knows a particular family, or Lightning. The rooms, lower ones first, are `structure`, `evaluation`,
`criteria`, `compensation`, `space`, and the searches `adaptive` and `prime`.
"""

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.pruning.adaptive.config import AdaptivePruningConfig
from swincompress_pl.pruning.adaptive.search import PruningResult, SearchSession, prune
from swincompress_pl.pruning.adaptive.state import SearchState, Step
from swincompress_pl.pruning.compensation.plans import compensate
from swincompress_pl.pruning.criteria import CRITERIA, Criterion, Gradients, collect_gradients
from swincompress_pl.pruning.evaluation.holdout import HoldOut
from swincompress_pl.pruning.prime.config import AllocatedPolicy, PrimeSVTConfig, PrioritizedPolicy
from swincompress_pl.pruning.prime.primesvt import primesvt
from swincompress_pl.pruning.prime.result import PrimeSVTResult
from swincompress_pl.pruning.prime.trials import PrimeProgress
from swincompress_pl.pruning.structure.apply import apply_plan
from swincompress_pl.pruning.structure.cost import count_macs, count_parameters
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.optimizer_state import slice_optimizer
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.weight_masks import keep_masks

__all__ = [
    "CRITERIA",
    "AdaptivePruningConfig",
    "AllocatedPolicy",
    "Criterion",
    "Gradients",
    "Group",
    "HoldOut",
    "PrimeProgress",
    "PrimeSVTConfig",
    "PrimeSVTResult",
    "PrioritizedPolicy",
    "PruningPlan",
    "PruningResult",
    "SearchSession",
    "SearchState",
    "Step",
    "apply_plan",
    "collect_gradients",
    "compensate",
    "count_macs",
    "count_parameters",
    "keep_masks",
    "primesvt",
    "prune",
    "slice_optimizer",
]


def __getattr__(name: str) -> object:
    return find_old_name("pruning", name)


def __dir__() -> list[str]:
    return __all__
