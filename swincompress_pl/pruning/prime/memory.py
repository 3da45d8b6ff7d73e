"""Candidates that save enough, for a search whose policy found none: policies stop where the accuracy ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from swincompress_pl.pruning.prime.allocation import steps_by_efficiency
from swincompress_pl.pruning.prime.result import BlockState, Candidate
from swincompress_pl.pruning.prime.trials import Trials

_HALVINGS = 16  # of the rates; widths are coarser


def try_within_memory(trials: Trials, blocks: Sequence[BlockState]) -> list[Candidate]:
    """Tries the least pruning that saves enough, in up to three ways.

    The ways are: the most efficient steps of the measured curves; the policy's rates, all raised toward the highest
    sparsity; and one rate for all layers.

    Args:
        trials: Tries the candidates and keeps them.
        blocks: The blocks at the rates that the policy found.

    Returns:
        The candidates, which differ from each other and save enough.
    """
    every = trials.into_blocks(list(trials.candidates.targets.values()), rate=0.0)
    rates = {block.name: block.rate for block in blocks}
    reached = [replace(block, rate=rates.get(block.name, 0.0)) for block in every]
    ways = {
        "the most efficient steps": _by_steps(trials, every, blocks),
        "all rates raised": _raised(trials, reached),
        "one rate": _raised(trials, every),
    }
    plans = {tuple(sorted(widths.items())): (label, widths) for label, widths in ways.items() if widths}
    return [
        trials.judge(widths, {}, phase="policy", label=f"enough saved by {label}", done=number, total=len(plans))
        for number, (label, widths) in enumerate(plans.values(), start=1)
    ]


def _by_steps(trials: Trials, every: Sequence[BlockState], measured: Sequence[BlockState]) -> dict[str, int] | None:
    """The fewest first steps of the curves that save enough; None if all of them do not."""
    steps, rates = steps_by_efficiency({block.name: block.curve for block in measured if block.curve}), {}
    for step in steps:
        rates[step.block] = step.rate
        widths = trials.widths_of([replace(block, rate=rates.get(block.name, 0.0)) for block in every])
        if _enough(trials, widths):
            return widths
    return None


def _raised(trials: Trials, blocks: Sequence[BlockState]) -> dict[str, int]:
    """The blocks raised toward the highest sparsity, all by the same part of the way that is left."""
    highest = trials.config.max_sparsity

    def widths_at(part: float) -> dict[str, int]:
        rates = (block.rate + part * max(highest - block.rate, 0.0) for block in blocks)
        return trials.widths_of([replace(block, rate=rate) for block, rate in zip(blocks, rates, strict=True)])

    return widths_at(_least(lambda part: _enough(trials, widths_at(part))))


def _least(holds: Callable[[float], bool]) -> float:
    """The least part, 0 to 1, for which a condition holds that holds for 1."""
    refused, least = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (refused + least) / 2
        refused, least = (refused, middle) if holds(middle) else (middle, least)
    return least


def _enough(trials: Trials, widths: dict[str, int]) -> bool:
    return trials.candidates.saving(widths) >= trials.config.min_memory_saving
