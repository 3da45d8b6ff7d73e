"""PrimeSVT: memory-aware structured pruning of spiking vision transformers in a single shot (arXiv 2606.03428).

It applies what saves most within an accuracy constraint. It does not train; the callback of the same name does that
afterwards. The default policy, "allocated", measures what each layer costs alone, and allocates the rates from that
(`allocation.py`). The paper's policy, "prioritized", is in `prioritized.py`.

Where the paper is silent, this was decided (primesvt.md). Accuracies and savings are in points. Robustness is that of
the whole network with one block at twice the rate. A block's increment only falls, and a block whose smallest increment
was refused is done.
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
from swincompress_pl.progress import told_progress
from swincompress_pl.pruning.criteria import Gradients
from swincompress_pl.pruning.evaluation.audit import split_for_audit
from swincompress_pl.pruning.evaluation.ranks import failing_together
from swincompress_pl.pruning.evaluation.scorer import Evaluate, Scorer
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
    """Prunes a spiking network in place, in a single shot, as far as the constraints allow (arXiv 2606.03428).

    If no candidate meets both constraints, `result.met` is False, a warning says so, and `config.prefer` decides which
    alternative is applied. If that alternative does not exist, nothing is pruned. On any exception the network is left
    as it was.

    Args:
        network: A spiking network; its family needs an adapter.
        evaluate: A `HoldOut` of training images, which decides on few of them, or a function (network) -> accuracy in
            points, 0 to 100.
        config: What to prune under which constraints; None for the defaults.
        input_shape: Shape of one input with its batch axis; without it MACs are not counted.
        calibration: Batches (images, ...) for `compensation`, `criterion="second_order"`, curves of divergence, and
            `batchnorm="correct"`. It is read more than once, so give a list or a loader.
        gradients: (network) -> Gradients, made by `collect_gradients`; for the criteria that need them.
        evaluation_cache: File that keeps every verdict, so that a killed search continues where it stopped. It is only
            for the same network, hold-out, calibration images and accuracy constraint. A function that scores needs a
            name for it, `evaluate.fingerprint = "..."`: a string that changes whenever the function scores in another
            way. The `predict` of a `HoldOut` needs one too.
        progress: True shows a bar in a terminal or a notebook, and elsewhere prints a line for each candidate. A
            function is called with a `PrimeProgress`.

    Returns:
        What was found and applied.

    Raises:
        ValueError: If the network is not a spiking one, is not in multi-step mode, or keeps its membranes between
            calls, or if no neuron behind its stem (the first segment) spikes on the hold-out. Also if not even
            `max_sparsity` on every layer saves what is asked for, the config needs `calibration` or `gradients`, the
            evaluation cache is about something else or damaged, a score is not an accuracy in points, or
            `config.audit` is above 0 and `evaluate` is a function.
        TypeError: If `evaluate` is neither a scorer nor a function.
        UnsupportedNetworkError: If the network has no adapter, or its adapter does not cover this variant.
        RankFailedError: If another process of a distributed run failed.
    """
    replace_inference_tensors(network)
    started, config = time.monotonic(), config or PrimeSVTConfig()
    evaluator, auditor = split_for_audit(evaluate, config.audit)
    cache_path = optional(path, "evaluation_cache", evaluation_cache)
    if cache_path is not None:
        check_named(evaluator)
    with all_or_nothing(written=[network]), told_progress(progress, PrimeProgress.place) as on_progress:
        with evaluation_mode(network):
            search = Search(
                network,
                evaluator,
                config,
                auditor=auditor,
                calibration=calibration,
                gradients=gradients,
                cache_path=cache_path,
                on_progress=on_progress,
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
            audit=search.audit,
            score_kind=evaluator.score_kind,
            elapsed_s=time.monotonic() - started,
            change=search.change or Change(applied=nothing_applied()),
        )
        if not result.met:
            warnings.warn(f"PrimeSVT: {result.summary()}", stacklevel=5)
        return result
