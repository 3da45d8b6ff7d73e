"""Latency: callables measured in turns, so that whatever slows the machine slows them all; medians with their
spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NANOSECONDS_A_MS = 1e6


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one forward pass of `batch` images on `threads` threads, in the order they were taken; each finite and
    above 0."""

    samples_ms: tuple[float, ...]
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples_ms", tuple(float(sample) for sample in self.samples_ms))
        if not self.samples_ms or not all(0 < sample < float("inf") for sample in self.samples_ms):
            raise ValueError(f"samples_ms={self.samples_ms!r}: one or more times above 0 are needed")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: it has to be 1 or more")

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile."""
        return quartiles(self.samples_ms)

    def __str__(self) -> str:
        low, high = self.quartiles_ms
        return f"{self.median_ms:.3g} ms [{low:.3g}, {high:.3g}]"

    def to_dict(self) -> dict[str, Any]:
        """Samples, and for the reader their median and quartiles."""
        return {
            "median_ms": self.median_ms,
            "quartiles_ms": list(self.quartiles_ms),
            "batch": self.batch,
            "threads": self.threads,
            "samples_ms": list(self.samples_ms),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        return cls(samples_ms=tuple(data["samples_ms"]), batch=data["batch"], threads=data["threads"])


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times longer one took than the other, round by round: the median of the rounds' ratios and their
    quartiles."""

    median: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.quartiles[0]:.2f}, {self.quartiles[1]:.2f}]"

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "quartiles": list(self.quartiles)}


def ratio(slower: Latency, faster: Latency) -> Ratio:
    """slower / faster from samples of the same rounds. Raises ValueError when the rounds or batches do not match."""
    if len(slower.samples_ms) != len(faster.samples_ms) or slower.batch != faster.batch:
        raise ValueError(
            f"a ratio needs the same rounds and batch: {len(slower.samples_ms)} samples of batch {slower.batch} "
            f"against {len(faster.samples_ms)} of batch {faster.batch}; measure them together"
        )
    ratios = [a / b for a, b in zip(slower.samples_ms, faster.samples_ms, strict=True)]
    return Ratio(median=statistics.median(ratios), quartiles=quartiles(ratios))


def measure(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warm_up: int = 3,
    batch: int = 1,
    threads: int | None = None,
    on_round: Callable[[int, int], object] | None = None,
) -> dict[str, Latency]:
    """Calls each callable `warm_up` times, then all of them once a round for `rounds` rounds; {name: Latency}.

    batch, threads: what the callables do, noted in the result. on_round: called with (rounds done, rounds) after each
    one. The order turns by one each round, so that no callable always follows the same neighbour. Libraries with
    thread pools of their own still disturb each other inside one process: `comparison.compare` gives each a process.
    """
    if not callables or rounds < 1 or warm_up < 0:
        raise ValueError(
            f"{len(callables)} callables, rounds={rounds}, warm_up={warm_up}: at least 1, 1 and 0 are needed"
        )
    for call in callables.values():
        for _ in range(warm_up):
            call()
    samples: dict[str, list[float]] = {name: [] for name in callables}
    for number in range(rounds):
        for name in turned(list(callables), number):
            samples[name].append(timed_ms(callables[name]))
        if on_round is not None:
            on_round(number + 1, rounds)
    return {name: Latency(samples_ms=tuple(taken), batch=batch, threads=threads) for name, taken in samples.items()}


def timed_ms(call: Callable[[], object]) -> float:
    """The time of one call, in milliseconds, at least one nanosecond."""
    start = time.perf_counter_ns()
    call()
    return max(1, time.perf_counter_ns() - start) / NANOSECONDS_A_MS


def turned(names: Sequence[str], number: int) -> list[str]:
    """`names` in order, beginning with the one of this round."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; both the sample itself when there is only one."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high
