"""Latency: callables measured in turns, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NANOSECONDS_A_MS = 1e6


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one forward pass.

    Attributes:
        samples_ms: The times in milliseconds, in the order of measurement, each finite and above 0.
        batch: Images per pass, 1 or more.
        threads: Number of threads; None if it is unknown.

    Raises:
        ValueError: If there are no times, or a value is outside its range.
    """

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
        """The median in milliseconds."""
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile in milliseconds."""
        return quartiles(self.samples_ms)

    def __str__(self) -> str:
        low, high = self.quartiles_ms
        return f"{self.median_ms:.3g} ms [{low:.3g}, {high:.3g}]"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, and the median and quartiles."""
        return {
            "median_ms": self.median_ms,
            "quartiles_ms": list(self.quartiles_ms),
            "batch": self.batch,
            "threads": self.threads,
            "samples_ms": list(self.samples_ms),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        """Rebuilds what `to_dict` gave; median and quartiles are computed again.

        Args:
            data: The plain data.

        Returns:
            The latency.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If a value is outside its range.
        """
        return cls(samples_ms=tuple(data["samples_ms"]), batch=data["batch"], threads=data["threads"])


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times longer one callable took than another, round by round.

    Attributes:
        median: Median of the rounds' ratios.
        quartiles: First and third quartile of the ratios.
    """

    median: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.quartiles[0]:.2f}, {self.quartiles[1]:.2f}]"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types."""
        return {"median": self.median, "quartiles": list(self.quartiles)}


def ratio(slower: Latency, faster: Latency) -> Ratio:
    """Computes how many times longer `slower` took, from samples of the same rounds.

    Args:
        slower: The times above the fraction bar.
        faster: The times below it.

    Returns:
        Median and quartiles of the rounds' ratios.

    Raises:
        ValueError: If the number of samples or the batch size differs.
    """
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
    """Measures callables in turns: each round calls all of them once.

    Each round begins with another callable. Libraries with thread pools of their own still disturb each other inside
    one process; `report.comparison.compare` gives each a process of its own.

    Args:
        callables: What to measure, by name, without arguments.
        rounds: Number of rounds, 1 or more.
        warm_up: Untimed calls of each callable before the first round, 0 or more.
        batch: Images per call, noted in the result.
        threads: Threads of a call, noted in the result; None if unknown.
        on_round: Called with (rounds done, rounds) after each round.

    Returns:
        The times by name.

    Raises:
        ValueError: If there is no callable, `rounds` is below 1, or `warm_up` is negative.
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
    """The names, rotated so that each round begins with another one."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; a single sample is both."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high
