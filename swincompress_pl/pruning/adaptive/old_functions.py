"""`begin_search` and `run_round` of version 0.1, which use the `SearchSession` that replaced them.

Version 0.3 will remove them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import nn

from swincompress_pl.pruning.adaptive.config import AdaptivePruningConfig
from swincompress_pl.pruning.adaptive.rounds import CoupledState
from swincompress_pl.pruning.adaptive.search import CollectGradients, RoundOutcome, SearchSession
from swincompress_pl.pruning.adaptive.state import SearchState, Step
from swincompress_pl.pruning.evaluation.scorer import Evaluate, Scorer


def begin_search(
    network: nn.Module,
    evaluate: Evaluate | Scorer,
    config: AdaptivePruningConfig,
    *,
    input_shape: Sequence[int] | None = None,
    gradients: CollectGradients | None = None,
) -> SearchState:
    """The state of a `SearchSession` before its first round."""
    return SearchSession(network, evaluate, config, input_shape=input_shape, gradients=gradients).state


def run_round(
    network: nn.Module,
    evaluate: Evaluate | Scorer,
    config: AdaptivePruningConfig,
    state: SearchState,
    *,
    input_shape: Sequence[int] | None = None,
    gradients: CollectGradients | None = None,
    retrains: bool = True,
    unchanged: bool = False,
    progress: Callable[[Step], None] | None = None,
    follower: CoupledState | None = None,
) -> RoundOutcome:
    """Runs a round of a `SearchSession` that continues from a copy of `state`.

    With `unchanged`, the network is the one that the scorer last scored in full, and is not scored again.
    """
    session = SearchSession(
        network, evaluate, config, input_shape=input_shape, gradients=gradients, state=copy.deepcopy(state)
    )
    if unchanged:
        session.evaluator.network_unchanged()
    return session.round(retrains=retrains, on_step=progress, coupled=follower)
