"""What PrimeSVT's policies work with: blocks with rates, and trials of them against the accuracy constraint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from swincompress_pl.pruning.prime.candidates import Candidates
from swincompress_pl.pruning.prime.config import PrimeSVTConfig
from swincompress_pl.pruning.prime.result import BlockState, Candidate
from swincompress_pl.pruning.space import Target
from swincompress_pl.registry import adapter_for

LEAST_DROP = 0.001  # in points; from the paper: robustness is saving / (drop + 0.001)


@dataclass(frozen=True, kw_only=True)
class PrimeProgress:
    """How far a search is. `str(progress)` describes it in one line.

    Attributes:
        phase: "target set", "robustness" or "policy".
        done: Number of candidates of this phase so far.
        total: Largest number of candidates that the phase can have.
        candidate: The candidate tried last.
        left_s: Most seconds that the rest of the phase may take, estimated from the candidates so far; None before any
            was run.
    """

    phase: str
    done: int
    total: int
    candidate: Candidate
    left_s: float | None

    def place(self) -> tuple[str, int, int]:
        """Returns what is being done, how many candidates of it are done, and in total, for a bar."""
        return f"PrimeSVT: {self.phase}", self.done, self.total

    def __str__(self) -> str:
        left = "" if self.left_s is None else f", at most {self.left_s:.0f} s left in this phase"
        return f"{self.candidate}{left}"


class Trials:
    """Tries candidates and keeps them in `found`; `baseline` is the unpruned network's score in points."""

    def __init__(
        self,
        candidates: Candidates,
        *,
        baseline: float,
        on_progress: Callable[[PrimeProgress], None] | None,
    ) -> None:
        self.candidates, self.baseline = candidates, baseline
        self.config: PrimeSVTConfig = candidates.config
        self.found: list[Candidate] = []
        self._on_progress, self._spent_s = on_progress, 0.0
        self._resolution_points = self.config.resolution_points()

    def judge(
        self,
        widths: dict[str, int],
        base: dict[str, int],
        *,
        phase: str,
        label: str,
        done: int,
        total: int,
        block: str | None = None,
        rate: float | None = None,
        stands_for: int | None = None,
    ) -> Candidate:
        """Tries the network at these widths, compared with that at `base`; keeps the candidate and tells progress.

        `block` and `rate` are of the only block that differs from `base`; None if several do. `stands_for` is the
        number of candidates of the plain algorithm that this one replaces if it is accepted. The algorithm tries them
        one by one, and would not have tried what is refused.
        """
        started, resolution = time.monotonic(), self._resolution_points.get(phase)
        try:
            found = self.candidates.judge(widths, base, phase=phase, label=label, resolution_points=resolution)
        except ValueError as error:
            error.add_note(f"while {label} was tried")
            raise
        found = replace(found, block=block, rate=rate)
        if stands_for is not None:
            found = replace(found, stands_for=stands_for if found.accepted else 0)
        self.found.append(found)
        if not found.remembered:
            self._spent_s += time.monotonic() - started
        if self._on_progress is not None:
            fresh = self.num_evaluations
            left = self._spent_s / fresh * max(total - done, 0) if fresh else None
            self._on_progress(PrimeProgress(phase=phase, done=done, total=total, candidate=found, left_s=left))
        return found

    def accept(self, widths: dict[str, int], base: dict[str, int]) -> None:
        """Says that later candidates have `widths` as their base."""
        self.candidates.accept(widths, base)

    @property
    def num_evaluations(self) -> int:
        """The number of candidates that were run in this process."""
        return sum(not each.remembered for each in self.found)

    def widths_of(self, blocks: Sequence[BlockState]) -> dict[str, int]:
        """The widths of their layers at the blocks' rates."""
        return self.candidates.widths({layer: block.rate for block in blocks for layer in block.layers})

    def into_blocks(self, layers: Sequence[Target], rate: float) -> list[BlockState]:
        """The blocks of some layers, in the order of the network, all at `rate`."""
        network, targets = self.candidates.network, self.candidates.targets
        segments = adapter_for(network).segments(network)
        order = {name: number for number, name in enumerate(targets)}
        members: dict[str, list[str]] = {}
        for layer in sorted(layers, key=lambda each: order[each.name]):
            inside = (s for s in segments if layer.tensors[0].startswith(f"{s}."))
            block = layer.name if self.config.blocks == "layer" else next(inside, layer.name)
            members.setdefault(block, []).append(layer.name)
        weights = {layer.name: layer.weights for layer in layers}
        all_parameters = sum(parameter.numel() for parameter in network.parameters())
        return [
            BlockState(
                name=name,
                layers=tuple(names),
                parameters_part=sum(weights[each] for each in names) / all_parameters,
                rate=rate,
            )
            for name, names in members.items()
        ]

    def worthy(self, blocks: Sequence[BlockState]) -> list[BlockState]:
        """The blocks that have enough parameters to be raised (`min_block_share`)."""
        mean = math.fsum(block.parameters_part for block in blocks) / len(blocks)
        least = self.config.min_block_share * mean
        return [block for block in blocks if block.parameters_part >= least]
