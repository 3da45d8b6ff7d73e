"""PrimeSVT: memory-aware structured pruning of spiking vision transformers in a single shot (arXiv 2606.03428).

What saves most within an accuracy constraint is applied. No training: that comes after, e.g. by the callback of the
same name. The default policy, "allocated", measures what each layer costs alone and allocates the rates from that
(`allocation.py`); the paper's, "prioritized", stands in `prioritized.py`.

Decided where the paper is silent (primesvt.md): accuracies and savings are in points, robustness is that of the
whole network with one block at twice the rate, a block's increment only ever falls, and one that was refused the
smallest is done.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from swincompress_pl._deprecated import renamed
from swincompress_pl.arguments import optional, path
from swincompress_pl.evaluation_mode import evaluation_mode, outside_inference_mode, replace_inference_tensors
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.pruning.criteria import Gradients
from swincompress_pl.pruning.evaluation.ranks import failing_together
from swincompress_pl.pruning.evaluation.scorer import Evaluate, Scorer, as_evaluator
from swincompress_pl.pruning.prime.config import PrimeSVTConfig
from swincompress_pl.pruning.prime.fingerprint import check_named
from swincompress_pl.pruning.prime.result import PrimeSVTResult
from swincompress_pl.pruning.prime.search import Search
from swincompress_pl.pruning.prime.trials import PrimeProgress
from swincompress_pl.pruning.structure.change import Change, nothing_applied
from swincompress_pl.pruning.structure.cost import count_macs, count_parameters


@renamed(memo="evaluation_cache")
@outside_inference_mode()
@failing_together("pruning")
def primesvt(
    network: nn.Module,
    evaluate: Evaluate | Scorer,
    config: PrimeSVTConfig | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    calibration: Iterable[Any] | None = None,
    gradients: Callable[[nn.Module], Gradients] | None = None,
    evaluation_cache: str | Path | None = None,
    progress: bool | Callable[[PrimeProgress], None] = False,
) -> PrimeSVTResult:
    """Prune the spiking `network` in place, in a single shot, as far as the constraints allow.

    evaluate: a `HoldOut` of training images (few images a decision), or a function (network) -> accuracy in points.
    input_shape: of one input with its batch axis; with it MACs are counted. calibration: batches (images, ...) for
    `batchnorm="correct"`. gradients: as for `prune`, for the criteria that need them.
    evaluation_cache: a file in which every verdict is kept, so that a killed search goes on where it was; for the same
    network, hold-out, calibration images and accuracy constraint only. What scores has to be known by a name: a
    function by `evaluate.fingerprint = "..."`, a text of yours that changes whenever the function scores otherwise; so
    has the `predict` of a `HoldOut`.
    progress: True prints a line for each candidate; a function is called with a `PrimeProgress`.

    Where both constraints cannot be met, `result.met` is False and `config.prefer` says which alternative is applied;
    nothing is where that one does not exist. Raises ValueError for a network that does not spike, not in multi-step
    mode, with membranes that are kept between calls, or without a single spike on the hold-out; and where not even
    `max_sparsity` on every layer saves what is asked for. Whatever is raised, the network is left as it was.
    """
    replace_inference_tensors(network)
    started, config, evaluator = time.monotonic(), config or PrimeSVTConfig(), as_evaluator(evaluate)
    cache_path = optional(path, "evaluation_cache", evaluation_cache)
    if cache_path is not None:
        check_named(evaluator)
    with all_or_nothing(written=[network]):
        with evaluation_mode(network):
            search = Search(
                network,
                evaluator,
                config,
                calibration=calibration,
                gradients=gradients,
                cache_path=cache_path,
                on_progress=print if progress is True else progress or None,
            )
            search.run()
            macs = None if input_shape is None else count_macs(network, input_shape)
            parameters = count_parameters(network)
            search.apply()
            macs_after = None if input_shape is None else count_macs(network, input_shape)
        result = PrimeSVTResult(
            config=config.to_dict(),
            met=search.met,
            applied=search.applied,
            within_accuracy=search.within_accuracy,
            within_memory=search.within_memory,
            baseline_score=search.baseline,
            initial_rate=search.initial_rate,
            target_sets=search.target_sets,
            blocks=search.blocks,
            candidates=search.trials.found,
            spike_rates=search.spike_rates,
            parameters_before=parameters,
            parameters_after=count_parameters(network),
            macs_before=macs,
            macs_after=macs_after,
            scoring=search.scoring(),
            elapsed_s=time.monotonic() - started,
            change=search.change or Change(applied=nothing_applied()),
        )
        if not result.met:
            warnings.warn(f"PrimeSVT: {result.summary()}", stacklevel=5)
        return result
