"""What ranks tell each other: a failure on one ends it on all, at once, wherever it happens and whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.callback_cases import vit
from support.rank_cases import on_ranks
from torch import Tensor, nn

from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, SearchSession, collect_gradients
from swincompress_pl.pruning.evaluation import ranks
from swincompress_pl.pruning.evaluation.prefix_cache import PrefixCache
from swincompress_pl.pruning.evaluation.ranks import failing_together, from_all_ranks, from_rank_zero
from swincompress_pl.pruning.evaluation.scorer import FunctionScorer

PATIENCE = timedelta(seconds=60)  # of a rank that waits for one which is not coming: a failure of these tests
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def run_on_ranks(tmp_path: Path, works: dict[str, Callable[[int], Any]], world: int = 2) -> list[dict[str, Any]]:
    """What each of `works` gives or raises on every rank, one after the other in the same processes: ranks that have
    failed together can go on together."""

    def all_works(rank: int) -> dict[str, Any]:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
        return {name: _outcome(work, rank) for name, work in works.items()}

    return on_ranks(tmp_path / "ranks", world, all_works)


def _outcome(work: Callable[[int], Any], rank: int) -> Any:
    try:
        return work(rank)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def fail_on(rank: int, failing: int = 1, error: BaseException | None = None) -> None:
    if rank == failing:
        raise error or ValueError("mine alone")


def _before(rank: int) -> Any:
    with failing_together("working"):
        fail_on(rank)
        return from_all_ranks(rank)


def _of_rank_zero(rank: int) -> Any:
    with failing_together("working"):
        fail_on(rank, failing=0)
        return from_rank_zero(rank)


def _behind_the_last_exchange(rank: int) -> Any:
    with failing_together("working"):
        from_all_ranks(rank)
        fail_on(rank)
    return "not told"


def _inside(rank: int) -> Any:
    with failing_together("working"):
        from_all_ranks(rank)
        with failing_together("doing a part of it"):
            fail_on(rank)
        return from_all_ranks(rank)


def _both(rank: int) -> Any:
    with failing_together("working"):
        raise ValueError(f"of rank {rank}")


def _interrupted(rank: int) -> Any:
    with failing_together("working"):
        fail_on(rank, error=KeyboardInterrupt())
        return from_all_ranks(rank)


def _unsendable(rank: int) -> Any:
    with failing_together("working"):
        return from_rank_zero((lambda: 0) if rank == 0 else None)


def _heard_and_swallowed(rank: int) -> Any:
    with failing_together("working"):
        fail_on(rank)
        with suppress(RuntimeError):
            from_all_ranks(rank)
        return from_all_ranks(rank)


def _interrupted_in_an_exchange(rank: int) -> Any:
    """Between the halves of one: nothing can be told, and nothing is tried."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, failing_together("working"):
        patch.setattr(ranks.dist, "all_gather_object", interrupted)
        from_all_ranks(rank)


def _well(rank: int) -> Any:
    with failing_together("working"):
        return [from_all_ranks(rank), from_rank_zero(rank)]


def test_a_failure_is_told_wherever_it_is(tmp_path: Path) -> None:
    works = [
        _before,
        _of_rank_zero,
        _behind_the_last_exchange,
        _inside,
        _both,
        _interrupted,
        _unsendable,
        _heard_and_swallowed,
        _interrupted_in_an_exchange,
        _well,
    ]
    first, second = run_on_ranks(tmp_path, {work.__name__: work for work in works})
    mine, told = "ValueError: mine alone", "RankFailedError: rank {} failed while working: ValueError: mine alone"
    assert first["_before"] == told.format(1)
    assert second["_before"] == mine
    assert first["_of_rank_zero"] == mine
    assert second["_of_rank_zero"] == told.format(0)
    assert first["_behind_the_last_exchange"] == told.format(1)
    assert first["_inside"] == told.format(1).replace("working", "doing a part of it")
    assert second["_behind_the_last_exchange"] == second["_inside"] == mine
    assert [each["_both"] for each in (first, second)] == ["ValueError: of rank 0", "ValueError: of rank 1"]
    assert first["_interrupted"] == "RankFailedError: rank 1 failed while working: KeyboardInterrupt: "
    assert second["_interrupted"] == "KeyboardInterrupt: "
    assert "pickle" in first["_unsendable"].lower()
    assert second["_unsendable"].startswith("RankFailedError: rank 0 failed while working: ")
    assert first["_heard_and_swallowed"].startswith("RankFailedError: the ranks have failed before")
    assert first["_interrupted_in_an_exchange"] == second["_interrupted_in_an_exchange"] == "KeyboardInterrupt: "
    assert first["_well"] == second["_well"] == [[0, 1], 0]


def _holdout(count: int = 6, **options: Any) -> HoldOut:
    generator = torch.Generator().manual_seed(0)
    return HoldOut(torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 3, **options)


def _read(rank: int) -> Any:
    def batches() -> Any:
        yield torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
        fail_on(rank)

    return HoldOut.from_batches(batches(), sharded=True)


def _sizes(rank: int) -> Any:
    return HoldOut(torch.zeros(2, 3, 16 + rank, 16), torch.zeros(2, dtype=torch.long), sharded=True)


def _empty(rank: int) -> Any:
    return HoldOut(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), sharded=True)


def _measure(rank: int) -> Any:
    """As when the activations of the images do not fit into one rank's memory."""

    def measure(*_: Any) -> None:
        fail_on(rank, error=MemoryError("no memory"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixCache, "measure", measure)
        return _holdout().begin_round(vit())


def _gradients(rank: int) -> Any:
    def batches() -> Any:
        yield torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
        fail_on(rank)

    return collect_gradients(vit(), batches())


def _evaluate(rank: int) -> Any:
    def evaluate(network: nn.Module) -> float:
        fail_on(rank)
        return 50.0

    return FunctionScorer(evaluate).full(vit())


def _session(rank: int, **failing: Callable[..., Any]) -> Any:
    network = vit()
    session = SearchSession(
        network, _holdout(), AdaptivePruningConfig(tolerance=100.0, criterion=failing.get("criterion", "magnitude"))
    )
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        session.round(on_step=failing.get("on_step"), coupled=failing.get("coupled"))  # type: ignore[arg-type]
    finally:
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def _step(rank: int) -> Any:
    return _session(rank, on_step=lambda step: fail_on(rank))


def _criterion(rank: int) -> Any:
    def criterion(name: str, weight: Tensor, gradients: Any) -> Tensor:
        fail_on(rank)
        return weight.abs()

    return _session(rank, criterion=criterion)


def _commit(rank: int) -> Any:
    class Coupled:
        def cut(self, applied: Any) -> None:
            fail_on(rank)

        def uncut(self) -> None:
            """Nothing to take back."""

    return _session(rank, coupled=Coupled())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the baseline is")
def test_no_rank_waits_for_one_that_fails(tmp_path: Path) -> None:
    works = [_read, _measure, _gradients, _evaluate, _step, _criterion, _commit]
    first, second = run_on_ranks(tmp_path, {work.__name__: work for work in works})
    for work in works:
        assert first[work.__name__].startswith("RankFailedError: rank 1 failed while "), work
        assert second[work.__name__] in ("ValueError: mine alone", "MemoryError: no memory"), work


def _few(rank: int) -> Any:
    """One image, which rank 1 does not get."""
    network, holdout = vit(), _holdout(1)
    score = holdout.begin_round(network)
    verdict = holdout.judge(network, score, [])
    return [holdout.images, list(holdout.image_shape), score, verdict.accepted, verdict.images]


def _few_sharded(rank: int) -> Any:
    batches = [(torch.zeros(3, 3, 16, 16), torch.zeros(3, dtype=torch.long))]
    holdout = HoldOut.from_batches(batches if rank == 0 else [], sharded=True)
    session = SearchSession(
        vit(), holdout, AdaptivePruningConfig(tolerance=100.0), input_shape=(1, *holdout.image_shape)
    )
    outcome = session.round()
    return [holdout.images, [step.target for step in outcome.steps], outcome.state.score]


def _one_kept(rank: int) -> Any:
    batches = [(torch.zeros(3, 3, 16, 16), torch.zeros(3, dtype=torch.long))]
    holdout = HoldOut.from_batches(batches, sharded=True, max_images=1)
    return [holdout.images, list(holdout.image_shape), holdout.full(vit())]


def test_a_rank_without_an_image_takes_part(tmp_path: Path) -> None:
    works = [_few, _few_sharded, _one_kept, _empty, _sizes]
    first, second = run_on_ranks(tmp_path, {work.__name__: work for work in works})
    assert first == second
    assert first["_few"][:2] == [1, [3, 16, 16]]
    assert first["_few"][3:] == [True, 1]
    assert first["_few_sharded"][0] == 3
    assert first["_few_sharded"][1] != []
    assert first["_one_kept"][:2] == [1, [3, 16, 16]]
    assert first["_empty"] == "ValueError: the hold-out is empty; give it images to score on"
    assert first["_sizes"] == (
        "ValueError: the ranks' hold-outs have images of different shapes, (3, 16, 16) (rank 0) and (3, 17, 16) "
        "(rank 1); bring them to one"
    )
