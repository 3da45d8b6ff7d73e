"""The policy "allocated", which is not the paper's: rates from what each block costs alone (primesvt.md).

Alg. 1 of the paper gives all blocks one rate, the highest that is acceptable together, and Alg. 4 raises each block as
far as the constraint allows. So a block that hardly saves anything has already spent accuracy, and the first block that
is raised may spend all that is left. Here each block is measured alone at several rates. The steps of all blocks are
taken in the order of what they save per point lost, as a knapsack is filled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from swincompress_pl.pruning.prime.config import AllocatedPolicy
from swincompress_pl.pruning.prime.result import BlockState, CurvePoint
from swincompress_pl.pruning.prime.trials import LEAST_DROP, Trials

_PARTS = (1.0, 0.5, 0.25, 0.125)  # of a step, tried in turn where it does not fit
# Of the steps that hold together, for the whole deciding part and an audit to choose from.
_LESS = (0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_MOST_REFUSED = 3  # blocks; curves of the divergence are cheap to make fine, so that little is left to try
_FAR = 10  # times the tolerance, in 100 nats


@dataclass(frozen=True, kw_only=True)
class Step:
    """Raises `block` to `rate`; `efficiency` is points saved per point lost since the block's step before."""

    block: str
    rate: float
    efficiency: float


def steps_by_efficiency(curves: Mapping[str, Sequence[CurvePoint]]) -> list[Step]:
    """The steps of all blocks, sorted by what they save per point lost; those of a block have rising rates.

    The steps of a block are the concave hull of its curve, so steps that are more efficient together are one step.
    """
    steps = []
    for block, curve in curves.items():
        here, rest = CurvePoint(rate=0.0, saving=0.0, drop=0.0), list(curve)
        while rest := [point for point in rest if point.saving > here.saving]:
            best = max(rest, key=lambda point: (_efficiency(here, point), point.saving))
            steps.append(Step(block=block, rate=best.rate, efficiency=_efficiency(here, best)))
            here = best
    return sorted(steps, key=lambda step: -step.efficiency)


def _efficiency(before: CurvePoint, after: CurvePoint) -> float:
    return (after.saving - before.saving) / (max(after.drop - before.drop, 0.0) + LEAST_DROP)


def allocate(trials: Trials) -> list[BlockState]:
    """Finds the rates of all blocks.

    It measures the curves, takes as many of the best steps as the constraint allows together, and then, one by one,
    what still fits of the others.
    """
    blocks = trials.into_blocks(list(trials.candidates.targets.values()), rate=0.0)
    policy = trials.config.policy
    by_divergence = isinstance(policy, AllocatedPolicy) and policy.curves == "divergence"
    curves = _divergences(trials, blocks) if by_divergence else _measure(trials, blocks)
    steps = steps_by_efficiency(curves)
    taken = _most_together(trials, blocks, steps)
    most_refused = _MOST_REFUSED if by_divergence else None
    if trials.config.audit:
        _try_less(trials, blocks, steps[:taken])
    blocks = _add_what_fits(trials, _at(blocks, steps[:taken]), steps[taken:], most_refused=most_refused)
    return [_measured(block, tuple(curves.get(block.name, ()))) for block in blocks]


def _measured(block: BlockState, curve: tuple[CurvePoint, ...]) -> BlockState:
    """Adds its curve, and the robustness of the block alone at the highest measured rate up to its own."""
    found = [point for point in curve if point.rate <= block.rate]
    robustness = found[-1].saving / (found[-1].drop + LEAST_DROP) if found else None
    return replace(block, curve=curve, robustness=robustness)


def _measure(trials: Trials, blocks: Sequence[BlockState]) -> dict[str, list[CurvePoint]]:
    """Maps each block that is large enough to its points; a curve ends where the block alone costs too much."""
    config, curves = trials.config, dict[str, list[CurvePoint]]()
    worthy = trials.worthy(blocks)
    rates = sorted({*config.rates, config.max_sparsity})
    for number, block in enumerate(worthy):
        curves[block.name], last = [], dict[str, int]()
        for count, rate in enumerate(rates):
            widths = trials.widths_of([replace(block, rate=rate)])
            if widths == last:  # after rounding
                continue
            last = widths
            found = trials.judge(
                widths, {}, phase="robustness", label=f"{block.name} at {rate:.0%}",
                done=number * len(rates) + count + 1, total=len(worthy) * len(rates), block=block.name, rate=rate,
            )  # fmt: skip
            if not found.accepted:
                break
            drop = max(trials.baseline - found.score, 0.0)
            curves[block.name].append(CurvePoint(rate=rate, saving=100 * found.saving, drop=drop))
    return curves


def _divergences(trials: Trials, blocks: Sequence[BlockState]) -> dict[str, list[CurvePoint]]:
    """As `_measure`, in 100 times the divergence; a curve ends far beyond what may be lost."""
    config, curves = trials.config, dict[str, list[CurvePoint]]()
    for block in trials.worthy(blocks):
        curves[block.name], last = [], dict[str, int]()
        for rate in sorted({*config.rates, config.max_sparsity}):
            widths = trials.widths_of([replace(block, rate=rate)])
            if widths == last:  # after rounding
                continue
            last = widths
            drop = 100 * trials.candidates.divergence(widths)
            saving = 100 * trials.candidates.saving(widths)
            curves[block.name].append(CurvePoint(rate=rate, saving=saving, drop=drop))
            if drop > _FAR * config.tolerance:
                break
    return curves


def _at(blocks: Sequence[BlockState], steps: Sequence[Step]) -> list[BlockState]:
    rates = {step.block: step.rate for step in steps}  # the last step of a block has the highest rate
    return [replace(block, rate=rates.get(block.name, block.rate)) for block in blocks]


def _most_together(trials: Trials, blocks: Sequence[BlockState], steps: Sequence[Step]) -> int:
    """The number of first steps that the constraint allows together, by bisection: fewer steps lose less."""
    most, refused, base = 0, len(steps) + 1, dict[str, int]()
    tries, number = math.ceil(math.log2(len(steps) + 1)), 0
    while refused - most > 1:
        middle, number = (most + refused) // 2, number + 1
        widths = trials.widths_of(_at(blocks, steps[:middle]))
        label, total = f"the {middle} best steps", tries + len(steps) - most
        if trials.judge(widths, base, phase="policy", label=label, done=number, total=total).accepted:
            trials.accept(widths, base)
            most, base = middle, widths
        else:
            refused = middle
    return most


def _try_less(trials: Trials, blocks: Sequence[BlockState], steps: Sequence[Step]) -> None:
    """Tries parts of the steps, so that candidates are left if more images, or the audit, refuse those that hold."""
    counts = sorted({math.ceil(part * len(steps)) for part in _LESS} - {0, len(steps)}, reverse=True)
    for number, count in enumerate(counts, start=1):
        trials.judge(
            trials.widths_of(_at(blocks, steps[:count])), {}, phase="policy", label=f"the {count} best steps",
            done=number, total=len(counts),
        )  # fmt: skip


def _add_what_fits(
    trials: Trials, blocks: list[BlockState], steps: Sequence[Step], *, most_refused: int | None = None
) -> list[BlockState]:
    """Raises one block after another by its next step, or by half of it, a quarter or an eighth.

    A block whose step did not fit whole gets no further steps. It ends after `most_refused` blocks of which no part
    fits; None for never.
    """
    done, refused = set[str](), 0
    for number, step in enumerate(steps, start=1):
        if step.block in done or refused == most_refused:
            continue
        before = next(block.rate for block in blocks if block.name == step.block)
        for part in _PARTS:
            rate = before + part * (step.rate - before)
            raised = _raised(trials, blocks, replace(step, rate=rate), number, len(steps))
            if raised is not None:
                blocks = raised
                break
        else:
            refused += 1
            done.add(step.block)
        if part < 1:
            done.add(step.block)
    return blocks


def _raised(trials: Trials, blocks: list[BlockState], step: Step, done: int, total: int) -> list[BlockState] | None:
    """The blocks after a step; None if it changes nothing or the constraint does not allow it."""
    raised = _at(blocks, [step])
    base, widths = trials.widths_of(blocks), trials.widths_of(raised)
    if widths == base:
        return None
    found = trials.judge(
        widths, base, phase="policy", label=f"{step.block} at {step.rate:.0%}", done=done, total=total,
        block=step.block, rate=step.rate,
    )  # fmt: skip
    if not found.accepted:
        return None
    trials.accept(widths, base)
    return raised
