"""The paper's policy.

Alg. 1 finds a set of layers, and a rate that is acceptable for all of them together. Alg. 3 measures how robust each
block is. Alg. 4 raises each block's rate as far as the constraint allows, the robust ones first and by more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from swincompress_pl.pruning.prime.config import PrioritizedPolicy
from swincompress_pl.pruning.prime.result import BlockState, Candidate, TargetSet
from swincompress_pl.pruning.prime.trials import LEAST_DROP, Trials
from swincompress_pl.pruning.space import Target


class Prioritized:
    """The policy under way; `blocks`, `target_sets` and `initial_rate` are its results."""

    def __init__(self, trials: Trials, policy: PrioritizedPolicy) -> None:
        self._trials, self._policy, self._config = trials, policy, trials.config
        self.blocks: list[BlockState] = []
        self.target_sets: list[TargetSet] = []
        self.initial_rate = 0.0
        self._tries = 0

    def run(self) -> None:
        """Runs all three phases; there are no blocks if no rate was acceptable for any set of layers."""
        layers = self._choose_target_set()
        if not layers:
            return
        self.blocks = self._trials.into_blocks(layers, self.initial_rate)
        if self._policy.order == "size":
            self.blocks.sort(key=lambda block: -block.parameters_part)
        else:
            self._measure_robustness()
        self._raise_rates()

    # Alg. 1

    def _choose_target_set(self) -> list[Target]:
        """The layers of the set with the highest benefit, empty if no rate was acceptable; sets the initial rate."""
        trials, rates = self._trials, sorted(self._config.rates)
        by_size = sorted(trials.candidates.targets.values(), key=lambda target: -target.weights)
        chosen: list[Target] = []
        highest, done = -math.inf, 0
        for part in self._policy.target_sets:
            layers = by_size[: math.ceil(part * len(by_size) - 1e-9)]
            accepted: list[tuple[float, Candidate]] = []
            for rate in rates:
                done += 1
                candidate = trials.judge(
                    trials.candidates.widths({layer.name: rate for layer in layers}), {}, phase="target set",
                    label=f"{part:.0%} of the layers at {rate:.0%}", done=done,
                    total=len(self._policy.target_sets) * len(rates),
                )  # fmt: skip
                if candidate.accepted:
                    accepted.append((rate, candidate))
            benefit = _mean([each.score + 100 * each.saving for _, each in accepted]) if accepted else None
            accepted_rates = tuple(rate for rate, _ in accepted)
            self.target_sets.append(
                TargetSet(part=part, layers=len(layers), accepted_rates=accepted_rates, benefit=benefit)
            )
            if benefit is not None and benefit > highest:
                highest, chosen, self.initial_rate = benefit, layers, accepted_rates[-1]
        return chosen

    # Alg. 3

    def _measure_robustness(self) -> None:
        """Tries each block at twice the rate, and sorts the blocks, the most robust first."""
        trials = self._trials
        base = trials.widths_of(self.blocks)
        rate = min(2 * self.initial_rate, self._config.max_sparsity)
        measured = []
        for number, block in enumerate(self.blocks, start=1):
            changed = [replace(each, rate=rate) if each is block else each for each in self.blocks]
            found = trials.judge(
                trials.widths_of(changed), base, phase="robustness",
                label=f"{block.name} at {rate:.0%}, the others at {self.initial_rate:.0%}", done=number,
                total=len(self.blocks), block=block.name, rate=rate,
            )  # fmt: skip
            drop = max(trials.baseline - found.score, 0.0)
            measured.append(replace(block, robustness=100 * found.saving / (drop + LEAST_DROP)))
        measured.sort(key=lambda block: -_robustness(block))
        self.blocks = measured

    # Alg. 4

    def _raise_rates(self) -> None:
        """Raises the blocks by their bands until none gains.

        Then, unless `frozen` forbids it, it raises those whose increment is 0, in bands of their own.
        """
        waiting = [block.name for block in self._trials.worthy(self.blocks)]
        while waiting:
            increments = self._band(waiting)
            self._raise_in_turn({name: steps for name, steps in increments.items() if steps})
            # the most robust block has an increment above 0, so fewer wait each time
            waiting = [name for name, steps in increments.items() if not steps and self._policy.frozen == "last"]

    def _band(self, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Puts these blocks into bands below the most robust of them; returns {name: increments above 0, falling}."""
        banded, increments = [block for block in self.blocks if block.name in names], self._policy.increments
        if self._policy.order == "robustness":
            best, last, theta = _robustness(banded[0]), len(increments) - 1, self._policy.theta
            banded = [replace(block, band=min(int((best - _robustness(block)) / theta), last)) for block in banded]
        found = {block.name: block for block in banded}
        self.blocks = [found.get(block.name, block) for block in self.blocks]
        return {block.name: tuple(step for step in increments[block.band :] if step > 0) for block in banded}

    def _raise_in_turn(self, steps: dict[str, tuple[float, ...]]) -> None:
        """Raises each block by its first increment, or by the next if that is refused, until none gains.

        Until a raise is refused, all blocks of a turn are raised at once: if all together are acceptable, fewer of them
        are assumed to be.
        """
        while self._raise_together(steps):
            pass
        gained = True
        while gained:
            gained = False
            for number, block in enumerate(self.blocks):
                while steps.get(block.name) and block.rate < self._config.max_sparsity:
                    if self._raise({number: steps[block.name][0]}, f"{block.name} at {{rate:.0%}}", steps):
                        gained = True
                        break
                    steps[block.name] = steps[block.name][1:]

    def _raise_together(self, steps: Mapping[str, tuple[float, ...]]) -> bool:
        """Raises every block by its increment; returns False if none could be raised or it was refused."""
        raises = {
            number: steps[block.name][0]
            for number, block in enumerate(self.blocks)
            if steps.get(block.name) and block.rate < self._config.max_sparsity
        }
        return bool(raises) and self._raise(raises, f"{len(raises)} blocks raised, the last at {{rate:.0%}}", steps)

    def _raise(self, raises: Mapping[int, float], label: str, steps: Mapping[str, tuple[float, ...]]) -> bool:
        """Raises some blocks, {number: by how much}; returns False, and raises none, if that was refused."""
        trials, before, plans = self._trials, self.blocks, 0
        widths_before, raised = trials.widths_of(before), list(before)
        for number, step in raises.items():
            rate, plan = min(before[number].rate + step, self._config.max_sparsity), trials.widths_of(raised)
            raised[number] = replace(before[number], rate=rate)
            plans += trials.widths_of(raised) != plan
        widths = trials.widths_of(raised)
        self._tries += 1
        if widths != widths_before:
            found = trials.judge(
                widths, widths_before, phase="policy", label=label.format(rate=rate), done=self._tries,
                total=self._tries + self._steps_left(steps), stands_for=plans if len(raises) > 1 else None,
                block=before[number].name if len(raises) == 1 else None, rate=rate,
            )  # fmt: skip
            if not found.accepted:
                return False
            trials.accept(widths, widths_before)
        self.blocks = raised
        return True

    def _steps_left(self, steps: Mapping[str, tuple[float, ...]]) -> int:
        """The largest number of steps that are left, if all are accepted at their present increment."""
        total = 0
        for block in self.blocks:
            if steps.get(block.name):
                total += math.ceil((self._config.max_sparsity - block.rate) / steps[block.name][0])
        return total


def _robustness(block: BlockState) -> float:
    assert block.robustness is not None
    return block.robustness


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
