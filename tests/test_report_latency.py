"""Measurements in turns; no test depends on how long anything takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swincompress_pl.report import Latency, measure, ratio
from swincompress_pl.report.latency import turned


def test_callables_take_turns() -> None:
    calls: list[str] = []
    rounds: list[tuple[int, int]] = []

    def noted(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    result = measure(
        {name: noted(name) for name in "abc"},
        rounds=4,
        warm_up=2,
        batch=8,
        threads=2,
        on_round=lambda done, total: rounds.append((done, total)),
    )
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {
        name: (len(latency.samples_ms), latency.batch, latency.threads) for name, latency in result.items()
    } == dict.fromkeys("abc", (4, 8, 2))


def test_median_and_quartiles() -> None:
    latency = Latency(samples_ms=(5.0, 1.0, 2.0, 4.0, 3.0))
    assert latency.median_ms == 3.0
    assert latency.quartiles_ms == (2.0, 4.0)
    assert Latency(samples_ms=(7.0,)).quartiles_ms == (7.0, 7.0)
    assert str(latency) == "3 ms [2, 4]"
    assert Latency.from_dict(latency.to_dict()) == latency


def test_a_ratio_is_taken_round_by_round() -> None:
    value = ratio(Latency(samples_ms=(2.0, 40.0, 6.0)), Latency(samples_ms=(1.0, 10.0, 2.0)))
    assert value.median == 3.0
    assert value.quartiles == (2.5, 3.5)


@pytest.mark.parametrize("samples", [(), (0.0,), (1.0, float("nan")), (float("inf"),), (-1.0,)])
def test_impossible_times_are_refused(samples: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="samples_ms"):
        Latency(samples_ms=samples)


def test_a_ratio_of_other_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="measure them together"):
        ratio(Latency(samples_ms=(1.0, 2.0)), Latency(samples_ms=(1.0,)))
    with pytest.raises(ValueError, match="of batch 2"):
        ratio(Latency(samples_ms=(1.0,)), Latency(samples_ms=(1.0,), batch=2))


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="0 callables"):
        measure({})
    with pytest.raises(ValueError, match="rounds=0"):
        measure({"a": lambda: None}, rounds=0)


def test_the_first_of_a_round_changes() -> None:
    assert [turned(["a", "b"], number) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]
